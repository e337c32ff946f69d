import json
import logging

import pytest
from support.tiny_tokenizer import make_tiny_tokenizer

from eagle_rpc.config.compose import load
from eagle_rpc.data import ChatTemplate, Message
from eagle_rpc.errors import DataError
from eagle_rpc.evaluate import read_prompts

TEMPLATE = ChatTemplate(make_tiny_tokenizer())
CONTEXT = 200


def read_with_categories(tmp_path, *records, **settings):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    overrides = [f"{key}={value}" for key, value in settings.items()]
    config = load(
        "job=evaluate", f"evaluate.prompts={path}", "evaluate.max_new_tokens=20", "run.name=mine", *overrides
    )
    return read_prompts(config, TEMPLATE, CONTEXT)


def read(tmp_path, *records, **settings):
    return [one.token_ids for one in read_with_categories(tmp_path, *records, **settings)]


def ids(*turns):
    return TEMPLATE.prompt_ids([Message(role, content) for role, content in turns])


def test_a_prompt_ends_with_the_last_user_turn(tmp_path):
    turns = [("user", "hello"), ("assistant", "hi"), ("user", "deep?")]
    record = {
        "messages": [{"role": role, "content": content} for role, content in [*turns, ("assistant", "yes")]]
    }
    assert read(tmp_path, record) == [ids(*turns)]


def test_of_user_turns_without_answers_the_first_one_is_asked(tmp_path):
    assert read(tmp_path, {"turns": ["hello", "shorter"]}, {"prompt": "bye"}) == [
        ids(("user", "hello")),
        ids(("user", "bye")),
    ]


def test_a_prompt_longer_than_the_context_is_a_broken_record(tmp_path, caplog):
    records = [{"prompt": "a" * 500}, {"prompt": "hello"}]
    with pytest.raises(DataError, match=r"prompts\.jsonl, line 1: the prompt must have at most 177 tokens"):
        read(tmp_path, *records)
    with caplog.at_level(logging.WARNING):
        assert read(tmp_path, *records, **{"data.on_error": "skip"}) == [ids(("user", "hello"))]
    assert "1 skipped (1 longer than the context)" in caplog.text
    with pytest.raises(DataError, match="must hold a usable prompt, got none; 1 skipped"):
        read(tmp_path, records[0], **{"data.on_error": "skip"})


def test_no_more_prompts_are_read_than_asked_for(tmp_path):
    assert (
        len(read(tmp_path, {"prompt": "a"}, {"prompt": "b"}, {"id": 1}, **{"evaluate.num_prompts": 2})) == 2
    )


def test_a_category_is_what_the_record_says_or_the_name_of_its_file(tmp_path):
    records = [
        {"turns": ["hello"], "category": "writing", "question_id": 81},
        {"problem": "hello", "solution": "hi", "answer": "h", "subject": "Algebra"},
        {"task_id": "HumanEval/0", "prompt": "hello", "canonical_solution": "hi", "entry_point": "f"},
    ]
    categories = [one.category for one in read_with_categories(tmp_path, *records)]
    assert categories == ["writing", "Algebra", "prompts"]

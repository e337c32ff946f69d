import logging

import pytest
import torch
from data_cases import turns, write_lines
from support.tiny_tokenizer import make_tiny_tokenizer

from eagle_rpc.config.choices import OnError, Overlong
from eagle_rpc.config.schema import DataConfig
from eagle_rpc.data import ChatDataset, ChatTemplate, Example, datasets_of, load_data
from eagle_rpc.data.token_cache import tokenised_source
from eagle_rpc.errors import DataError

TEMPLATE = ChatTemplate(make_tiny_tokenizer())


def write_chats(path, *chats):
    return write_lines(path, *({"messages": turns(*chat)} for chat in chats))


def many_chats(count):
    return [(f"question {number}", f"answer {number}") for number in range(count)]


def load(path, template=TEMPLATE, **options):
    source = tokenised_source(
        str(path), template, DataConfig(train_path=str(path), **options), cache_dir=path.parent / "cache"
    )
    return ChatDataset.of_stores([source.store], [1.0], max_length=options.get("max_length", 2048))


def contents(dataset):
    return {tuple(example.input_ids.tolist()) for example in dataset}


def supervised(example):
    return TEMPLATE.tokenizer.decode(example.input_ids[example.loss_mask])


def test_examples_are_the_chats_in_order(tmp_path):
    dataset = load(write_chats(tmp_path / "chats.jsonl", ("hello", "hi"), ("how are you", "fine")))
    assert [supervised(example) for example in dataset] == ["hi<|im_end|>", "fine<|im_end|>"]
    assert all(
        example.input_ids.dtype == torch.int64 and example.loss_mask.dtype == torch.bool
        for example in dataset
    )


def test_an_answer_that_breaks_off_is_not_taught_to_end(tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", {"messages": turns("hello", "hi and"), "truncated": True})
    assert supervised(load(path)[0]) == "hi and"


def test_a_long_chat_is_cut_to_the_limit(tmp_path, caplog):
    path = write_chats(tmp_path / "chats.jsonl", ("hello", "a" * 100), ("hello", "hi"))
    with caplog.at_level(logging.INFO):
        dataset = load(path, max_length=40)
    assert [len(example.input_ids) for example in dataset] == [40, len(load(path)[1].input_ids)]
    assert set(supervised(dataset[0])) == {"a"}
    assert dataset.max_length == 40
    assert "2 chats" in caplog.text
    assert "1 samples truncated to 40 tokens, 0 dropped as too long, none skipped" in caplog.text


def test_a_chat_of_exactly_the_limit_is_left_alone(tmp_path, caplog):
    path = write_chats(tmp_path / "chats.jsonl", ("hello", "hi"))
    with caplog.at_level(logging.INFO):
        dataset = load(path, max_length=len(load(path)[0].input_ids))
    assert supervised(dataset[0]) == "hi<|im_end|>"
    assert "1 samples truncated" not in caplog.text


@pytest.mark.parametrize(
    ("long_chat", "policy"),
    [(("hello", "a" * 100), Overlong.drop), (("a" * 100, "hi"), Overlong.truncate)],
    ids=["policy is to drop", "nothing supervised is left"],
)
def test_a_long_chat_is_dropped_and_counted(tmp_path, caplog, long_chat, policy):
    path = write_chats(tmp_path / "chats.jsonl", long_chat, ("hello", "hi"))
    with caplog.at_level(logging.INFO):
        dataset = load(path, max_length=40, overlong=policy)
    assert [supervised(example) for example in dataset] == ["hi<|im_end|>"]
    assert "0 samples truncated to 40 tokens, 1 dropped as too long" in caplog.text


def test_a_file_of_which_nothing_is_left_is_refused(tmp_path):
    path = write_chats(tmp_path / "chats.jsonl", ("hello", "a" * 100))
    with pytest.raises(
        DataError, match=r"chats\.jsonl must leave at least one chat, .* 1 dropped as too long"
    ):
        load(path, max_length=40, overlong=Overlong.drop)


def test_a_chat_that_the_template_cannot_supervise_is_named_or_skipped(tmp_path, caplog):
    silent = (
        "{% for message in messages %}{{ message['content'] }}{% generation %}{% endgeneration %}{% endfor %}"
    )
    shouting = silent.replace(
        "{% generation %}",
        "{% generation %}{{ '!' if message['role'] == 'assistant' and 'loud' in message['content'] }}",
    )
    template = ChatTemplate(make_tiny_tokenizer(shouting))
    path = write_chats(tmp_path / "chats.jsonl", ("hello", "loud"), ("hello", "quiet"), ("hello", "louder"))
    with pytest.raises(DataError, match=r"chats\.jsonl, line 2: the chat has no supervised token"):
        load(path, template)
    with caplog.at_level(logging.INFO):
        dataset = load(path, template, on_error=OnError.skip)
    assert len(dataset) == 2
    assert "1 skipped (1 without supervised token)" in caplog.text


def test_the_split_is_complete_and_does_not_depend_on_order(tmp_path):
    chats = many_chats(400)
    forwards = load(write_chats(tmp_path / "forwards.jsonl", *chats)).split(0.25)
    backwards = load(write_chats(tmp_path / "backwards.jsonl", *reversed(chats))).split(0.25)
    train, validation = map(contents, forwards)
    assert (train, validation) == tuple(map(contents, backwards))
    assert not train & validation
    assert len(train | validation) == 400
    assert 60 <= len(validation) <= 140


def test_more_data_leave_the_split_of_the_old_as_it_was(tmp_path):
    _, few = load(write_chats(tmp_path / "few.jsonl", *many_chats(200))).split(0.25)
    _, many = load(write_chats(tmp_path / "many.jsonl", *many_chats(400))).split(0.25)
    assert contents(few) < contents(many)


def test_equal_chats_are_on_the_same_side(tmp_path):
    train, validation = load(write_chats(tmp_path / "chats.jsonl", *many_chats(50), *many_chats(50))).split(
        0.5
    )
    assert len(train) + len(validation) == 100
    assert not contents(train) & contents(validation)


def test_a_small_share_of_few_chats_is_one_chat_and_no_share_is_none(tmp_path):
    dataset = load(write_chats(tmp_path / "chats.jsonl", *many_chats(5)))
    assert [len(part) for part in dataset.split(1e-9)] == [4, 1]
    assert [len(part) for part in dataset.split(0.0)] == [5, 0]


def test_a_split_that_leaves_nothing_to_train_on_is_refused(tmp_path):
    dataset = load(write_chats(tmp_path / "chats.jsonl", *many_chats(5)))
    with pytest.raises(DataError, match=r"data\.validation_share must leave chats to train on, got 0\.9999"):
        dataset.split(0.9999)


def test_a_validation_file_replaces_the_split(tmp_path):
    train_path = write_chats(tmp_path / "train.jsonl", *many_chats(50))
    validation_path = write_chats(tmp_path / "validation.jsonl", ("hello", "hi"))
    config = DataConfig(train_path=str(train_path), validation_share=0.5)
    data = load_data(config, TEMPLATE, cache_dir=tmp_path)
    assert sum(map(len, datasets_of(config, data))) == 50
    config.validation_path = str(validation_path)
    train, validation = datasets_of(config, load_data(config, TEMPLATE, cache_dir=tmp_path))
    assert (len(train), [supervised(example) for example in validation]) == (50, ["hi<|im_end|>"])


def test_the_digest_sees_tokens_masks_and_order(tmp_path):
    digests = {
        load(write_chats(tmp_path / f"{number}.jsonl", *chats)).digest
        for number, chats in enumerate(
            ([("a", "b"), ("c", "d")], [("c", "d"), ("a", "b")], [("a", "b")], [("a", "x")])
        )
    }
    assert len(digests) == 4
    assert load(tmp_path / "0.jsonl").digest in digests
    ids = torch.arange(5)
    examples = [Example(ids, ids > 2), Example(ids, ids > 3)]
    assert len({ChatDataset([one], max_length=9).digest for one in examples}) == 2

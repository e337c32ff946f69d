import json
import logging

import pytest
from data_cases import FORMS, TOOL, turns, write_lines
from hypothesis import given
from hypothesis import strategies as st

from eagle_rpc.config.choices import OnError
from eagle_rpc.data import Chat, KeptAnswer, Message, parse_chat, read_chats
from eagle_rpc.data.problems import RecordProblem
from eagle_rpc.errors import DataError

GOOD = {"messages": turns("hello", "hi")}
HELLO = [Message("user", "hello"), Message("assistant", "hi")]
PLACE = "chats.jsonl, line 3"
IDS = {"input_ids": [5, 6, 7, 8], "loss_mask": [0, 0, 1, 1]}
CALL = {"id": "1", "type": "function", "function": {"name": "now", "arguments": '{"zone": null}'}}
PARSED_CALL = {**CALL, "function": {"name": "now", "arguments": {"zone": None}}}
KEPT = {
    **GOOD,
    "answers": [{"prompt_ids": [5, 6], "answer_ids": [7, 2], "truncated": False}],
    "tokenizer": "abc",
    "prompt": "0" * 64,
    "settings": {"temperature": 0},
}


def messages_of(record: object) -> list[Message]:
    return parse_chat(record, PLACE).messages


def answer_with(**keys: object) -> dict[str, object]:
    """A record whose only answer has further keys."""
    return {"messages": [*turns("hello"), {"role": "assistant", "content": "hi", **keys}]}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_gives_the_same_chat(form):
    assert parse_chat(FORMS[form], PLACE) == Chat(HELLO, PLACE)


@pytest.mark.parametrize(
    ("record", "questions"),
    [
        ({"prompt": "hello"}, ["hello"]),
        ({"prompt": turns("hello")}, ["hello"]),
        ({"question_id": 1, "category": "writing", "turns": ["hello", "shorter"]}, ["hello", "shorter"]),
        ({"instruction": "add", "input": "1 and 2"}, ["add\n\n1 and 2"]),
        ({"instruction": "add", "context": "1 and 2"}, ["add\n\n1 and 2"]),
    ],
)
def test_questions_without_answers_are_prompts(tmp_path, record, questions):
    path = write_lines(tmp_path / "prompts.jsonl", record)
    (chat,) = read_chats(path, on_error=OnError.fail, needed_role="user").chats
    assert chat.messages == [Message("user", text) for text in questions]
    with pytest.raises(DataError, match=r"no assistant turn: let the target answer first \(job=regenerate\)"):
        read_chats(path, on_error=OnError.fail)


@pytest.mark.parametrize("key", ["system", "system_prompt"])
@pytest.mark.parametrize("form", FORMS)
def test_the_system_text_of_a_record_comes_first(form, key):
    assert messages_of({**FORMS[form], key: "be brief"}) == [Message("system", "be brief"), *HELLO]


def test_two_system_texts_must_be_equal():
    record = {"messages": [{"role": "system", "content": "be brief"}, *turns("hello", "hi")]}
    assert messages_of({**record, "system": "be brief"}) == messages_of(record)
    with pytest.raises(RecordProblem, match="has system beside another system text"):
        messages_of({**record, "system": "be long"})


@pytest.mark.parametrize(
    ("name", "role"),
    [
        ("developer", "developer"),
        ("Human", "user"),
        ("chatgpt", "assistant"),
        ("observation", "tool"),
        ("tool", "tool"),
        ("function", "tool"),
    ],
)
def test_roles_have_their_usual_names(name, role):
    record = {"messages": [*turns("hello", "hi"), {"role": name, "content": "x"}]}
    assert messages_of(record)[-1].role == role


@pytest.mark.parametrize("key", ["reasoning_content", "reasoning", "thinking"])
def test_a_thought_is_kept_apart_from_the_content(key):
    assert messages_of(answer_with(**{key: "count"}))[-1] == Message("assistant", "hi", thought="count")
    assert messages_of(answer_with(**{key: ""}))[-1].thought is None


def test_equal_thoughts_under_two_keys_are_one_and_different_ones_are_refused():
    assert messages_of(answer_with(reasoning="count", reasoning_content="count"))[-1].thought == "count"
    with pytest.raises(
        RecordProblem, match="message 2 has the keys reasoning_content and reasoning, which differ"
    ):
        messages_of(answer_with(reasoning="count", reasoning_content="sum"))


@pytest.mark.parametrize("keys", [{"weight": 0}, {"weight": 0.0}, {"train": False}, {"train_on_turn": False}])
def test_an_answer_may_be_excluded_from_supervision(keys):
    assert not messages_of(answer_with(**keys))[-1].supervised


@pytest.mark.parametrize("keys", [{"weight": 1}, {"weight": None}, {"train": True}, {"train_on_turn": True}])
def test_an_answer_is_supervised_unless_it_says_otherwise(keys):
    assert messages_of(answer_with(**keys))[-1].supervised


def test_a_user_turn_may_be_unsupervised_only():
    record = {"messages": [{"role": "user", "content": "hello", "train": False}, *turns("hello", "hi")[1:]]}
    assert [message.role for message in messages_of(record)] == ["user", "assistant"]
    record["messages"][0]["train"] = True
    with pytest.raises(RecordProblem, match=r"train of message 1 \(user\) must be false or absent"):
        messages_of(record)


@pytest.mark.parametrize(
    "turn",
    [
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "tool_calls": json.dumps([CALL])},
        {"from": "function_call", "value": '{"name": "now", "arguments": {"zone": null}}'},
    ],
)
def test_tool_calls_have_arguments_as_objects(turn):
    record = {"messages": [*turns("hello"), turn, {"role": "tool", "tool_call_id": "1", "content": ""}]}
    call, result = messages_of(record)[1:]
    assert (call.role, call.content) == ("assistant", "")
    (called,) = call.tool_calls
    assert called["function"]["name"] == "now"
    assert result == Message("tool", "", others={"tool_call_id": "1"})


def test_arguments_in_json_keep_their_nulls_and_a_union_of_columns_adds_none():
    assert messages_of(answer_with(tool_calls=[CALL]))[-1].tool_calls == [PARSED_CALL]
    union = {"name": "now", "arguments": {"zone": None, "day": "today"}}
    (call,) = messages_of(answer_with(tool_calls=[{"id": None, "type": "function", "function": union}]))[
        -1
    ].tool_calls
    assert call == {"type": "function", "function": {"name": "now", "arguments": {"day": "today"}}}


@pytest.mark.parametrize("tools", [[TOOL], json.dumps([TOOL]), [TOOL["function"]]])
def test_tools_are_read_as_list_and_as_json(tools):
    assert parse_chat({**GOOD, "tools": tools}, PLACE).tools == [TOOL]


@pytest.mark.parametrize("tools", [None, [], "[]"])
def test_no_tools_are_no_tools(tools):
    assert parse_chat({**GOOD, "tools": tools}, PLACE).tools == []


def test_nulls_of_a_union_are_absent_from_tools():
    union = {"type": "function", "function": {"name": "now", "parameters": {"a": None, "default": None}}}
    (tool,) = parse_chat({**GOOD, "tools": [union]}, PLACE).tools
    assert tool["function"]["parameters"] == {"default": None}


def test_keys_of_a_turn_that_are_not_known_go_to_the_template():
    assert messages_of(answer_with(name="Ann", mood=None))[-1].others == {"name": "Ann"}


@pytest.mark.parametrize(
    "masked",
    [
        {"loss_mask": [0, 0, 1, 1]},
        {"loss_mask": [False, False, True, True]},
        {"labels": [-100, -100, 7, 8]},
        {"assistant_masks": [0, 0, 1, 1]},
        {"loss_mask": [0, 0, 1, 1], "labels": [-100, -100, 7, 8], "attention_mask": [1, 1, 1, 1]},
    ],
)
def test_a_tokenised_record_keeps_its_ids_and_mask(masked):
    chat = parse_chat({"input_ids": [5, 6, 7, 8], **masked}, PLACE)
    assert chat.tokens == ([5, 6, 7, 8], [False, False, True, True])


def test_padding_of_a_tokenised_record_is_left_out():
    record = {"input_ids": [5, 6, 7, 0], "loss_mask": [0, 0, 1, 0], "attention_mask": [1, 1, 1, 0]}
    assert parse_chat(record, PLACE).tokens == ([5, 6, 7], [False, False, True])


def test_tokenised_records_can_be_trained_on_and_not_asked(tmp_path):
    path = write_lines(tmp_path / "ids.jsonl", IDS)
    assert len(read_chats(path, on_error=OnError.fail).chats) == 1
    with pytest.raises(DataError, match="no user turn"):
        read_chats(path, on_error=OnError.fail, needed_role="user")


def test_kept_answers_come_with_the_fingerprint_of_their_tokenizer():
    chat = parse_chat(KEPT, PLACE)
    assert (chat.answers, chat.tokenizer) == ([KeptAnswer([5, 6], [7, 2])], "abc")
    assert chat.messages == HELLO


def test_a_kept_answer_may_have_no_text():
    record = {**KEPT, "messages": turns("hello", "")}
    assert parse_chat(record, PLACE).messages[1] == Message("assistant", "")


@pytest.mark.parametrize(("mark", "truncated"), [(True, True), (False, False), (None, False)])
def test_a_record_says_whether_its_last_answer_is_truncated(mark, truncated):
    assert parse_chat({**GOOD, "truncated": mark}, PLACE).truncated is truncated


REFUSED = {
    "not an object": ([1], "a record must be an object"),
    "rendered": ({"text": "<|im_start|>user\nhello"}, "a whole text .* give the chats before rendering"),
    "no form": ({"id": 1}, "must have one of messages, .*, got the keys"),
    "messages not a list": ({"messages": "hello"}, "messages must be a list of turns, got 'hello'"),
    "no message": ({"messages": []}, "the conversation is empty"),
    "message not an object": ({"messages": ["hello"]}, "message 1 must be an object"),
    "no role": ({"messages": [{"content": "hello"}]}, "message 1 must have a role out of"),
    "unknown role": (
        {"messages": [*turns("hello"), {"role": "robot", "content": "hi"}]},
        "message 2 must have a role out of system, .*, got 'robot'",
    ),
    "role not a string": (
        {"messages": [{"role": ["user"], "content": "hello"}]},
        "message 1 must have a role",
    ),
    "roles that differ": (
        {"messages": [{"role": "user", "from": "gpt", "content": "hello"}]},
        "role and from",
    ),
    "contents that differ": (
        {"messages": [{"role": "user", "content": "a", "value": "b"}]},
        "content and value",
    ),
    "content not a text": (
        {"messages": [{"role": "user", "content": 3}]},
        "content of message 1 must be a text",
    ),
    "content null": (
        {"messages": [*turns("hello"), {"role": "assistant", "content": None}]},
        "message 2 .* is empty",
    ),
    "content blank": ({"messages": turns("hello", " \n")}, "message 2 .* is empty"),
    "a thought alone": (
        {"messages": [*turns("hello"), {"role": "assistant", "content": "", "reasoning": "count"}]},
        "message 2 .* is empty but for its thought",
    ),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "parts of text alone, got a part of type 'image_url'",
    ),
    "a call of the user": (
        {"messages": [{**turns("hello")[0], "tool_calls": [CALL]}]},
        "message 1 .* must not call",
    ),
    "a call without function": (
        answer_with(tool_calls=[{"id": 1}]),
        "tool_calls of message 2 must name a function",
    ),
    "arguments not an object": (
        answer_with(tool_calls=[{"function": {"name": "now", "arguments": "noon"}}]),
        "must have a JSON object as arguments, got 'noon'",
    ),
    "half a surrogate pair": (
        {"messages": turns("hello", "\ud800")},
        "message 2 holds half of a surrogate pair",
    ),
    "half of one in a call": (
        answer_with(tool_calls=[{"function": {"name": "now", "arguments": {"a": "\ud800"}}}]),
        "message 2 holds half of a surrogate pair",
    ),
    "a system turn alone": (
        {"messages": [{"role": "system", "content": "be brief"}]},
        "no turn but the system's",
    ),
    "assistant first": ({"messages": turns("hello", "hi")[1:]}, "the user must speak first, got assistant"),
    "different chats": (
        {"messages": turns("hello", "hi"), "conversations": turns("hello", "ho")},
        "different chats under messages and conversations",
    ),
    "different thoughts": (
        {"messages": turns("hello", "hi"), "conversations": answer_with(thinking="count")["messages"]},
        "different chats under messages and conversations",
    ),
    "another prompt": ({**GOOD, "prompt": "bye"}, "different chats under messages and prompt"),
    "two answers": (
        {"prompt": "hello", "completion": "hi", "response": "ho"},
        "different answers under completion",
    ),
    "weight": (answer_with(weight=0.5), "weight of message 2 must be 0 or 1, got 0.5"),
    "train": (answer_with(train="no"), "train of message 2 must be true or false, got 'no'"),
    "truncated": ({**GOOD, "truncated": "no"}, "truncated must be true or false, got 'no'"),
    "tools": ({**GOOD, "tools": "now"}, "tools must be a list of objects, got 'now'"),
    "ids without mask": ({"input_ids": [1, 2]}, "input_ids must come with loss_mask or labels"),
    "ids not numbers": ({**IDS, "input_ids": [5, "6", 7, 8]}, "input_ids must be a list of token ids"),
    "ids that are truths": ({**IDS, "input_ids": [5, True, 7, 8]}, "input_ids must be a list of token ids"),
    "ids below 0": ({**IDS, "input_ids": [5, -1, 7, 8]}, "input_ids must be a list of token ids"),
    "mask too short": ({**IDS, "loss_mask": [0, 1]}, "loss_mask must be as long as input_ids, 4, got 2"),
    "mask of other numbers": ({**IDS, "loss_mask": [0, 0, 2, 1]}, "loss_mask must be a list of 0 and 1"),
    "nothing supervised": ({**IDS, "loss_mask": [1, 0, 0, 0]}, "must mark a token after the first one"),
    "other labels": ({"input_ids": [5, 6], "labels": [-100, 7]}, "got 7 at position 1 beside 6"),
    "masks that differ": ({**IDS, "labels": [-100, 6, 7, 8]}, "loss_mask and labels must agree"),
    "too few answers": ({**KEPT, "messages": turns("a", "b", "c", "d")}, "each of 2 assistant turns, got 1"),
    "answers of another kind": ({**GOOD, "answers": ["hi"]}, "answers must be a list of objects"),
    "answers without tokenizer": ({**KEPT, "tokenizer": None}, "tokenizer must name the fingerprint"),
    "an answer without ids": ({**KEPT, "answers": [{"prompt_ids": [1]}]}, "answer_ids of answer 1 must be"),
}


@pytest.mark.parametrize(("record", "message"), REFUSED.values(), ids=REFUSED)
def test_a_broken_record_is_refused_with_its_fault(record, message):
    with pytest.raises(RecordProblem, match=message):
        parse_chat(record, PLACE)


@pytest.mark.parametrize(
    "key",
    "functions images audio videos documents chosen rejected labels context input history "
    "assistant_mask loss loss_weight reasoning chat_template_kwargs train".split(),
)
def test_a_key_that_would_change_the_meaning_is_refused_by_name(key):
    with pytest.raises(RecordProblem, match=f"has {key} .* is not read"):
        parse_chat({**GOOD, key: [0, 1]}, PLACE)
    for absent in (None, [], "", {}):
        assert parse_chat({**GOOD, key: absent}, PLACE) == Chat(HELLO, PLACE)


@pytest.mark.parametrize(
    ("key", "value"), [("weight", 0), ("weight", 0.5), ("train", False), ("label", False)]
)
def test_a_record_that_must_not_be_learnt_as_it_is_is_refused(key, value):
    with pytest.raises(RecordProblem, match=f"has {key} {value}"):
        parse_chat({**GOOD, key: value}, PLACE)
    assert parse_chat({**GOOD, key: type(value)(1)}, PLACE) == Chat(HELLO, PLACE)


@given(
    key=st.text(min_size=1).filter(lambda key: key.isascii() and not key.isidentifier()),
    value=st.one_of(st.none(), st.booleans(), st.integers(), st.text(), st.lists(st.integers())),
)
def test_metadata_change_nothing(key, value):
    assert parse_chat({**GOOD, key: value}, PLACE) == Chat(HELLO, PLACE)


def test_keys_that_are_not_read_are_reported_once_for_a_file(tmp_path, caplog):
    path = write_lines(tmp_path / "chats.jsonl", *[{**GOOD, "id": 1, "level": "x"}] * 3, KEPT)
    with caplog.at_level(logging.INFO):
        read_chats(path, on_error=OnError.fail)
    assert [record.getMessage() for record in caplog.records] == [f"{path}: not read: id, level"]


def test_an_error_names_the_place_and_the_way_out(tmp_path):
    path = write_lines(tmp_path / "chats.jsonl", GOOD, "", {"id": 1}, GOOD)
    with pytest.raises(DataError, match=r"chats\.jsonl, line 3: a record must have .*on_error=skip"):
        read_chats(path, on_error=OnError.fail)


def test_skipping_counts_every_broken_record_and_says_so_once(tmp_path, caplog):
    records = [record for record, _ in REFUSED.values()]
    path = write_lines(tmp_path / "chats.jsonl", *records, "{", b'{"messages": "\xff"}', "[" * 100_000, GOOD)
    with caplog.at_level(logging.WARNING):
        file = read_chats(path, on_error=OnError.skip)
    assert [chat.messages for chat in file.chats] == [HELLO]
    assert file.skipped.total() == len(records) + 3
    assert (file.skipped["not JSON"], file.skipped["not UTF-8"]) == (2, 1)
    assert len(caplog.records) == 1
    assert f"{len(records) + 3} skipped" in caplog.text


def test_a_file_without_a_usable_chat_is_refused_even_when_skipping(tmp_path):
    with pytest.raises(DataError, match=r"at least one usable chat, got none; 1 skipped \(1 not JSON\)"):
        read_chats(write_lines(tmp_path / "broken.jsonl", "{"), on_error=OnError.skip)
    with pytest.raises(DataError, match="got none; none skipped"):
        read_chats(write_lines(tmp_path / "none.json", "[]"), on_error=OnError.skip)

import json
import logging

import pytest
from data_cases import turns, write_lines

from eagle_rpc.config.choices import OnError
from eagle_rpc.data import Chat, ChatWriter, Message, content_hash, read_chats
from eagle_rpc.errors import DataError

GOOD = {"messages": turns("hello", "hi")}
HELLO = [Message("user", "hello"), Message("assistant", "hi")]


def test_messages_and_both_spellings_of_conversations_read_alike(tmp_path):
    sharegpt = {"conversations": [{"from": "human", "value": "hello"}, {"from": "gpt", "value": "hi"}]}
    path = write_lines(tmp_path / "chats.jsonl", GOOD, "", sharegpt, {"conversations": turns("hello", "hi")})
    file = read_chats(path, on_error=OnError.fail)
    assert file.chats == [Chat(HELLO, f"{path}, line {line}") for line in (1, 3, 4)]
    assert not file.skipped


def test_a_system_turn_may_come_first_and_the_last_line_needs_no_end(tmp_path):
    record = {"messages": [{"role": "system", "content": "be brief"}, *turns("hello", "hi")]}
    path = tmp_path / "chats.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(record).encode())
    assert read_chats(path, on_error=OnError.fail).chats == [
        Chat([Message("system", "be brief"), *HELLO], f"{path}, line 1")
    ]


def test_only_a_true_mark_makes_a_chat_truncated(tmp_path):
    path = write_lines(
        tmp_path / "chats.jsonl", *({**GOOD, "truncated": mark} for mark in (True, False, None, "no")), GOOD
    )
    assert [chat.truncated for chat in read_chats(path, on_error=OnError.fail).chats] == [
        True,
        False,
        False,
        False,
        False,
    ]


BROKEN = {
    "not JSON": '{"messages": [',
    "not UTF-8": b'{"messages": "\xff"}',
    "nested without end": "[" * 100_000,
    "not an object": [1],
    "no messages": {"text": "hello"},
    "messages not a list": {"messages": "hello"},
    "no message": {"messages": []},
    "message not an object": {"messages": ["hello"]},
    "no role": {"messages": [{"content": "hello"}]},
    "unknown role": {"messages": [{"role": "tool", "content": "hello"}]},
    "role not a string": {"messages": [{"role": ["user"], "content": "hello"}]},
    "content not a string": {"messages": [*turns("hello"), {"role": "assistant", "content": None}]},
    "content empty": {"messages": turns("hello", " \n")},
    "half a surrogate pair": '{"messages": [{"role": "user", "content": "\\ud800"}, '
    '{"role": "assistant", "content": "hi"}]}',
    "tool calls": {
        "messages": [*turns("hello"), {"role": "assistant", "content": "hi", "tool_calls": [{"id": 1}]}]
    },
    "no assistant": {"messages": turns("hello")},
    "only a system turn": {"messages": [{"role": "system", "content": "be brief"}]},
    "assistant first": {"messages": [{"role": "assistant", "content": "hi"}, *turns("hello", "hi")]},
}


@pytest.mark.parametrize("record", BROKEN.values(), ids=BROKEN)
def test_a_broken_record_is_refused_with_file_and_line(tmp_path, record):
    path = write_lines(tmp_path / "chats.jsonl", GOOD, record, GOOD)
    with pytest.raises(DataError, match=r"chats\.jsonl, line 2: .*on_error=skip"):
        read_chats(path, on_error=OnError.fail)


def test_the_fault_is_named_with_its_value(tmp_path):
    path = write_lines(
        tmp_path / "chats.jsonl", {"messages": [*turns("hello"), {"role": "robot", "content": "hi"}]}
    )
    with pytest.raises(DataError, match=r"message 2 must have a role out of system, user, .*, got 'robot'"):
        read_chats(path, on_error=OnError.fail)


def test_skipping_counts_every_broken_record_and_says_so_once(tmp_path, caplog):
    path = write_lines(tmp_path / "chats.jsonl", *BROKEN.values(), GOOD)
    with caplog.at_level(logging.INFO):
        file = read_chats(path, on_error=OnError.skip)
    assert file.chats == [Chat(HELLO, f"{path}, line {len(BROKEN) + 1}")]
    assert file.skipped.total() == len(BROKEN)
    assert (file.skipped["not JSON"], file.skipped["not UTF-8"]) == (2, 1)
    assert len(caplog.records) == 1
    assert f"{len(BROKEN)} skipped" in caplog.text


def test_a_line_over_the_limit_is_refused_and_does_not_shift_the_count(tmp_path, monkeypatch):
    monkeypatch.setattr("eagle_rpc.data.sources.MAX_RECORD_BYTES", 200)
    path = write_lines(tmp_path / "chats.jsonl", {"messages": turns("a" * 1000, "hi")}, GOOD)
    file = read_chats(path, on_error=OnError.skip)
    assert file.chats == [Chat(HELLO, f"{path}, line 2")]
    assert file.skipped == {"too long": 1}
    with pytest.raises(DataError, match="line 1: the line must have at most 200 bytes"):
        read_chats(path, on_error=OnError.fail)


def test_prompts_need_a_user_turn_only(tmp_path):
    path = write_lines(tmp_path / "prompts.jsonl", {"messages": turns("hello")})
    assert read_chats(path, on_error=OnError.fail, needed_role="user").chats == [
        Chat(HELLO[:1], f"{path}, line 1")
    ]


@pytest.mark.parametrize("name", ["absent.jsonl", "."])
def test_a_file_that_cannot_be_read_is_named(tmp_path, name):
    with pytest.raises(DataError, match=r"must be a (file of chats|directory with files of chats)"):
        read_chats(tmp_path / name, on_error=OnError.skip)


def test_a_file_without_a_usable_chat_is_refused_even_when_skipping(tmp_path):
    with pytest.raises(DataError, match="got none; none skipped"):
        read_chats(write_lines(tmp_path / "empty.jsonl"), on_error=OnError.skip)
    with pytest.raises(DataError, match=r"got none; 1 skipped \(1 not JSON\)"):
        read_chats(write_lines(tmp_path / "broken.jsonl", "{]"), on_error=OnError.skip)


def test_written_chats_are_read_back_and_appended_to(tmp_path):
    path = tmp_path / "new" / "answers.jsonl"
    strange = [Message("user", "line\u2028break \U0001f600"), Message("assistant", 'quote " and\nnewline')]
    with ChatWriter(path) as writer:
        writer.write(HELLO, model="tiny")
    with ChatWriter(path) as writer:
        writer.write(strange)
    assert [chat.messages for chat in read_chats(path, on_error=OnError.fail).chats] == [HELLO, strange]
    assert json.loads(path.read_text().splitlines()[0])["model"] == "tiny"


def test_a_written_chat_can_be_read_before_the_writer_closes(tmp_path):
    with ChatWriter(tmp_path / "answers.jsonl") as writer:
        writer.write(HELLO)
        assert len(read_chats(tmp_path / "answers.jsonl", on_error=OnError.fail).chats) == 1


@pytest.mark.parametrize("whole_lines", [0, 2])
def test_a_line_that_was_cut_short_is_removed_before_appending(tmp_path, whole_lines):
    path = write_lines(tmp_path / "answers.jsonl", *[GOOD] * whole_lines)
    with path.open("ab") as file:
        file.write(b'{"messages": [{"role": "us')
    with ChatWriter(path) as writer:
        writer.write(HELLO)
    assert len(read_chats(path, on_error=OnError.fail).chats) == whole_lines + 1


def test_the_content_hash_depends_on_roles_and_contents_alone():
    assert content_hash(HELLO) == content_hash(
        tuple(Message(message.role, message.content) for message in HELLO)
    )
    assert content_hash(HELLO) != content_hash([Message("user", "hello"), Message("user", "hi")])
    assert content_hash([Message("user", "ab")]) != content_hash([Message("user", "a"), Message("user", "b")])

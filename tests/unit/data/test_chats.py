import json

import pytest
from data_cases import turns, write_lines

from eagle_rpc.config.choices import OnError
from eagle_rpc.data import ChatWriter, Message, content_hash, read_chats

GOOD = {"messages": turns("hello", "hi")}
HELLO = [Message("user", "hello"), Message("assistant", "hi")]


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

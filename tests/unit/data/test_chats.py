import pytest

from eagle_rpc.data import Message, content_hash

HELLO = [Message("user", "hello"), Message("assistant", "hi")]
TOOL = {"type": "function", "function": {"name": "weather"}}


def test_equal_chats_have_equal_hashes():
    assert content_hash(HELLO) == content_hash([Message("user", "hello"), Message("assistant", "hi")])


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([Message("user", "hello"), Message("user", "hi")], []),
        ([Message("user", "hell"), Message("assistant", "ohi")], []),
        ([HELLO[0], Message("assistant", "hi", thought="Greet.")], []),
        ([HELLO[0], Message("assistant", "hi", tool_calls=[TOOL])], []),
        ([Message("user", "hello", others={"name": "Ann"}), HELLO[1]], []),
        (HELLO, [TOOL]),
    ],
    ids=["role", "border", "thought", "calls", "name", "tools"],
)
def test_chats_that_a_template_may_render_otherwise_have_other_hashes(messages, tools):
    assert content_hash(messages, tools) != content_hash(HELLO)

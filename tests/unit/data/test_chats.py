from eagle_rpc.data import Message, content_hash

HELLO = [Message("user", "hello"), Message("assistant", "hi")]


def test_the_content_hash_depends_on_roles_and_contents_alone():
    assert content_hash(HELLO) == content_hash(
        tuple(Message(message.role, message.content) for message in HELLO)
    )
    assert content_hash(HELLO) != content_hash([Message("user", "hello"), Message("user", "hi")])
    assert content_hash([Message("user", "ab")]) != content_hash([Message("user", "a"), Message("user", "b")])

"""A record of a data file as a chat."""

from typing import Any

from eagle_rpc.data.chats import Chat, Message
from eagle_rpc.data.problems import RecordProblem

FORM_KEYS = frozenset({"messages", "conversations"})

_ROLES = {
    "system": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
}


def parse_chat(record: Any, place: str, needed_role: str = "assistant") -> Chat:
    if isinstance(record, RecordProblem):
        raise record
    if not isinstance(record, dict):
        raise RecordProblem(f"a record must be an object, got {_show(record)}", kind="of a wrong type")
    messages = _messages(record)
    if all(message.role != needed_role for message in messages):
        raise RecordProblem(f"the chat has no {needed_role} turn", kind=f"without {needed_role} turn")
    return Chat(messages, place, truncated=record.get("truncated") is True)


def _messages(record: dict[str, Any]) -> list[Message]:
    turns = record.get("messages", record.get("conversations"))
    if turns is None:
        raise RecordProblem(
            f"a record must have messages or conversations, got the keys {_show(list(record))}",
            kind="without messages",
        )
    if not isinstance(turns, list):
        raise RecordProblem(f"the messages must be a list, got {_show(turns)}", kind="of a wrong type")
    if not turns:
        raise RecordProblem("the conversation is empty", kind="empty")
    messages = [_parse_turn(turn, number) for number, turn in enumerate(turns, start=1)]
    spoken = [message for message in messages if message.role != "system"]
    if not spoken or spoken[0].role != "user":
        first = spoken[0].role if spoken else "no turn but the system's"
        raise RecordProblem(f"the user must speak first, got {first}", kind="not begun by the user")
    return messages


def _parse_turn(turn: Any, number: int) -> Message:
    if not isinstance(turn, dict):
        raise RecordProblem(f"message {number} must be an object, got {_show(turn)}", kind="of a wrong type")
    role_key, content_key = ("from", "value") if "from" in turn else ("role", "content")
    name, content = turn.get(role_key), turn.get(content_key)
    if not isinstance(name, str) or name not in _ROLES:
        raise RecordProblem(
            f"message {number} must have a {role_key} out of {', '.join(_ROLES)}, got {_show(name)}",
            kind="with an unknown role",
        )
    if turn.get("tool_calls"):
        raise RecordProblem(
            f"message {number} must not have tool_calls, which chats here cannot carry",
            kind="with tool calls",
        )
    if not isinstance(content, str):
        raise RecordProblem(
            f"message {number} must have a string as {content_key}, got {_show(content)}",
            kind="of a wrong type",
        )
    if not content.strip():
        raise RecordProblem(f"message {number} ({name}) is empty", kind="with an empty message")
    try:
        content.encode()
    except UnicodeEncodeError as error:
        raise RecordProblem(
            f"message {number} holds half of a surrogate pair at character {error.start}", kind="not Unicode"
        ) from error
    return Message(_ROLES[name], content)


def _show(value: Any) -> str:
    """A value for an error message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""Chat files: JSON lines, one chat each.

A record holds its turns under `messages` or `conversations`. A turn is `{"role", "content"}` or ShareGPT's
`{"from", "value"}`. `"truncated": true` in a record says that its last answer is incomplete. Other keys are
ignored.
"""

import hashlib
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from eagle_rpc.config.choices import OnError
from eagle_rpc.data.problems import RecordProblem, RecordProblems, describe
from eagle_rpc.errors import DataError

logger = logging.getLogger(__name__)

# Enough for a chat of a million tokens; a file without line ends cannot fill the memory.
MAX_LINE_BYTES = 16 * 2**20

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


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: str  # system, user, assistant or tool
    content: str  # empty if an assistant's turn only calls tools
    thought: str | None = None  # the reasoning before an assistant's content, without the template's marks
    tool_calls: list[dict[str, Any]] = field(default_factory=list)
    others: dict[str, Any] = field(default_factory=dict)  # further keys for the template: name, tool_call_id
    supervised: bool = True  # of an assistant's turn: whether the draft learns from it


@dataclass(frozen=True, slots=True)
class KeptAnswer:
    """An answer as token ids: what the target was asked and what it said."""

    prompt_ids: list[int]
    answer_ids: list[int]  # with the token that ended it, unless it was truncated
    truncated: bool = False  # it reached a limit of tokens


@dataclass(frozen=True, slots=True)
class Chat:
    """One record: an optional system turn, then turns that the user begins.

    `answers` or `tokens` take the place of a rendering of `messages` where the record has token ids.
    """

    messages: list[Message]
    line: int  # counted from 1
    truncated: bool = False  # whether the last answer ended at a limit of tokens
    tools: list[dict[str, Any]] = field(default_factory=list)  # descriptions of functions
    answers: list[KeptAnswer] = field(default_factory=list)  # of each assistant turn, kept by regeneration
    tokens: tuple[list[int], list[bool]] | None = None  # ids and loss mask of a record without messages


@dataclass(frozen=True, slots=True)
class ChatFile:
    """The usable chats of a file, in the order of the file."""

    path: Path
    chats: list[Chat]
    skipped: Counter[str]  # records left out, by kind of fault


def read_chats(path: str | Path, *, on_error: OnError, needed_role: str = "assistant") -> ChatFile:
    """Reads and checks all chats; each must have a turn of `needed_role` (`user` suffices for prompts).

    Raises `DataError` naming file, line and fault for the first broken record unless `on_error` is skip, and
    for a file that cannot be read or has no usable chat. Blank lines are ignored.
    """
    path = Path(path)
    problems = RecordProblems(path, on_error)
    chats = []
    for line, raw in _numbered_lines(path):
        with problems.record(line):
            record = _parse(raw)
            messages = _messages(record)
            if all(message.role != needed_role for message in messages):
                raise RecordProblem(f"the chat has no {needed_role} turn", kind=f"without {needed_role} turn")
            chats.append(Chat(messages, line, truncated=record.get("truncated") is True))
    if not chats:
        raise DataError(f"{path} must hold at least one usable chat, got none; {describe(problems.skipped)}")
    if problems.skipped:
        logger.warning("%s: %d usable chats, %s", path, len(chats), describe(problems.skipped))
    return ChatFile(path, chats, problems.skipped)


def content_hash(messages: Sequence[Message]) -> str:
    """Hash of roles and contents, equal for equal chats."""
    content = json.dumps([[message.role, message.content] for message in messages])
    return hashlib.sha256(content.encode()).hexdigest()


class ChatWriter:
    """Appends chats to a file; the operating system has a chat's whole line when `write` returns.

    Opening removes an incomplete last line, which a killed process may have left, so that the file can be
    continued.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("ab+")
        self._file.truncate(self._end_of_last_whole_line())

    def write(self, messages: Sequence[Message], **extra: Any) -> None:
        """Appends `{"messages": [...], **extra}`; `extra` must be JSON."""
        record = {
            "messages": [{"role": message.role, "content": message.content} for message in messages],
            **extra,
        }
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def __enter__(self) -> "ChatWriter":
        return self

    def __exit__(self, *exception: object) -> None:
        self._file.close()

    def _end_of_last_whole_line(self) -> int:
        size = self._file.seek(0, 2)
        start = max(0, size - MAX_LINE_BYTES)
        self._file.seek(start)
        return start + self._file.read().rfind(b"\n") + 1


def _numbered_lines(path: Path) -> Iterator[tuple[int, bytes]]:
    """Numbers (from 1) and contents of lines that are not blank, cut to just over `MAX_LINE_BYTES`."""
    try:
        with path.open("rb") as file:
            number = 0
            while raw := file.readline(MAX_LINE_BYTES + 1):
                number += 1
                rest = raw
                while len(rest) > MAX_LINE_BYTES and not rest.endswith(b"\n"):
                    rest = file.readline(MAX_LINE_BYTES + 1)
                if raw.strip():
                    yield number, raw
    except OSError as error:
        raise DataError(f"{path} must be a readable file of chats, got: {error.strerror}") from error


def _parse(raw: bytes) -> dict[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise RecordProblem(f"the line must have at most {MAX_LINE_BYTES} bytes", kind="too long")
    try:
        # Some editors begin a file with a byte order mark.
        record = json.loads(raw.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:
        raise RecordProblem(f"the line is not JSON: {error}", kind="not JSON") from error
    if not isinstance(record, dict):
        raise RecordProblem(f"a record must be an object, got {_show(record)}", kind="of a wrong type")
    return record


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

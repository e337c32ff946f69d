"""Chats, and the file that regeneration appends chats to."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# Enough for a chat of a million tokens; a file without line ends cannot fill the memory.
MAX_LINE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Message:
    """One turn."""

    role: str  # system, developer, user, assistant or tool
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
    place: str  # as in "chats.jsonl, line 3"
    truncated: bool = False  # whether the last answer ended at a limit of tokens
    tools: list[dict[str, Any]] = field(default_factory=list)  # descriptions of functions
    answers: list[KeptAnswer] = field(default_factory=list)  # of each assistant turn, kept by regeneration
    tokenizer: str | None = None  # fingerprint of the tokenizer that made the ids of `answers`
    tokens: tuple[list[int], list[bool]] | None = None  # ids and loss mask of a tokenised record


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

"""Chats, and the file that regeneration appends chats to."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any


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
    category: str = ""  # kind of question, as sets for evaluation name it


def content_hash(messages: Sequence[Message], tools: Sequence[dict[str, Any]] = ()) -> str:
    """Hash of all that a template may write of a chat, equal for equal chats."""
    turns: list[Any] = [_written(message) for message in messages]
    content = json.dumps([*turns, {"tools": list(tools)}] if tools else turns)
    return hashlib.sha256(content.encode()).hexdigest()


def _written(message: Message) -> list[Any]:
    others = {"thought": message.thought, "tool_calls": message.tool_calls, **message.others}
    more = {name: value for name, value in sorted(others.items()) if value}
    return [message.role, message.content, more] if more else [message.role, message.content]

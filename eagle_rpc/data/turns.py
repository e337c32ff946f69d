"""One turn of a record as a `Message`.

A turn is `{"role", "content"}` or ShareGPT's `{"from", "value"}`. Null and empty values are absent. Keys that
are not read here go to the template (`Message.others`).
"""

import json
from collections.abc import Iterable, Sequence
from typing import Any

from eagle_rpc.data.chats import Message
from eagle_rpc.data.problems import RecordProblem, shown
from eagle_rpc.data.tool_calls import parse_calls

_ROLES = {
    "system": "system",
    "developer": "developer",
    "user": "user",
    "human": "user",
    "prompter": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "chatgpt": "assistant",
    "model": "assistant",
    "bot": "assistant",
    # The value of ShareGPT's turns with calls is the JSON text of the calls.
    "function_call": "assistant",
    "tool_call": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "ipython": "tool",
}
_CALLING_ROLES = ("function_call", "tool_call")
_THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
_SUPERVISION_KEYS = ("weight", "train", "train_on_turn")
_TEXT_PARTS = ("text", "input_text", "output_text")


def parse_turn(turn: Any, number: int, *, has_ids: bool = False) -> Message:
    """Message `number` of a record, counted from 1. Raises `RecordProblem` naming the number.

    `has_ids` says that the record keeps its answers as token ids: their text may then be empty.
    """
    name = f"message {number}"
    if not isinstance(turn, dict):
        raise RecordProblem(f"{name} must be an object, got {shown(turn)}", kind="of a wrong type")
    keys = present(turn)
    spoken_by = _speaker(keys, name)
    role = _ROLES[spoken_by]
    calls = [
        call
        for key in ("tool_calls", "function_call")
        if key in keys
        for call in parse_calls(keys.pop(key), f"{key} of {name}")
    ]
    thought = _same(_texts(keys, _THOUGHT_KEYS, name), name) or ""
    content = _same(_texts(keys, ("content", "value"), name), name) or ""
    if spoken_by in _CALLING_ROLES:
        calls, content = calls + parse_calls(content, f"the calls of {name}"), ""
    if role != "assistant" and (calls or thought.strip()):
        fault = "call tools" if calls else "have a thought"
        raise RecordProblem(f"{name} ({role}) must not {fault}: only answers do", kind="with misplaced keys")
    may_be_empty = bool(calls) or role == "tool" or (has_ids and role == "assistant")
    if not content.strip() and not may_be_empty:
        but = " but for its thought" if thought.strip() else ""
        raise RecordProblem(f"{name} ({spoken_by}) is empty{but}", kind="with an empty message")
    supervised = _supervised(keys, role, name)
    check_unicode([content, thought, json.dumps(calls, ensure_ascii=False, default=str)], name)
    return Message(role, content, thought if thought.strip() else None, calls, keys, supervised)


def present(entries: dict[str, Any]) -> dict[str, Any]:
    """The entries that are not null or empty: a union of columns writes these for keys that are absent."""
    return {key: value for key, value in entries.items() if value is not None and value not in ("", [], {})}


def text_of(value: Any, name: str) -> str:
    """A text, or the text of a list of parts. Raises `RecordProblem` for parts of other kinds.

    Parts are joined without a separator, as templates write them.
    """
    if isinstance(value, list):
        return "".join(_part(part, name) for part in value)
    if not isinstance(value, str):
        raise RecordProblem(f"{name} must be a text, got {shown(value)}", kind="of a wrong type")
    return value


def check_unicode(texts: Iterable[str], name: str) -> None:
    """Raises `RecordProblem` for half of a surrogate pair, which has no UTF-8 form."""
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise RecordProblem(
                f"{name} holds half of a surrogate pair at character {error.start}", kind="not Unicode"
            ) from error


def _part(part: Any, name: str) -> str:
    if isinstance(part, str):
        return part
    if isinstance(part, dict):
        keys = present(part)
        kind = keys.get("type", "text")
        text = keys.get("text", "")
        if kind in _TEXT_PARTS and isinstance(text, str):
            return text
        raise RecordProblem(
            f"{name} must have parts of text alone, got a part of type {shown(kind)}",
            kind=f"with a part of type {kind}",
        )
    raise RecordProblem(f"{name} must have parts of text alone, got {shown(part)}", kind="of a wrong type")


def _speaker(keys: dict[str, Any], name: str) -> str:
    """The role as the record names it, taken out of `keys`."""
    given: dict[str, Any] = {key: keys.pop(key) for key in ("role", "from") if key in keys}
    names = [value.lower() if isinstance(value, str) else value for value in given.values()]
    if not names or not all(isinstance(value, str) and value in _ROLES for value in names):
        key = next(iter(given), "role")
        raise RecordProblem(
            f"{name} must have a {key} out of {', '.join(_ROLES)}, got {shown(given[key] if given else None)}",
            kind="with an unknown role",
        )
    if len({_ROLES[value] for value in names}) > 1:
        raise RecordProblem(f"{name} has the keys role and from, which differ", kind="with keys that differ")
    return str(names[-1])


def _texts(keys: dict[str, Any], wanted: Sequence[str], name: str) -> dict[str, str]:
    """The texts of the `wanted` keys, taken out of `keys`."""
    texts = {key: text_of(keys.pop(key), f"{key} of {name}") for key in wanted if key in keys}
    return {key: text for key, text in texts.items() if text.strip()} or texts


def _same(texts: dict[str, str], name: str) -> str | None:
    """The one text of several keys, None if there is none."""
    if len(set(texts.values())) > 1:
        raise RecordProblem(
            f"{name} has the keys {' and '.join(texts)}, which differ", kind="with keys that differ"
        )
    return next(iter(texts.values()), None)


def _supervised(keys: dict[str, Any], role: str, name: str) -> bool:
    """Whether all keys about supervision, taken out of `keys`, let the draft learn from the turn."""
    given = {key: keys.pop(key) for key in _SUPERVISION_KEYS if key in keys}
    for key, value in given.items():
        if not isinstance(value, int | float) or value not in (0, 1):
            rule = "0 or 1" if key == "weight" else "true or false"
            raise RecordProblem(f"{key} of {name} must be {rule}, got {shown(value)}", kind=f"with a {key}")
        if value and role != "assistant":
            raise RecordProblem(
                f"{key} of {name} ({role}) must be {'0' if key == 'weight' else 'false'} or absent: "
                "a draft learns from answers alone",
                kind=f"with a {key}",
            )
    return all(given.values())

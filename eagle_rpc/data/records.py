"""Records as chats.

A record holds turns, a question with or without an answer, or token ids with their mask; `TURN_LISTS`,
`QUESTIONS` and `ANSWERS` name the keys. Null and empty values are absent. A key that would change what is
rendered or supervised and is not read here is refused by name; other keys are left aside and reported.
"""

import json
import logging
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from eagle_rpc.config.choices import OnError
from eagle_rpc.data.chats import Chat, Message
from eagle_rpc.data.problems import RecordProblem, RecordProblems, describe, shown
from eagle_rpc.data.sources import read_records
from eagle_rpc.data.token_records import kept_answers, tokens_of
from eagle_rpc.data.tool_calls import decoded, parse_tools
from eagle_rpc.data.turns import check_unicode, parse_turn, present, text_of
from eagle_rpc.errors import DataError

logger = logging.getLogger(__name__)

TURN_LISTS = ("messages", "conversations", "conversation", "turns", "data")
QUESTIONS = ("prompt", "instruction", "question", "query", "problem")
ANSWERS = ("completion", "response", "output", "answer", "solution")
CATEGORIES = ("category", "subject")

_SYSTEM_ROLES = ("system", "developer")
_SYSTEM_KEYS = ("system", "system_prompt")
_INPUT_KEYS = ("input", "context")
_READ_WITH_EVERY_FORM = frozenset({*_SYSTEM_KEYS, "tools", "truncated", "answers", "tokenizer"})
# Written by regeneration for itself.
_OF_REGENERATION = frozenset({"prompt", "number", "settings", "date"})
_HASH = re.compile(r"[0-9a-f]{64}")
_RENDERED = ("text", "chat")
# Keys that change what is rendered or supervised.
_TELLING = re.compile(
    r"functions?|function_call|images?|audios?|videos?|documents?|chosen|rejected|labels|context|input|history|"
    r"input_ids|attention_mask|position_ids|segment_ids|reasoning|reasoning_content|thinking|"
    r"chat_template|chat_template_kwargs|template_arguments|train|train_on_turn|(\w+_)?(mask|weight|loss)s?"
)


@dataclass(frozen=True, slots=True)
class ChatFile:
    """The usable chats of a source, in its order."""

    path: str
    chats: list[Chat]
    skipped: Counter[str]  # records left out, by kind of fault


def read_chats(path: str | Path, *, on_error: OnError, needed_role: str = "assistant") -> ChatFile:
    """All chats of a source in memory; see `iter_chats`.

    Raises `DataError` naming place and fault of the first broken record unless `on_error` is skip, and for a
    source that cannot be read or has no usable chat.
    """
    problems = RecordProblems(on_error)
    chats = list(iter_chats(path, problems, needed_role))
    if not chats:
        raise DataError(f"{path} must hold at least one usable chat, got none; {describe(problems.skipped)}")
    if problems.skipped:
        logger.warning("%s: %d usable chats, %s", path, len(chats), describe(problems.skipped))
    return ChatFile(str(path), chats, problems.skipped)


def iter_chats(path: str | Path, problems: RecordProblems, needed_role: str = "assistant") -> Iterator[Chat]:
    """The chats of a source one after the other; broken records go to `problems`.

    Each chat has a turn of `needed_role`: assistant to train on, user to be asked. Keys that are not read are
    reported once at the end. Raises `DataError` for a source that cannot be read.
    """
    unread = Counter[str]()
    for place, record in read_records(str(path)):
        with problems.record(place):
            yield parse_chat(record, place, needed_role, unread=unread)
    if unread:
        logger.info("%s: %s", path, describe_unread(unread))


def describe_unread(unread: Counter[str]) -> str:
    """The keys that records have and nothing reads."""
    return f"not read: {', '.join(sorted(unread))}"


def parse_chat(
    record: Any, place: str, needed_role: str = "assistant", *, unread: Counter[str] | None = None
) -> Chat:
    """A record as `read_records` gives it, as a chat with a turn of `needed_role`. Raises `RecordProblem`.

    The names of harmless keys that are not read are counted in `unread`.
    """
    if isinstance(record, RecordProblem):
        raise record
    if not isinstance(record, dict):
        raise RecordProblem(f"a record must be an object, got {shown(record)}", kind="of a wrong type")
    keys = present(record)
    tokens, token_keys = tokens_of(keys)
    messages, turn_keys = _messages(keys)
    if tokens is None and not messages:
        raise _without_messages(record, keys)
    category = next((keys[key] for key in CATEGORIES if isinstance(keys.get(key), str)), "")
    left = keys.keys() - turn_keys - token_keys - _READ_WITH_EVERY_FORM - set(CATEGORIES)
    _refuse_telling({key: keys[key] for key in left})
    if unread is not None:
        unread.update(left - (_OF_REGENERATION if "settings" in keys else frozenset()))
    truncated = keys.get("truncated", False)
    if not isinstance(truncated, bool):
        raise RecordProblem(
            f"truncated must be true or false, got {shown(truncated)}", kind="of a wrong type"
        )
    tools = parse_tools(keys["tools"]) if "tools" in keys else []
    check_unicode([json.dumps(tools, ensure_ascii=False, default=str)], "tools")
    answers, tokenizer = kept_answers(keys, sum(message.role == "assistant" for message in messages))
    _check_role(messages, needed_role, has_tokens=tokens is not None)
    return Chat(messages, place, truncated, tools, answers, tokenizer, tokens, category)


def _check_role(messages: list[Message], needed_role: str, *, has_tokens: bool) -> None:
    """Token ids hold answers already."""
    found = {message.role for message in messages} | ({"assistant"} if has_tokens else set())
    if needed_role not in found:
        advice = ": let the target answer first (job=regenerate)" if needed_role == "assistant" else ""
        raise RecordProblem(f"the chat has no {needed_role} turn{advice}", kind=f"without {needed_role} turn")


def _messages(keys: dict[str, Any]) -> tuple[list[Message], set[str]]:
    """The turns of a record, the system's included, and the keys that held them.

    Several keys may hold turns if they agree: each is the beginning of the longest.
    """
    forms = _turn_lists(keys)
    used = set(forms)
    questions = [key for key in QUESTIONS if key in keys and not _is_hash(key, keys[key])]
    for key in questions:
        forms[key], more = _question(key, keys)
        used |= {key, *more}
    if not forms:
        return [], used
    name, longest = max(forms.items(), key=lambda form: len(form[1]))
    for other, messages in forms.items():
        if not _agree(messages, longest):
            raise RecordProblem(
                f"the record has different chats under {name} and {other}: leave one of them",
                kind="with two different chats",
            )
    messages = _with_system(longest, keys)
    _check_order(messages)
    return messages, used


def _turn_lists(keys: dict[str, Any]) -> dict[str, list[Message]]:
    lists = {key: decoded(keys[key]) for key in TURN_LISTS if key in keys}
    forms = {}
    for key, turns in lists.items():
        if isinstance(turns, list):
            forms[key] = _turns(turns, key, has_ids="answers" in keys)
        elif key not in ("turns", "data"):  # these two may also be a number of turns, or something else
            raise RecordProblem(f"{key} must be a list of turns, got {shown(turns)}", kind="of a wrong type")
    return forms


def _turns(turns: list[Any], key: str, *, has_ids: bool = False) -> list[Message]:
    """Turns as objects; or as texts: MT-Bench's `turns` are the user's, in UltraChat's `data` both speak."""
    if key in ("turns", "data") and all(isinstance(turn, str) for turn in turns):
        roles = ("user", "assistant" if key == "data" else "user")
        turns = [{"role": roles[number % 2], "content": text} for number, text in enumerate(turns)]
    return [parse_turn(turn, number, has_ids=has_ids) for number, turn in enumerate(turns, start=1)]


def _question(key: str, keys: dict[str, Any]) -> tuple[list[Message], set[str]]:
    """A question, its input and its answer if there is one, and the keys of the last two."""
    messages = _turns_or_text(keys[key], key, "user")
    inputs = [name for name in _INPUT_KEYS if name in keys] if key == "instruction" else []
    if inputs:
        texts = [messages[-1].content, *(text_of(keys[name], name) for name in inputs)]
        messages = [*messages[:-1], Message("user", "\n\n".join(texts))]
    answers = {name: keys[name] for name in ANSWERS if name in keys}
    if "solution" in answers:
        answers.pop("answer", None)  # the last line of the solution alone, in sets of mathematical problems
    for name, answer in answers.items():
        if answer != next(iter(answers.values())):
            raise RecordProblem(
                f"the record has different answers under {' and '.join(answers)}: leave one of {name} "
                "and the others",
                kind="with two different answers",
            )
    if answers:
        name = next(iter(answers))
        messages = messages + _turns_or_text(answers[name], name, "assistant", len(messages) + 1)
    return messages, {*inputs, *answers}


def _turns_or_text(value: Any, key: str, role: str, number: int = 1) -> list[Message]:
    if isinstance(value, list) and all(isinstance(turn, dict) and "type" not in turn for turn in value):
        return [parse_turn(turn, place) for place, turn in enumerate(value, start=number)]
    return [parse_turn({"role": role, "content": text_of(value, key)}, number)]


def _with_system(messages: list[Message], keys: dict[str, Any]) -> list[Message]:
    texts = {key: text_of(keys[key], key) for key in _SYSTEM_KEYS if key in keys}
    check_unicode(texts.values(), "the system text")
    for key, text in texts.items():
        if messages[0].role not in _SYSTEM_ROLES:
            messages = [Message("system", text), *messages]
        elif messages[0].content.strip() != text.strip():
            raise RecordProblem(
                f"the record has {key} beside another system text: leave one of them",
                kind="with two system texts",
            )
    return messages


def _agree(messages: list[Message], longest: list[Message]) -> bool:
    """Whether the turns are the first ones of `longest`, system turns aside."""
    mine, its = (
        [replace(turn, content=turn.content.strip()) for turn in chat if turn.role not in _SYSTEM_ROLES]
        for chat in (messages, longest)
    )
    return mine == its[: len(mine)]


def _check_order(messages: list[Message]) -> None:
    spoken = [message.role for message in messages if message.role not in _SYSTEM_ROLES]
    if not spoken or spoken[0] != "user":
        first = spoken[0] if spoken else "no turn but the system's"
        raise RecordProblem(f"the user must speak first, got {first}", kind="not begun by the user")


def _is_hash(key: str, value: Any) -> bool:
    """Whether the `prompt` is the hash that regeneration writes instead of a question."""
    return key == "prompt" and isinstance(value, str) and _HASH.fullmatch(value) is not None


def _refuse_telling(left: dict[str, Any]) -> None:
    """Raises `RecordProblem` for a key whose value changes what is rendered or supervised.

    1 and true weigh nothing; `label: false` marks the answers that KTO trains against.
    """
    for key, value in sorted(left.items()):
        telling = _TELLING.fullmatch(key) is not None and value != 1
        if telling or (key == "label" and value is False):
            raise RecordProblem(
                f"the record has {key} {shown(value)}, which would change the chat or its supervision and is "
                "not read: take it out, or convert the record",
                kind=f"with the key {key}",
            )


def _without_messages(record: dict[str, Any], keys: dict[str, Any]) -> RecordProblem:
    if any(key in record and key not in keys for key in TURN_LISTS):
        return RecordProblem("the conversation is empty", kind="empty")
    if rendered := [key for key in _RENDERED if isinstance(keys.get(key), str)]:
        return RecordProblem(
            f"the record holds a whole text ({rendered[0]}), perhaps rendered by a chat template already, and "
            "no turns: give the chats before rendering, as messages",
            kind="of rendered text",
        )
    names = ", ".join((*TURN_LISTS[:-1], *QUESTIONS))
    return RecordProblem(
        f"a record must have one of {names} or input_ids with loss_mask, got the keys {shown(list(keys))}",
        kind="without messages",
    )

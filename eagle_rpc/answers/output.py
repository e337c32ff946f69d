"""The file of regenerated chats: who writes it, which prompts are in it, and with which settings.

A line is a chat with these keys beside its turns: `prompt`, a hash of the turns that were asked; `number`, which
of several answers to the prompt it is; `settings`, all that its answers depend on; `tokenizer`, a hash;
`answers`, for each assistant turn the ids that were asked and said; `truncated`, whether the last one was cut.
"""

import contextlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from eagle_rpc.config import Config
from eagle_rpc.data import KeptAnswer, Message
from eagle_rpc.errors import ConfigError

_LINE_START = b'{"prompt": "'
_RULE = "regenerate.output must be absent or a file that this job has written"


@dataclass(frozen=True, slots=True)
class RegeneratedChat:
    """The content of one line."""

    prompt: str
    number: int
    messages: Sequence[Message]
    tools: Sequence[dict[str, Any]]
    answers: Sequence[KeptAnswer]


def answer_settings(config: Config, *, target: str, template: str) -> dict[str, Any]:
    """All that an answer depends on besides its prompt; `target`, `template`: hashes."""
    asked = config.regenerate
    sampled = asked.temperature > 0
    return {
        "target": target,
        "template": template,
        "max_new_tokens": asked.max_new_tokens,
        "temperature": asked.temperature,
        "top_p": asked.top_p if sampled else None,
        "top_k": asked.top_k if sampled else None,
        "stop": asked.stop,
        "seed": config.run.seed if sampled else None,
    }


class AnswerFile:
    """The open output file, which this process alone writes.

    `finished` are the prompts and numbers of its chats. A chat's whole line is with the operating system when
    `write` returns. A line that a kill cut is removed.
    """

    def __init__(self, path: Path, finished: set[tuple[str, int]], date: str | None) -> None:
        self.finished = finished
        self.date = date
        """The day that the templates of its answers wrote; null: no answer yet."""
        self._path = path
        self._file = path.open("ab")

    def write(self, chat: RegeneratedChat, *, settings: dict[str, Any], tokenizer: str, date: str) -> None:
        """Appends one chat as a line. Raises `OSError` if it cannot be written."""
        record: dict[str, Any] = {
            "prompt": chat.prompt,
            "number": chat.number,
            "messages": [_turn(message) for message in chat.messages],
        }
        if chat.tools:
            record["tools"] = list(chat.tools)
        record |= {
            "truncated": chat.answers[-1].truncated,
            "settings": settings,
            "date": date,
            "tokenizer": tokenizer,
            "answers": [
                {"prompt_ids": one.prompt_ids, "answer_ids": one.answer_ids, "truncated": one.truncated}
                for one in chat.answers
            ],
        }
        self._file.write(json.dumps(record).encode() + b"\n")
        self._file.flush()

    def require_settings(self, settings: dict[str, Any]) -> None:
        """Raises `ConfigError` if a chat of the file was made with other settings."""
        for number, record in _lines(self._path):
            found = record["settings"]
            changed = [name for name, value in settings.items() if found.get(name) != value]
            if changed:
                changes = "; ".join(f"{name} {found.get(name)}, now {settings[name]}" for name in changed)
                raise ConfigError(
                    "regenerate.output must have answers of the same settings, "
                    f"got {self._path}, line {number} with {changes}: name another file or remove this one"
                )

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def open_answers(path: str | Path, *, prompts: str | Path) -> Iterator[AnswerFile]:
    """Opens the output for appending. Nothing is written to a file that is not this job's.

    Raises `ConfigError` if the file is foreign, is the file of the `prompts`, cannot be written, or is open in
    another process.
    """
    path = Path(path).expanduser()
    with contextlib.suppress(OSError):
        if path.samefile(Path(prompts).expanduser()):
            raise ConfigError(f"{_RULE}, got {path}, the file of the prompts")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_name(f".{path.name}.lock"))
        lock.acquire(blocking=False)
    except filelock.Timeout:
        raise ConfigError(f"regenerate.output must not be in use, another process writes {path}") from None
    except OSError as error:
        raise ConfigError(f"regenerate.output must be writable, got {path}: {error.strerror}") from error
    try:
        records = list(_lines(path))
        finished = {(record["prompt"], record["number"]) for _, record in records}
        _remove_cut_line(path)
        file = AnswerFile(path, finished, records[0][1].get("date") if records else None)
        with contextlib.closing(file):
            yield file
    except OSError as error:
        raise ConfigError(f"regenerate.output must be writable, got {path}: {error.strerror}") from error
    finally:
        lock.release()


def _lines(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    """The whole lines, without their token ids. Raises `ConfigError` for a line that is not this job's."""
    if not path.exists():
        return
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if not line.endswith(b"\n"):
                if not _may_be_cut(line):
                    raise ConfigError(f"{_RULE}, got {path} with a foreign end")
                return
            try:
                record = json.loads(line)
                record["prompt"], record["settings"].get, record["number"], record.pop("answers")
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                raise ConfigError(f"{_RULE}, got {path} with a foreign line {number}") from error
            yield number, {name: record.get(name) for name in ("prompt", "number", "settings", "date")}


def _may_be_cut(end: bytes) -> bool:
    """Whether the end of a file can be a line of this job that a kill has cut."""
    if not end.startswith(_LINE_START):
        return _LINE_START.startswith(end)
    return re.fullmatch(rb'[0-9a-f]*(".*)?', end[len(_LINE_START) :]) is not None


def _remove_cut_line(path: Path) -> None:
    if path.exists():
        with path.open("rb+") as file:
            content_end = 0
            for line in file:
                content_end += len(line) if line.endswith(b"\n") else 0
            file.truncate(content_end)


def _turn(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content, **message.others}
    if message.thought is not None:
        turn["reasoning_content"] = message.thought
    return turn

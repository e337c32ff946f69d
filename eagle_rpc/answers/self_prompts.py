"""Prompts that the target writes itself, from its template's user header on.

Attempt n depends on the seed, the settings and n alone, and attempts are judged in the order of their numbers.
So the prompts do not depend on the number of attempts under way, but for rounding in low precision. Every
attempt is a line of a log, from which a killed job goes on.
"""

import contextlib
import json
import logging
from collections import Counter
from collections.abc import Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import filelock

from eagle_rpc.answers.answerer import Answer, Answerer
from eagle_rpc.answers.prompt_filters import SeenPrompts, fault_of
from eagle_rpc.config.schema import PromptsConfig
from eagle_rpc.data.template import ChatTemplate, special_token_ids
from eagle_rpc.errors import ConfigError, DataError
from eagle_rpc.report.progress import Progress

logger = logging.getLogger(__name__)

# The beginnings of the log's lines, by which a line that a kill has cut is known.
_FIRST_START, _LATER_START = b'{"settings": ', b'{"text": '
# The rule for the share of kept prompts holds from this many wanted prompts on.
_EARLY = 20


@dataclass(frozen=True, slots=True)
class Attempt:
    """One attempt at a prompt."""

    text: str
    fault: str | None  # why it is left out

    def line(self) -> bytes:
        return json.dumps({"text": self.text, "left_out": self.fault}).encode() + b"\n"


class AttemptLog:
    """The file of all attempts in order, which this process alone writes; its first line holds the settings."""

    def __init__(self, path: Path) -> None:
        """Reads the whole lines and removes a cut one. Raises `ConfigError` for a file that is not such a log."""
        self.path = path
        self.attempts: list[Attempt] = []
        self._settings: dict[str, Any] | None = None
        content = path.read_bytes() if path.exists() else b""
        whole, _, cut = content.rpartition(b"\n")
        try:
            records = [json.loads(line) for line in whole.splitlines()]
            if records:
                self._settings = dict(records[0]["settings"])
            self.attempts = [Attempt(record["text"], record["left_out"]) for record in records[1:]]
            start = _LATER_START if records else _FIRST_START
            if cut[: len(start)] != start[: len(cut)]:
                raise ValueError(f"a foreign end {cut[:20]!r}")
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{path} must be absent or a log of data.prompt_source=self: {error}"
            ) from error
        self._file = path.open("ab")
        self._file.truncate(len(content) - len(cut))

    @property
    def date(self) -> str | None:
        """The day that the template wrote; null: nothing is written yet."""
        return None if self._settings is None else self._settings.get("date")

    def require_settings(self, settings: dict[str, Any]) -> None:
        """Raises `ConfigError` if the attempts were made with other settings."""
        if self._settings is None:
            self._settings = settings
            self._file.write(json.dumps({"settings": settings}).encode() + b"\n")
            self._file.flush()
        found = self._settings
        changed = [
            f"{name} {found.get(name)}, now {new}" for name, new in settings.items() if found.get(name) != new
        ]
        if changed:
            raise ConfigError(
                f"{self.path} must have prompts of the same settings, got {'; '.join(changed)}: "
                "choose another run.name or remove this file"
            )

    def add(self, attempt: Attempt) -> None:
        self.attempts.append(attempt)
        self._file.write(attempt.line())
        self._file.flush()

    def close(self) -> None:
        self._file.close()


@contextlib.contextmanager
def open_log(path: Path) -> Iterator[AttemptLog]:
    """Raises `ConfigError` if another process writes the log, or if it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(path.with_name(f".{path.name}.lock"), blocking=False)
        with lock, contextlib.closing(AttemptLog(path)) as log:
            yield log
    except filelock.Timeout:
        raise ConfigError(f"{path} must not be in use, another process writes prompts") from None


class SelfPrompts:
    """Makes the prompts of `data.prompt_source=self`."""

    def __init__(
        self,
        settings: PromptsConfig,
        answerer: Answerer,
        template: ChatTemplate,
        log: AttemptLog,
        *,
        seed: int,
        date: str,
        ahead: int,
    ) -> None:
        """`ahead`: attempts that are under way at a time. Raises `ConfigError` for a log of other settings."""
        self._settings, self._answerer, self._log, self._ahead = settings, answerer, log, ahead
        self._tokenizer = template.tokenizer
        self._special_ids = special_token_ids(template.tokenizer)
        self._turn = template.user_turn(settings.system)
        log.require_settings(
            {
                "target": answerer.fingerprint,
                "template": template.identity,
                "system": settings.system,
                "temperature": settings.temperature,
                "top_p": settings.top_p,
                "max_tokens": settings.max_tokens,
                "min_chars": settings.min_chars,
                "scripts": settings.scripts,
                "seed": seed,
                "date": date,
            }
        )
        self._num_submitted = len(log.attempts)
        self._seen = SeenPrompts()
        for attempt in log.attempts:
            if attempt.fault is None:
                self._seen.add(attempt.text)
        self._counts = Counter(attempt.fault or "kept" for attempt in log.attempts)

    def make(self) -> list[str]:
        """The first `num_heldout + num_train` good prompts. Raises `DataError` if the target gives too few."""
        wanted = self._settings.num_heldout + self._settings.num_train
        progress = Progress("prompt", wanted, done=min(wanted, self._counts["kept"]), title="writing prompts")
        with contextlib.closing(self._answers_in_order()) as answers:
            while self._counts["kept"] < wanted:
                self._require_enough(wanted)
                attempt = self._judged(next(answers))
                self._log.add(attempt)
                self._counts[attempt.fault or "kept"] += 1
                if attempt.fault is None:
                    progress.advance(self._described)
        progress.close()
        logger.info("%s: %s", self._log.path, self._described())
        return [attempt.text for attempt in self._log.attempts if attempt.fault is None][:wanted]

    def _require_enough(self, wanted: int) -> None:
        # A target that gives nothing is told early, by the share of kept prompts.
        limit = self._settings.max_attempts_per_prompt * min(wanted, self._counts["kept"] + _EARLY)
        if self._counts.total() >= limit:
            raise DataError(
                f"the target must give {wanted} good prompts in prompts.max_attempts_per_prompt="
                f"{self._settings.max_attempts_per_prompt} attempts each, got {self._described()}: "
                f"{self._log.path} shows them"
            )

    def _described(self) -> str:
        left_out = self._counts.copy()
        kept = left_out.pop("kept", 0)
        reasons = ", ".join(f"{count} {fault}" for fault, count in left_out.most_common())
        return f"{kept} of {self._counts.total()} attempts kept" + (
            f"; left out: {reasons}" if reasons else ""
        )

    def _answers_in_order(self) -> Generator[Answer]:
        """Answers by the number of their attempt, without end: some attempts are always under way."""
        coming = self._num_submitted
        early: dict[int, Answer] = {}
        self._submit(coming + self._ahead)
        for answer in self._answerer.answers():
            early[int(answer.key)] = answer
            while coming in early:
                yield early.pop(coming)
                coming += 1
            self._submit(coming + self._ahead)

    def _submit(self, end: int) -> None:
        """Asks for the attempts up to number `end`."""
        for number in range(self._num_submitted, end):
            self._answerer.submit(str(number), self._turn.prompt_ids)
        self._num_submitted = end

    def _judged(self, answer: Answer) -> Attempt:
        text = str(self._tokenizer.decode(answer.token_ids, skip_special_tokens=False))
        before, found, _ = text.partition(self._turn.end_text) if self._turn.end_text else (text, "", "")
        text = before.strip()
        fault = "refused by an endpoint" if answer.refusal is not None else None
        if answer.truncated and not found:
            fault = "cut"
        fault = fault or fault_of(
            text,
            answer.token_ids,
            special_ids=self._special_ids,
            marks=self._turn.marks,
            min_chars=self._settings.min_chars,
            scripts=self._settings.scripts,
        )
        return Attempt(text, fault or self._seen.add(text))

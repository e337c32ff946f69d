"""Records that cannot be used: the first one ends the job, or all are counted (`data.on_error`)."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from eagle_rpc.config.choices import OnError
from eagle_rpc.errors import DataError

# The place of a record, as in "chats.jsonl, line 3", and its value; or the `RecordProblem` in place of it.
Record = tuple[str, Any]


class RecordProblem(DataError):
    """The fault of one record; `RecordProblems` adds the place to it, or counts it under its `kind`."""

    def __init__(self, detail: str, *, kind: str = "broken") -> None:
        super().__init__(detail)
        self.kind = kind


class RecordProblems:
    """The faults of one source."""

    def __init__(self, on_error: OnError) -> None:
        self.skipped: Counter[str] = Counter()
        self._on_error = on_error

    @contextmanager
    def record(self, place: str) -> Iterator[None]:
        """Counts a `RecordProblem` of the body, which processes one record, or raises `DataError`.

        `place` is as in "chats.jsonl, line 3". The error, with `data.on_error=fail`, names place and fault.
        """
        try:
            yield
        except RecordProblem as problem:
            if self._on_error is OnError.fail:
                raise DataError(
                    f"{place}: {problem} (data.on_error=skip leaves such records out)"
                ) from problem
            self.skipped[problem.kind] += 1


def describe(skipped: Counter[str]) -> str:
    """How many records were skipped, and why."""
    kinds = ", ".join(f"{count} {kind}" for kind, count in skipped.most_common())
    return f"{skipped.total()} skipped ({kinds})" if skipped else "none skipped"


def shown(value: Any) -> str:
    """A value for an error message, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."

"""The validations of a run so far: which step was the best, and whether training still improves."""

from dataclasses import asdict, dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True, slots=True)
class ValidationHistory:
    """Kept in each checkpoint, so that a resumed run goes on judging as before."""

    best_step: int | None = None  # optimiser steps; the first with the highest accept length
    best_accept_length: float = 0.0
    last_step: int = 0  # of the last validation
    since_best: int = 0  # validations after the best one

    def with_result(self, step: int, accept_length: float) -> "ValidationHistory":
        """The history after a validation of `step`."""
        if self.best_step is None or accept_length > self.best_accept_length:
            return ValidationHistory(best_step=step, best_accept_length=accept_length, last_step=step)
        return replace(self, last_step=step, since_best=self.since_best + 1)

    def exhaustion(self, patience: int | None) -> str | None:
        """The finding that the last `patience` validations were no better than an earlier one, or null."""
        if patience is None or self.since_best < patience:
            return None
        return (
            f"train.patience={patience} validations without a higher accept length than "
            f"{self.best_accept_length:.3f} of step {self.best_step}"
        )

    def to_json(self) -> dict[str, Any]:
        """All fields."""
        return asdict(self)

"""Quotas: what one run may use of a target, whoever else asks. Equal shares (`fairness.py`) leave it to demand."""

import threading
from collections import Counter
from collections.abc import Collection, Sequence

from eagle_rpc.config.sections.target import EVERY_RUN, QuotaConfig
from eagle_rpc.errors import TargetBusy

_UNBOUNDED = QuotaConfig()


class Quotas:
    """The quotas of runs by name, and how often each run met its own. Safe for threads."""

    def __init__(self, quotas: Sequence[QuotaConfig] = ()) -> None:
        self._of_run = {one.run: one for one in quotas}
        self._lock = threading.Lock()
        self._refused: Counter[str] = Counter()

    def of(self, run: str) -> QuotaConfig:
        """The quota that names the run, or that of every other run."""
        return self._of_run.get(run) or self._of_run.get(EVERY_RUN, _UNBOUNDED)

    def refusal(self, run: str, rule: str) -> TargetBusy:
        """The error for a run that has as much as it may; `rule` continues "run 'NAME' must". Counts it."""
        with self._lock:
            self._refused[run] += 1
        return TargetBusy(f"run {run!r:.80} must {rule} (target.quotas)")

    def refused(self, runs: Collection[str]) -> dict[str, int]:
        """Refusals of each of the runs that are here now. The others are forgotten."""
        with self._lock:
            self._refused = Counter({run: count for run, count in self._refused.items() if run in runs})
            return {run: self._refused[run] for run in runs}

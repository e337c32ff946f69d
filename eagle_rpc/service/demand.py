"""Which jobs want something of the target at the moment."""

import threading
from collections.abc import Callable

# Longer than any sender is told to wait before it asks again, so that a refused job keeps its claim.
_LATELY = 2.0


class Demand:
    """Counts the jobs that have asked lately: each may take an equal share of the target's bounds, a job alone all of it.

    Without it a job that fills the queue, and refills it as it empties, would leave no room for another to get in.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds, as `time.monotonic`."""
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: dict[str, float] = {}  # job -> when

    def note(self, job: str) -> int:
        """Notes that `job` asks now; the number of jobs that have in the last two seconds, this one included."""
        now = self._clock()
        with self._lock:
            self._asked[job] = now
            self._asked = {job: asked for job, asked in self._asked.items() if now - asked < _LATELY}
            return len(self._asked)

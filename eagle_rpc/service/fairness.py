"""Fairness between runs: turns in the queue, and the number of runs that share the target's bounds."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from eagle_rpc.errors import EagleRpcError

# Seconds after which a refused sender may ask again.
SHORTEST_RETRY, LONGEST_RETRY = 0.01, 1.0
# Seconds; longer than any refused sender waits before it asks again, so that its run keeps its share.
_RECENT = 2.0


@dataclass(eq=False, slots=True)
class Work:
    """One request of a session, and the future of its answer."""

    request: Any
    run: str
    session: str
    request_id: str
    deadline: float  # on the scheduler's clock
    record: Callable[[Any], None]  # gets the outcome, a value or an `EagleRpcError`, just before the receiver
    answer: Future[Any]

    def finish(self, outcome: Any) -> None:
        """Records the outcome and hands it to the receiver."""
        self.record(outcome)
        set_outcome(self.answer, outcome)


def set_outcome(answer: Future[Any], outcome: Any) -> None:
    """Completes `answer` with a value, or with the exception if `outcome` is an `EagleRpcError`."""
    if isinstance(outcome, EagleRpcError):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


class FairQueue:
    """Runs take turns, then the sessions of a run; within a session the first come is the first served.

    Not safe for threads.
    """

    def __init__(self) -> None:
        # Run, session and request id, each level in the order of service.
        self._runs: OrderedDict[str, OrderedDict[str, dict[str, Work]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(self.num_of_run(run) for run in self._runs)

    def num_of_run(self, run: str) -> int:
        """The number of requests of all sessions of a run."""
        return sum(map(len, self._runs[run].values())) if run in self._runs else 0

    def num_of_session(self, run: str, session: str) -> int:
        """The number of requests of one session."""
        return len(self._of_session(run, session))

    def find(self, run: str, session: str, request_id: str) -> Work | None:
        """The request of this id."""
        return self._of_session(run, session).get(request_id)

    def _of_session(self, run: str, session: str) -> dict[str, Work]:
        return self._runs[run].get(session, {}) if run in self._runs else {}

    def put(self, work: Work) -> None:
        """Adds `work` behind its session's other work, or in the place of a request with the same id."""
        self._runs.setdefault(work.run, OrderedDict()).setdefault(work.session, {})[work.request_id] = work

    def first(self) -> Work | None:
        """The next request in turn; None if the queue is empty."""
        if not self._runs:
            return None
        sessions = next(iter(self._runs.values()))
        return next(iter(next(iter(sessions.values())).values()))

    def take(self) -> Work | None:
        """Removes the next request in turn; None if the queue is empty."""
        work = self.first()
        if work is not None:
            self._runs[work.run].move_to_end(work.session)
            self._runs.move_to_end(work.run)
            self._remove(work)
        return work

    def remove(self, unwanted: Callable[[Work], bool]) -> list[Work]:
        """Removes all requests for which `unwanted` holds."""
        waiting = [works for sessions in self._runs.values() for works in sessions.values()]
        removed = [work for works in waiting for work in works.values() if unwanted(work)]
        for work in removed:
            self._remove(work)
        return removed

    def _remove(self, work: Work) -> None:
        sessions = self._runs[work.run]
        del sessions[work.session][work.request_id]
        if not sessions[work.session]:
            del sessions[work.session]
        if not sessions:
            del self._runs[work.run]


class Demand:
    """Counts the runs that have asked recently. Each may take an equal share of the target's bounds, a sole
    run all of it.

    Without it a run that fills the queue, and refills it as it empties, would leave no room for another.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds, as `time.monotonic`."""
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: dict[str, float] = {}  # run -> when

    def note(self, run: str) -> int:
        """Notes that `run` asks now; the number of runs that asked in the last two seconds, with this one."""
        now = self._clock()
        with self._lock:
            self._asked[run] = now
            self._asked = {run: asked for run, asked in self._asked.items() if now - asked < _RECENT}
            return len(self._asked)

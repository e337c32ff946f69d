"""Fairness between jobs: turns in the queue, and the number of jobs that share the target's bounds."""

import threading
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Any

from eagle_rpc.errors import EagleRpcError

# Seconds after which a refused sender may ask again.
SHORTEST_RETRY, LONGEST_RETRY = 0.01, 1.0
# Seconds; longer than any refused sender waits before it asks again, so that its job keeps its share.
_RECENT = 2.0


@dataclass(eq=False, slots=True)
class Work:
    """One request of a session, and the future of its answer."""

    request: Any
    job: str
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
    """Jobs take turns, then the sessions of a job; within a session the first come is the first served.

    Not safe for threads.
    """

    def __init__(self) -> None:
        # Job, session and request id, each level in the order of service.
        self._jobs: OrderedDict[str, OrderedDict[str, dict[str, Work]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(self.num_of_job(job) for job in self._jobs)

    def num_of_job(self, job: str) -> int:
        """The number of requests of all sessions of a job."""
        return sum(map(len, self._jobs[job].values())) if job in self._jobs else 0

    def num_of_session(self, job: str, session: str) -> int:
        """The number of requests of one session."""
        return len(self._of_session(job, session))

    def find(self, job: str, session: str, request_id: str) -> Work | None:
        """The request of this id."""
        return self._of_session(job, session).get(request_id)

    def _of_session(self, job: str, session: str) -> dict[str, Work]:
        return self._jobs[job].get(session, {}) if job in self._jobs else {}

    def put(self, work: Work) -> None:
        """Adds `work` behind its session's other work, or in the place of a request with the same id."""
        self._jobs.setdefault(work.job, OrderedDict()).setdefault(work.session, {})[work.request_id] = work

    def take(self) -> Work | None:
        """Removes the next request in turn; None if the queue is empty."""
        if not self._jobs:
            return None
        sessions = next(iter(self._jobs.values()))
        work = next(iter(next(iter(sessions.values())).values()))
        sessions.move_to_end(work.session)
        self._jobs.move_to_end(work.job)
        self._remove(work)
        return work

    def remove(self, unwanted: Callable[[Work], bool]) -> list[Work]:
        """Removes all requests for which `unwanted` holds."""
        waiting = [
            work for sessions in self._jobs.values() for works in sessions.values() for work in works.values()
        ]
        removed = [work for work in waiting if unwanted(work)]
        for work in removed:
            self._remove(work)
        return removed

    def _remove(self, work: Work) -> None:
        sessions = self._jobs[work.job]
        del sessions[work.session][work.request_id]
        if not sessions[work.session]:
            del sessions[work.session]
        if not sessions:
            del self._jobs[work.job]


class Demand:
    """Counts the jobs that have asked recently. Each may take an equal share of the target's bounds, a sole
    job all of it.

    Without it a job that fills the queue, and refills it as it empties, would leave no room for another.
    """

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds, as `time.monotonic`."""
        self._clock = clock
        self._lock = threading.Lock()
        self._asked: dict[str, float] = {}  # job -> when

    def note(self, job: str) -> int:
        """Notes that `job` asks now; the number of jobs that asked in the last two seconds, with this one."""
        now = self._clock()
        with self._lock:
            self._asked[job] = now
            self._asked = {job: asked for job, asked in self._asked.items() if now - asked < _RECENT}
            return len(self._asked)

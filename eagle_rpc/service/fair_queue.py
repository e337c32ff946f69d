"""What waits for the forward thread, in the order in which it is served."""

from collections import OrderedDict
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch.futures import Future

from eagle_rpc.supervision import Reply


@dataclass(eq=False, slots=True)
class Work:
    """Something that the forward thread does for one session."""

    request: Any
    job: str
    session: str
    request_id: str
    deadline: float  # on the scheduler's clock
    settle: Callable[[Reply], None]  # told the reply just before its receiver is
    reply: Future  # of a Reply


class FairQueue:
    """Jobs take turns, then the sessions of a job; a session's work is first come, first served. Not safe for threads."""

    def __init__(self) -> None:
        # Job, session and request id, each level in the order of service.
        self._jobs: OrderedDict[str, OrderedDict[str, dict[str, Work]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(self.num_of_job(job) for job in self._jobs)

    def num_of_job(self, job: str) -> int:
        """How much waits for the sessions of one job."""
        return sum(map(len, self._jobs.get(job, {}).values()))

    def num_of_session(self, job: str, session: str) -> int:
        """How much waits for one session."""
        return len(self._jobs.get(job, {}).get(session, ()))

    def find(self, job: str, session: str, request_id: str) -> Work | None:
        """What waits under this id."""
        return self._jobs.get(job, {}).get(session, {}).get(request_id)

    def put(self, work: Work) -> None:
        """Adds `work` behind its session's other work, or in the place of what waits under the same id."""
        self._jobs.setdefault(work.job, OrderedDict()).setdefault(work.session, {})[work.request_id] = work

    def take(self) -> Work | None:
        """Removes what is next in turn; None if nothing waits."""
        if not self._jobs:
            return None
        sessions = next(iter(self._jobs.values()))
        work = next(iter(next(iter(sessions.values())).values()))
        del self._jobs[work.job][work.session][work.request_id]
        self._jobs[work.job].move_to_end(work.session)
        self._jobs.move_to_end(work.job)
        self._forget_if_empty(work.job, work.session)
        return work

    def remove(self, unwanted: Callable[[Work], bool]) -> list[Work]:
        """Removes what `unwanted` says, in no particular order."""
        everything = [
            work
            for sessions in self._jobs.values()
            for waiting in sessions.values()
            for work in waiting.values()
        ]
        removed = [work for work in everything if unwanted(work)]
        for work in removed:
            del self._jobs[work.job][work.session][work.request_id]
            self._forget_if_empty(work.job, work.session)
        return removed

    def _forget_if_empty(self, job: str, session: str) -> None:
        if not self._jobs[job][session]:
            del self._jobs[job][session]
        if not self._jobs[job]:
            del self._jobs[job]

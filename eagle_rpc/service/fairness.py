"""Fairness between runs: their turns in a bounded queue, and the number of runs that share the bounds."""

import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import EagleRpcError, RequestExpired, TargetBusy
from eagle_rpc.process.waiting import Clock
from eagle_rpc.service.quotas import Quotas
from eagle_rpc.supervision import EncodedSupervision, ServiceTimes

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
    answer: Future[Any] = field(default_factory=Future)
    arrived: float = 0.0  # on the scheduler's clock
    times: ServiceTimes | None = None  # once a pass for it has ended

    def finish(self, outcome: Any) -> None:
        """Records the outcome, an answer with the times of its pass, and hands it to the receiver."""
        if isinstance(outcome, EncodedSupervision):
            outcome.times = self.times
        self.record(outcome)
        set_outcome(self.answer, outcome)

    def finish_replaced(self) -> None:
        """Finishes work that waited when its sender sent it again."""
        self.finish(RequestExpired(f"request {self.request_id!r:.80} was sent again before its turn"))


def set_outcome(answer: Future[Any], outcome: Any) -> None:
    """Completes `answer` with a value, or with the exception if `outcome` is an `EagleRpcError`."""
    if isinstance(outcome, EagleRpcError):
        answer.set_exception(outcome)
    else:
        answer.set_result(outcome)


class Demand:
    """Counts the runs that ask. Each may take an equal share of a bound, a sole run all of it, up to its quota.

    Without it a run that fills the queue, and refills it as it empties, would leave no room for another.
    """

    def __init__(self, clock: Clock, quotas: Quotas | None = None) -> None:
        """`quotas` None: no run has any."""
        self.quotas = quotas or Quotas()
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


class FairQueue:
    """Runs take turns, then their sessions; of a session first come, first served. Not safe for threads."""

    def __init__(self, config: TargetConfig, demand: Demand, *, most: str, most_of_session: str) -> None:
        """`most`, `most_of_session`: the settings of `config` that bound the queue."""
        self._demand = demand
        self._most, self._most_of_session = getattr(config, most), getattr(config, most_of_session)
        self._setting, self._session_setting = f"(target.{most})", f"(target.{most_of_session})"
        # Run, session and request id, each level in the order of service.
        self._runs: OrderedDict[str, OrderedDict[str, dict[str, Work]]] = OrderedDict()

    def __len__(self) -> int:
        return sum(self._num_of_run(run) for run in self._runs)

    def _num_of_run(self, run: str) -> int:
        return sum(map(len, self._runs[run].values())) if run in self._runs else 0

    def _of_session(self, run: str, session: str) -> dict[str, Work]:
        return self._runs[run].get(session, {}) if run in self._runs else {}

    def num_of_session(self, run: str, session: str) -> int:
        """The number of requests of one session."""
        return len(self._of_session(run, session))

    def put(self, work: Work, running: Iterable[Work]) -> Work | None:
        """Adds `work` behind its session's other work, or in the place of a request with the same id.

        Returns the replaced request. Raises `TargetBusy` if there is none and the queue, the session or the quota
        of the run with their `running` work, or the run's equal share of the queue is full.
        """
        replaced = self._of_session(work.run, work.session).get(work.request_id)
        if replaced is None:
            self._check_room(work, list(running))
        self._runs.setdefault(work.run, OrderedDict()).setdefault(work.session, {})[work.request_id] = work
        return replaced

    def _check_room(self, work: Work, running: Sequence[Work]) -> None:
        num_runs, quotas = self._demand.note(work.run), self._demand.quotas
        share, quota = max(1, self._most // num_runs), quotas.of(work.run).requests
        num_running = sum(one.session == work.session for one in running)
        num_of_run = self._num_of_run(work.run) + sum(one.run == work.run for one in running)
        if quota is not None and num_of_run >= quota:
            raise quotas.refusal(work.run, f"have at most {quota} requests under way")
        if self.num_of_session(work.run, work.session) + num_running >= self._most_of_session:
            rule = f"a session must have at most {self._most_of_session} requests under way"
            raise TargetBusy(f"{rule} {self._session_setting}")
        if len(self) >= self._most:
            raise TargetBusy(f"the queue must hold at most {self._most} requests {self._setting}")
        if self._num_of_run(work.run) >= share:
            rule = f"each of {num_runs} runs must have at most {share} of {self._most} requests queued"
            raise TargetBusy(f"{rule} {self._setting}")

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

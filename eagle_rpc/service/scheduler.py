"""One thread that runs forward passes and decodes answers between them, and its bounded, fair queue."""

import contextlib
import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterator
from concurrent.futures import Future
from typing import Any, NamedTuple

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import (
    EagleRpcError,
    RequestExpired,
    TargetBusy,
    TargetDraining,
    TargetFailed,
    UnknownSession,
)
from eagle_rpc.process.waiting import Clock
from eagle_rpc.service.answering import AnswerDesk
from eagle_rpc.service.fairness import LONGEST_RETRY, SHORTEST_RETRY, Demand, FairQueue, Work, set_outcome
from eagle_rpc.service.forward_pass import outcome_of
from eagle_rpc.service.passes import Passes, PassesUnderWay

logger = logging.getLogger(__name__)

# Seconds between two looks whether a GPU is done, while there is nothing else to do.
_LOOK_INTERVAL = 0.001


class _Urgent(NamedTuple):
    run: Callable[[], Any]
    answer: Future[Any]


class ForwardScheduler:
    """Runs requests. Each accepted one is answered exactly once, by a value or by an `EagleRpcError`."""

    def __init__(
        self,
        passes: Passes,
        answers: AnswerDesk,
        config: TargetConfig,
        demand: Demand,
        clock: Clock,
    ) -> None:
        self._under_way = PassesUnderWay(passes, clock)
        self._answers = answers
        self._clock = clock
        self._queue = FairQueue(
            config, demand, most="max_queued_requests", most_of_session="max_queued_per_session"
        )
        self._max_urgent = config.max_queued_requests
        self._urgent: deque[_Urgent] = deque()
        self._running: list[Work | _Urgent] = []
        self._changed = threading.Condition()
        self._draining = False
        self._paused = ""  # why nothing is accepted for now
        self._stopping = False
        self.failure: str | None = None  # why the thread ended by itself
        self._thread = threading.Thread(target=self._serve, name="forward", daemon=True)
        self._thread.start()

    @property
    def draining(self) -> bool:
        """True once `drain` or `stop` was called, and while it is paused: nothing more is accepted."""
        return self._draining or bool(self._paused)

    @property
    def paused(self) -> str:
        """Why nothing is accepted for now; empty while it is."""
        return self._paused

    @property
    def num_passes(self) -> int:
        """Passes that have ended."""
        return self._under_way.num_finished

    @property
    def busy_seconds(self) -> float:
        """Seconds with a pass under way."""
        return self._under_way.busy_seconds

    @property
    def busy_share(self) -> float:
        """Share of the last ten seconds with a pass under way; a pass counts when it ends."""
        return self._under_way.busy_share

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        with self._changed:
            return len(self._queue)

    @property
    def num_running(self) -> int:
        """Requests that the forward thread works on."""
        return len(self._running)

    def num_queued_of(self, run: str, session: str) -> int:
        """Requests of one session that wait."""
        with self._changed:
            return self._queue.num_of_session(run, session)

    @property
    def retry_after(self) -> float:
        """Seconds after which a refused sender may expect room: the present queue at the recent pace."""
        with self._changed:
            seconds = len(self._queue) * self._under_way.seconds_per_request
        return min(max(seconds, SHORTEST_RETRY), LONGEST_RETRY)

    def submit(self, work: Work) -> None:
        """Queues `work`, to be run before its deadline or not at all.

        A request of the same session and id that still waits is replaced, and answered with `RequestExpired`.
        Raises `TargetDraining`, and `TargetBusy` as `FairQueue.put`.
        """
        with self._accepting("requests"):
            replaced = self._queue.put(work, [one for one in self._running if isinstance(one, Work)])
        if replaced is not None:
            replaced.finish_replaced()

    def submit_prompt(self, work: Work) -> None:
        """Queues a prompt. Raises `TargetDraining`, and `TargetBusy` as `AnswerDesk.submit`."""
        with self._accepting("prompts"):
            self._answers.submit(work)

    def submit_first(self, run: Callable[[], Any]) -> Future[Any]:
        """Queues `run` before all requests. Raises `TargetBusy`, `TargetDraining`."""
        urgent = _Urgent(run, Future())
        with self._accepting("sessions"):
            if len(self._urgent) >= self._max_urgent:
                rule = f"at most {self._max_urgent} new sessions must wait"
                raise TargetBusy(f"{rule} (target.max_queued_requests)")
            self._urgent.append(urgent)
        return urgent.answer

    @contextlib.contextmanager
    def _accepting(self, what: str) -> Iterator[None]:
        with self._changed:
            if self._draining:
                raise TargetDraining(f"the target is shutting down and takes no new {what}")
            if self._paused:
                raise TargetDraining(f"the target takes no {what} for now: {self._paused}")
            yield
            self._changed.notify_all()

    def drop_session(self, session: str, why: str) -> None:
        """Answers all waiting requests of `session` with `UnknownSession`; `why` completes "session ... "."""
        error = UnknownSession(f"session {session[:8]} {why} before this request ran")
        self._drop(lambda work: work.session == session, error)

    def cancel(self, session: str, request_ids: Collection[str]) -> int:
        """Answers waiting requests of `session` with `RequestExpired`; returns their number."""
        error = RequestExpired("the request was cancelled by its sender before it ran")
        return self._drop(lambda work: work.session == session and work.request_id in request_ids, error)

    def drop_expired(self) -> None:
        """Answers requests that wait beyond their deadline, so that they take up no room."""
        now = self._clock()
        error = RequestExpired("the request's deadline passed while it waited")
        self._drop(lambda work: work.deadline <= now, error)

    def _drop(self, unwanted: Callable[[Work], bool], reason: EagleRpcError) -> int:
        with self._changed:
            dropped = self._queue.remove(unwanted)
            self._changed.notify_all()
        for work in dropped:
            work.finish(reason)
        return len(dropped) + self._answers.remove(unwanted, reason)

    def pause(self, reason: str) -> None:
        """Answers work that waits with `TargetDraining` and refuses new work, until `resume`. Begun passes go on."""
        with self._changed:
            self._paused = reason
        self._hand_back(TargetDraining(f"the target takes no requests for now: {reason}"))

    def resume(self) -> None:
        """Ends `pause`."""
        with self._changed:
            self._paused = ""

    def drain(self, timeout: float) -> bool:
        """Refuses new work and unbegun prompts; whether all else is answered within `timeout` seconds."""
        with self._changed:
            self._draining = True
        self._answers.refuse_waiting()
        with self._changed:
            return self._changed.wait_for(lambda: not (self._is_wanted or self._running), timeout)

    def stop(self, timeout: float) -> bool:
        """Answers waiting work with `TargetDraining`; whether the thread ends within `timeout` seconds."""
        self._refuse_all(TargetDraining("the target stopped before this request ran"))
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _refuse_all(self, error: EagleRpcError) -> None:
        with self._changed:
            self._draining = self._stopping = True
        self._hand_back(error)

    def _hand_back(self, error: EagleRpcError) -> None:
        """Answers all work that waits with `error`."""
        with self._changed:
            openings, requests = list(self._urgent), self._queue.remove(lambda work: True)
            self._urgent.clear()
            self._changed.notify_all()
        for urgent in openings:
            urgent.answer.set_exception(error)
        for work in requests:
            work.finish(error)
        self._answers.remove(lambda work: True, error)

    def _serve(self) -> None:
        try:
            while self._serve_next():
                self._answers.run_slice()
                with self._changed:
                    self._changed.notify_all()
        except Exception as error:
            # Trainers go elsewhere at once instead of waiting for a thread that has ended.
            logger.exception("the forward thread failed, and with it this target")
            failure = TargetFailed(f"the target's forward thread failed: {type(error).__name__}: {error}")
            self.failure = str(failure)
            for running in self._running:
                if not running.answer.done():
                    running.answer.set_exception(failure)
            self._running = []
            self._refuse_all(failure)

    def _serve_next(self) -> bool:
        """Begins the next work and finishes passes whose turn it is; False when stopping.

        No reply, which may be large, is held when it returns.
        """
        with self._changed:
            self._wait_for_work()
            if self._stopping and not self._under_way:
                return False
            urgent = self._urgent.popleft() if self._urgent else None
            work = None if urgent else self._queue.take()
            beginning = [one for one in (urgent, work) if one is not None]
            self._running = [*self._under_way.works, *beginning]
        if urgent:
            set_outcome(urgent.answer, outcome_of(urgent.run))
        if work:
            self._under_way.begin(work)
        self._under_way.finish_due(idle=work is None)
        with self._changed:
            self._running = [*self._under_way.works]
            self._changed.notify_all()
        return True

    @property
    def _is_wanted(self) -> bool:
        """Whether the thread has something to begin or to decode."""
        return bool(self._urgent or self._queue or self._answers.busy)

    def _wait_for_work(self) -> None:
        """Waits until there is work to begin, or a pass to finish without waiting for a GPU."""
        while not (self._is_wanted or self._stopping):
            if not self._under_way:
                self._changed.wait()
            elif self._under_way.first_is_done:
                return
            else:
                self._changed.wait(_LOOK_INTERVAL)

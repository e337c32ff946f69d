"""One thread that runs forward passes, fed from a bounded queue that is fair between jobs and their sessions."""

import logging
import threading
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch.futures import Future

from eagle_rpc.errors import EagleRpcError, RequestExpired, TargetBusy, TargetDraining, UnknownSession
from eagle_rpc.service.fair_queue import FairQueue, Work
from eagle_rpc.service.pass_runner import Begun, Passes, PassRunner, answer, reply_of
from eagle_rpc.supervision import Failure, Reply, failure_of

logger = logging.getLogger(__name__)

# Seconds between which a refused sender is told to come back.
_SHORTEST_RETRY, LONGEST_RETRY = 0.01, 1.0
# Seconds between two looks whether a GPU is done, while there is nothing else to do.
_LOOK_INTERVAL = 0.001


class _Urgent(NamedTuple):
    run: Callable[[], Any]
    reply: Future  # of a Reply


class ForwardScheduler:
    """Runs submitted requests. Whatever was accepted is answered exactly once, by a value or a typed failure."""

    def __init__(
        self,
        passes: Passes,
        *,
        max_queued: int,
        max_queued_per_session: int,
        clock: Callable[[], float],
        devices: Sequence[torch.device] = (),
    ):
        """`clock`: seconds, as `time.monotonic`; `devices`: the CUDA devices that results may be on."""
        self._runner = PassRunner(passes, clock)
        self._max_queued = max_queued
        self._max_queued_per_session = max_queued_per_session
        self._clock = clock
        self._devices = list(devices)
        self._queue = FairQueue()
        self._urgent: deque[_Urgent] = deque()
        self._running: list[Work | _Urgent] = []
        self._begun: Begun | None = None
        self._changed = threading.Condition()
        self._draining = False
        self._stopping = False
        self._thread = threading.Thread(target=self._serve, name="forward", daemon=True)
        self._thread.start()

    @property
    def draining(self) -> bool:
        """True once `drain` or `stop` was called: nothing more is accepted."""
        return self._draining

    @property
    def num_queued(self) -> int:
        """Requests that wait."""
        with self._changed:
            return len(self._queue)

    @property
    def num_running(self) -> int:
        """Requests that the forward thread works on."""
        return len(self._running)

    @property
    def num_passes(self) -> int:
        """Passes so far."""
        return self._runner.num_passes

    def num_queued_of(self, job: str, session: str) -> int:
        """Requests of one session that wait."""
        with self._changed:
            return self._queue.num_of_session(job, session)

    @property
    def retry_after(self) -> float:
        """Seconds after which a refused sender may expect room: what waits now, at the pace of late."""
        with self._changed:
            return min(
                max(len(self._queue) * self._runner.seconds_per_request, _SHORTEST_RETRY), LONGEST_RETRY
            )

    def submit(
        self,
        request: Any,
        *,
        job: str,
        session: str,
        request_id: str,
        deadline: float,
        num_jobs: int,
        settle: Callable[[Reply], None],
    ) -> Future:
        """Queues `request` and returns a future of its `Reply`, which never holds an exception. `settle` gets the reply first.

        Work of the same session and id that still waits gives up its place and is answered `expired`. What has not started
        by `deadline` is not run. Raises `TargetDraining`, or `TargetBusy` where the queue, the session's part of it or, among
        `num_jobs`, the job's equal share of it is full.
        """
        work = Work(
            request, job, session, request_id, deadline, settle, Future(devices=self._devices or None)
        )
        with self._changed:
            if self._draining:
                raise TargetDraining("the target is shutting down and takes no new requests")
            replaced = self._queue.find(job, session, request_id)
            if replaced is None:
                self._check_room(job, session, num_jobs)
            self._queue.put(work)
            self._changed.notify_all()
        if replaced is not None:
            answer(
                replaced,
                failure_of(RequestExpired(f"request {request_id!r:.80} was sent again before this one ran")),
            )
        return work.reply

    def _check_room(self, job: str, session: str, num_jobs: int) -> None:
        running = sum(isinstance(work, Work) and work.session == session for work in self._running)
        if self._queue.num_of_session(job, session) + running >= self._max_queued_per_session:
            raise TargetBusy(
                f"a session must have at most {self._max_queued_per_session} requests under way (target.max_queued_per_session)"
            )
        if len(self._queue) >= self._max_queued:
            raise TargetBusy(
                f"the target's queue must hold at most {self._max_queued} requests (target.max_queued_requests)"
            )
        share = max(1, self._max_queued // num_jobs)
        if self._queue.num_of_job(job) >= share:
            raise TargetBusy(
                f"each of {num_jobs} jobs must have at most {share} of {self._max_queued} requests queued (target.max_queued_requests)"
            )

    def submit_first(self, run: Callable[[], Any]) -> Future:
        """Queues `run` before everything that waits; a future of its `Reply`. Raises `TargetBusy`, `TargetDraining`."""
        urgent = _Urgent(run, Future())
        with self._changed:
            if self._draining:
                raise TargetDraining("the target is shutting down and takes no new sessions")
            if len(self._urgent) >= self._max_queued:
                raise TargetBusy(
                    f"at most {self._max_queued} new sessions must wait (target.max_queued_requests)"
                )
            self._urgent.append(urgent)
            self._changed.notify_all()
        return urgent.reply

    def drop_session(self, session: str, why: str) -> None:
        """Answers everything of `session` that has not started with `unknown_session`; `why` completes "session ... "."""
        self._drop(
            lambda work: work.session == session,
            UnknownSession(f"session {session[:8]} {why} before this request ran"),
        )

    def cancel(self, session: str, request_ids: Collection[str]) -> int:
        """Answers those of `session` that have not started with `expired`; how many there were."""
        return self._drop(
            lambda work: work.session == session and work.request_id in request_ids,
            RequestExpired("the request was cancelled by its sender before it ran"),
        )

    def drop_expired(self) -> None:
        """Answers what waits beyond its deadline, so that it takes up no room."""
        now = self._clock()
        self._drop(
            lambda work: work.deadline <= now, RequestExpired("the request's deadline passed while it waited")
        )

    def _drop(self, unwanted: Callable[[Work], bool], reason: EagleRpcError) -> int:
        with self._changed:
            dropped = self._queue.remove(unwanted)
            self._changed.notify_all()
        for work in dropped:
            answer(work, failure_of(reason))
        return len(dropped)

    def drain(self, timeout: float) -> bool:
        """Refuses new work and waits up to `timeout` seconds for the queue; whether everything was answered."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(
                lambda: not self._queue and not self._urgent and not self._running, timeout
            )

    def stop(self, timeout: float) -> bool:
        """Refuses new work, answers what waits with `draining`, and ends the thread; whether it ended within `timeout` seconds."""
        self._refuse_all(failure_of(TargetDraining("the target stopped before this request ran")))
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def _refuse_all(self, failure: Failure) -> None:
        """Takes no more work and answers with `failure` what waits."""
        with self._changed:
            self._draining = self._stopping = True
            openings, requests = list(self._urgent), self._queue.remove(lambda work: True)
            self._urgent.clear()
            self._changed.notify_all()
        for urgent in openings:
            urgent.reply.set_result(failure)
        for work in requests:
            answer(work, failure)

    def _serve(self) -> None:
        try:
            while self._serve_next():
                pass
        except Exception as error:
            # Trainers go elsewhere at once instead of waiting for a thread that is gone.
            logger.exception("the forward thread failed, and with it this target")
            failure = Failure(
                "failed", f"the target's forward thread failed: {type(error).__name__}: {error}"
            )
            for running in self._running:
                if not running.reply.done():
                    running.reply.set_result(failure)
            self._running = []
            self._refuse_all(failure)

    def _serve_next(self) -> bool:
        """Begins what is next and answers what was begun before it; False when stopping.

        Returning lets go of the replies, which may be large.
        """
        before = self._begun
        with self._changed:
            self._wait_for_work()
            if self._stopping and before is None:
                return False
            urgent = self._urgent.popleft() if self._urgent else None
            work = None if urgent else self._queue.take()
            under_way = [before.work if before else None, urgent, work]
            self._running = [one for one in under_way if one is not None]
        if urgent:
            urgent.reply.set_result(reply_of(urgent.run))
        self._begun = self._runner.begin(work) if work else None
        again = []
        if before and not self._runner.finish(before, alone=self._begun is None):
            again.append(before.work)
        if self._begun and (again or isinstance(self._begun.reply, Failure) or not self._runner.overlaps):
            if not self._runner.finish(self._begun, alone=before is None):
                again.append(self._begun.work)
            self._begun = None
        for one in again:
            self._runner.run_alone(one)
        with self._changed:
            self._running = [self._begun.work] if self._begun else []
            self._changed.notify_all()
        return True

    def _wait_for_work(self) -> None:
        """Until there is something to begin, or to finish without waiting for a GPU."""
        while not (self._urgent or self._queue or self._stopping):
            if self._begun is None:
                self._changed.wait()
            elif self._begun.is_done:
                return
            else:
                self._changed.wait(_LOOK_INTERVAL)

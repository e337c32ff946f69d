"""One thread that runs forward passes, fed from a bounded queue that is fair between sessions."""

import logging
import threading
import time
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.futures import Future

from eagle_rpc.errors import EagleRpcError, RequestExpired, TargetBusy, TargetDraining, TargetOutOfMemory, UnknownSession
from eagle_rpc.supervision import Failure, Ok, Reply, failure_of

logger = logging.getLogger(__name__)

# What the CPU allocator says; torch has no exception class for it.
_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"


@dataclass(slots=True)
class _Job:
    work: Callable[[], Any]
    deadline: float  # time.monotonic
    reply: Future  # of a Reply


class ForwardScheduler:
    """Runs submitted work one by one. Every job is answered exactly once, by a value or a typed failure."""

    def __init__(self, *, max_queued: int, devices: Sequence[torch.device] = ()):
        """`devices`: the CUDA devices that results may be on."""
        self._max_queued = max_queued
        self._devices = list(devices)
        self._queues: OrderedDict[str, deque[_Job]] = OrderedDict()  # of sessions that have work, next to serve first
        self._changed = threading.Condition()
        self._running = False
        self._draining = False
        self._stopping = False
        self._counts: Counter[str] = Counter()
        self._thread = threading.Thread(target=self._serve, name="forward", daemon=True)
        self._thread.start()

    @property
    def draining(self) -> bool:
        """True once `drain` or `stop` was called: nothing more is accepted."""
        return self._draining

    def submit(self, work: Callable[[], Any], *, session: str, deadline: float) -> Future:
        """Queues `work` and returns a future of its `Reply`; a refusal is in the future at once.

        `deadline` is a value of `time.monotonic`: work that starts no earlier is dropped. The future never holds an exception.
        """
        job = _Job(work, deadline, Future(devices=self._devices or None))
        with self._changed:
            refusal = self._refusal()
            if refusal is None:
                self._queues.setdefault(session, deque()).append(job)
                self._changed.notify_all()
        if refusal is not None:
            self._answer(job, failure_of(refusal))
        return job.reply

    def _refusal(self) -> EagleRpcError | None:
        if self._draining:
            return TargetDraining("the target is shutting down and takes no new requests")
        if self._num_queued() >= self._max_queued:
            return TargetBusy(f"the target's queue must hold at most {self._max_queued} requests (target.max_queued_requests)")
        return None

    def _num_queued(self) -> int:
        return sum(map(len, self._queues.values()))

    def drop_session(self, session: str) -> None:
        """Answers everything of `session` that has not started with `unknown_session`."""
        with self._changed:
            jobs = self._queues.pop(session, ())
            self._changed.notify_all()
        for job in jobs:
            self._answer(job, failure_of(UnknownSession(f"session {session} was disconnected before this request ran")))

    def drain(self, timeout: float) -> bool:
        """Refuses new work and waits up to `timeout` seconds for the queue; whether everything was answered."""
        with self._changed:
            self._draining = True
            return self._changed.wait_for(lambda: not self._queues and not self._running, timeout)

    def stop(self, timeout: float) -> bool:
        """Refuses new work, answers what waits with `draining`, and ends the thread; whether it ended within `timeout` seconds."""
        with self._changed:
            self._draining = self._stopping = True
            abandoned = [job for queue in self._queues.values() for job in queue]
            self._queues.clear()
            self._changed.notify_all()
        for job in abandoned:
            self._answer(job, failure_of(TargetDraining("the target stopped before this request ran")))
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def stats(self) -> dict[str, int]:
        """Requests waiting (`queued`) and answered since the start, by outcome (`ok` or a failure's code)."""
        with self._changed:
            return {"queued": self._num_queued(), **self._counts}

    def _serve(self) -> None:
        while (job := self._take()) is not None:
            self._answer(job, self._run(job))
            with self._changed:
                self._running = False
                self._changed.notify_all()

    def _take(self) -> _Job | None:
        """The next job in turn; waits for one, None when stopping."""
        with self._changed:
            self._changed.wait_for(lambda: self._queues or self._stopping)
            if self._stopping:
                return None
            session, queue = next(iter(self._queues.items()))
            job = queue.popleft()
            if queue:
                self._queues.move_to_end(session)
            else:
                del self._queues[session]
            self._running = True
            return job

    def _run(self, job: _Job) -> Reply:
        late = time.monotonic() - job.deadline
        if late >= 0:
            return failure_of(RequestExpired(f"the request's deadline passed {late:.3f} s before its turn; it was not run"))
        try:
            return Ok(job.work())
        except EagleRpcError as error:
            return failure_of(error)
        except Exception as error:
            if is_out_of_memory(error):
                logger.warning("a request was refused for want of memory: %s", error)
                return failure_of(TargetOutOfMemory(f"the target ran out of memory; send fewer tokens at a time ({error})"))
            logger.exception("a forward pass failed")
            return Failure("failed", f"{type(error).__name__}: {error}")

    def _answer(self, job: _Job, reply: Reply) -> None:
        with self._changed:
            self._counts["ok" if isinstance(reply, Ok) else reply.code] += 1
        job.reply.set_result(reply)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is torch's or the CPU allocator's want of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_OUT_OF_MEMORY in str(error)

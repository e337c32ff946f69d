"""Forward passes: begun, finished, their requests answered, their pace known."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from eagle_rpc.errors import EagleRpcError, RequestExpired, TargetOutOfMemory
from eagle_rpc.service.fair_queue import Work
from eagle_rpc.supervision import Failure, Ok, Reply, failure_of

logger = logging.getLogger(__name__)

# What the CPU allocator says; torch has no exception class for it.
_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"
# Weight of the newest pass in the average of the seconds that a request takes.
_NEWEST = 0.2


class StartedPass(Protocol):
    """A pass under way."""

    @property
    def is_done(self) -> bool:
        """Whether `finish` would not have to wait."""

    def finish(self) -> Any:
        """The request's value; what it raises fails the request."""


class Passes(Protocol):
    """What the forward thread does with requests."""

    @property
    def overlaps(self) -> bool:
        """Whether one pass may be started before the one before it is finished."""

    def start(self, request: Any) -> StartedPass:
        """Begins a pass; what it raises fails the request."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A request whose pass has begun, or has failed to."""

    work: Work
    reply: Reply  # of a StartedPass
    began: float

    @property
    def is_done(self) -> bool:
        """Whether `PassRunner.finish` would not have to wait."""
        try:
            return isinstance(self.reply, Failure) or self.reply.value.is_done
        except RuntimeError:
            # A GPU that has failed says so wherever it is asked; `finish` answers with it.
            return True


class PassRunner:
    """Runs passes for one thread; requests are answered by values or typed failures."""

    def __init__(self, passes: Passes, clock: Callable[[], float]) -> None:
        """`clock`: seconds, as `time.monotonic`."""
        self._passes = passes
        self._clock = clock
        self._last_finish = clock()
        self.num_passes = 0
        """Passes so far."""
        self.seconds_per_request = 0.0
        """Of late."""

    @property
    def overlaps(self) -> bool:
        """Whether one pass may be begun before the one before it is finished."""
        return self._passes.overlaps

    def begin(self, work: Work) -> Begun:
        """Starts a pass for `work`, unless it is late."""
        began = self._clock()
        late = began - work.deadline
        if late >= 0:
            expired = RequestExpired(
                f"the request's deadline passed {late:.3f} s before its turn; it was not run"
            )
            return Begun(work, failure_of(expired), began)
        return Begun(work, reply_of(lambda: self._passes.start(work.request)), began)

    def finish(self, begun: Begun, *, alone: bool) -> bool:
        """Answers the request of a pass; False if it is to run again alone.

        That is a request that found too little memory while, unless `alone`, another pass was under way.
        """
        reply = begun.reply
        if isinstance(reply, Ok):
            reply = reply_of(reply.value.finish)
            self._note_pass(begun)
        if isinstance(reply, Failure) and reply.code == "out_of_memory" and not alone:
            return False
        answer(begun.work, reply)
        return True

    def run_alone(self, work: Work) -> None:
        """Begins and answers one request while nothing else is under way."""
        self.finish(self.begin(work), alone=True)

    def _note_pass(self, begun: Begun) -> None:
        now = self._clock()
        # One that was started while another ran took its time from when that one was finished.
        seconds, self._last_finish = now - max(begun.began, self._last_finish), now
        self.num_passes += 1
        self.seconds_per_request += _NEWEST * (seconds - self.seconds_per_request)


def reply_of(run: Callable[[], Any]) -> Reply:
    """What `run` returns, or the failure that what it raises stands for."""
    try:
        return Ok(run())
    except EagleRpcError as error:
        return failure_of(error)
    except Exception as error:
        if is_out_of_memory(error):
            logger.warning("a request was refused for want of memory: %s", error)
            return failure_of(
                TargetOutOfMemory(f"the target ran out of memory; send fewer tokens at a time ({error})")
            )
        logger.exception("a forward pass failed")
        return Failure("failed", f"{type(error).__name__}: {error}")


def answer(work: Work, reply: Reply) -> None:
    """Settles the books of `work`, then tells its receiver."""
    work.settle(reply)
    work.reply.set_result(reply)


def is_out_of_memory(error: BaseException) -> bool:
    """Whether `error` is torch's or the CPU allocator's want of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_OUT_OF_MEMORY in str(error)

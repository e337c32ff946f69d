"""Passes under way: finished in the order in which they began, and run again alone where memory was short."""

import threading
from collections import deque
from dataclasses import dataclass
from typing import Any, Protocol

from eagle_rpc.errors import EagleRpcError, RequestExpired, TargetOutOfMemory
from eagle_rpc.process.waiting import Clock
from eagle_rpc.service.fairness import Work
from eagle_rpc.service.forward_pass import PassRequest, outcome_of
from eagle_rpc.service.rates import RecentRate
from eagle_rpc.supervision import EncodedSupervision, ServiceTimes

# Weight of the newest pass in the average of the seconds that a request takes.
_NEWEST = 0.2


class Started(Protocol):
    """A pass that has begun."""

    @property
    def is_done(self) -> bool:
        """Whether `finish` would not wait."""

    def wait(self) -> None:
        """Waits until all is computed. Raises the error of a pass that failed."""

    def finish(self) -> EncodedSupervision:
        """The supervision. To be called once."""


class Passes(Protocol):
    """Runs the target on requests."""

    @property
    def most_before(self) -> int:
        """Unfinished passes beside which one more may start."""

    def start(self, request: PassRequest) -> Started:
        """Begins a pass."""


@dataclass(frozen=True, slots=True)
class _Begun:
    """A request whose pass has started, or failed to."""

    work: Work
    started: Started | EagleRpcError
    began: float

    @property
    def is_done(self) -> bool:
        """Whether it can be finished without waiting."""
        try:
            return isinstance(self.started, EagleRpcError) or self.started.is_done
        except RuntimeError:
            # A GPU that has failed raises wherever it is asked; finishing the pass reports it.
            return True


class PassesUnderWay:
    """Begins and finishes passes, and measures them. The figures may be read from any thread."""

    def __init__(self, passes: Passes, clock: Clock) -> None:
        self._passes = passes
        self._clock = clock
        self._begun: deque[_Begun] = deque()  # in the order in which they are answered
        self._last_computed = self._last_finish = clock()
        self._lock = threading.Lock()
        self._busy = RecentRate(clock)  # seconds with a pass under way
        self.num_finished = 0
        self.seconds_per_request = 0.0
        """Average of the recent ones."""

    def __len__(self) -> int:
        return len(self._begun)

    @property
    def works(self) -> list[Work]:
        """The requests under way."""
        return [begun.work for begun in self._begun]

    @property
    def busy_seconds(self) -> float:
        """Seconds with a pass under way."""
        return self._busy.total

    @property
    def busy_share(self) -> float:
        """Share of the last ten seconds with a pass under way; a pass counts when it ends."""
        with self._lock:
            return min(1.0, self._busy.per_second)

    @property
    def first_is_done(self) -> bool:
        """Whether the oldest pass, of at least one, can be finished without waiting."""
        return self._begun[0].is_done

    def begin(self, work: Work) -> None:
        """Starts a pass for `work`, unless its deadline has passed."""
        self._begun.append(self._start(work))

    def finish_due(self, *, idle: bool) -> None:
        """Finishes the passes whose turn it is.

        All of them if the newest one could not start; else the oldest one, if there is nothing to begin
        (`idle`) or no further pass may start beside those under way.
        """
        if self._begun and isinstance(self._begun[-1].started, EagleRpcError):
            self._finish_all()
        elif self._begun and (idle or len(self._begun) > self._passes.most_before):
            self._finish_first()

    def _finish_first(self) -> None:
        """Finishes the oldest pass; all of them if it finds too little memory beside others."""
        first = self._begun.popleft()
        if not self._finish(first, alone=not self._begun):
            self._finish_all(again=[first.work])

    def _finish_all(self, again: list[Work] | None = None) -> None:
        """Finishes all passes in order, then runs those again, each alone, that found too little memory."""
        again = again or []
        alone = len(self._begun) == 1 and not again
        while self._begun:
            begun = self._begun.popleft()
            if not self._finish(begun, alone=alone):
                again.append(begun.work)
        for work in again:
            self._finish(self._start(work), alone=True)

    def _start(self, work: Work) -> _Begun:
        began = self._clock()
        late = began - work.deadline
        if late >= 0:
            message = f"the request's deadline passed {late:.3f} s before its turn; it was not run"
            return _Begun(work, RequestExpired(message), began)
        return _Begun(work, outcome_of(lambda: self._passes.start(work.request)), began)

    def _finish(self, begun: _Begun, *, alone: bool) -> bool:
        """Answers the request of a pass; False if it shall run again alone.

        That is a request without enough memory while, unless `alone`, another pass was under way.
        """
        outcome: Any = begun.started
        if not isinstance(begun.started, EagleRpcError):
            started = begun.started
            outcome = outcome_of(lambda: self._finished(begun, started))
            self._note_pass(begun.began)
        if isinstance(outcome, TargetOutOfMemory) and not alone:
            return False
        begun.work.finish(outcome)
        return True

    def _finished(self, begun: _Begun, started: Started) -> EncodedSupervision:
        """The supervision of a pass, whose times its work gets."""
        # A device works on one pass after the other.
        free = max(begun.began, self._last_computed)
        started.wait()
        computed = self._last_computed = self._clock()
        encoded = started.finish()
        begun.work.times = ServiceTimes(
            queue=free - begun.work.arrived, forward=computed - free, encode=self._clock() - computed
        )
        return encoded

    def _note_pass(self, began: float) -> None:
        now = self._clock()
        # A pass that started while another ran had the device to itself only when that one was finished.
        seconds, self._last_finish = now - max(began, self._last_finish), now
        self.num_finished += 1
        with self._lock:
            self._busy.add(seconds)
        self.seconds_per_request += _NEWEST * (seconds - self.seconds_per_request)

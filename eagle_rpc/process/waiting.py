"""Waits that have a bound and log what they wait for."""

import logging
import threading
import time
from collections.abc import Callable

from eagle_rpc.errors import WaitTimeout

logger = logging.getLogger(__name__)

# Seconds until the first line in the log, so that short waits are silent, and between two lines.
_FIRST_LINE_SECONDS = 1.0
_LINE_SECONDS = 10.0

Clock = Callable[[], float]
"""Seconds since some moment, as `time.monotonic` gives them."""


class BoundedWait:
    """The clock of one wait for `what`, `seconds` at most. The caller checks, pauses and decides."""

    def __init__(self, what: str, seconds: float, *, clock: Clock = time.monotonic) -> None:
        """`what` completes "waiting for ...". The wait begins now."""
        self.what = what
        self.seconds = seconds
        self._clock = clock
        self._started = clock()
        self._next_line = self._started + _FIRST_LINE_SECONDS

    @property
    def elapsed(self) -> float:
        """Seconds since the wait began."""
        return self._clock() - self._started

    @property
    def left(self) -> float:
        """Seconds until the bound, 0 beyond it."""
        return max(0.0, self.seconds - self.elapsed)

    @property
    def over(self) -> bool:
        """Whether the bound is reached."""
        return self.left == 0.0

    def say(self, why: object = "") -> None:
        """Logs "waiting for ..., n of m s: `why`" after a second and then every ten seconds."""
        now = self._clock()
        if now >= self._next_line:
            self._next_line = now + _LINE_SECONDS
            logger.info("%s", self._line(why))

    def timeout(self, why: object = "") -> WaitTimeout:
        """The error to raise at the bound."""
        return WaitTimeout(f"gave up {self._line(why)}")

    def _line(self, why: object) -> str:
        reason = f": {why}" if str(why) else ""
        return f"waiting for {self.what}, {self.elapsed:.0f} of {self.seconds:.0f} s{reason}"


def wait_until(
    holds: Callable[[], bool],
    what: str,
    *,
    seconds: float,
    stop: threading.Event,
    pause: float = 0.2,
    why: Callable[[], object] = str,
) -> bool:
    """Checks `holds()` every `pause` seconds; returns True once it holds, False once `stop` is set.

    `why()` gives the reason that is logged. Raises `WaitTimeout` after `seconds`.
    """
    wait = BoundedWait(what, seconds)
    while not holds():
        if stop.is_set():
            return False
        if wait.over:
            raise wait.timeout(why())
        wait.say(why())
        stop.wait(pause)
    return True

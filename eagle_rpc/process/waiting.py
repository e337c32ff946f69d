"""A wait that has a bound and says what it waits for."""

import logging
import threading
import time
from collections.abc import Callable

from eagle_rpc.errors import WaitTimeout

logger = logging.getLogger(__name__)

# Seconds between two lines in the log.
_LINE_SECONDS = 10.0


class BoundedWait:
    """One wait for `what`, from its construction on, `seconds` at most. The caller looks, pauses and decides."""

    def __init__(self, what: str, seconds: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        """`what` completes "waiting for ...", `clock` gives seconds."""
        self.what = what
        self.seconds = seconds
        self._clock = clock
        self._started = self._last_line = clock()

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
        """Logs "waiting for ..., n of m s" every ten seconds, with the reason `why`; in between it does nothing."""
        now = self._clock()
        if now - self._last_line >= _LINE_SECONDS:
            self._last_line = now
            logger.info("%s", self._line(why))

    def timeout(self, why: object = "") -> WaitTimeout:
        """The error to raise when the bound is reached."""
        return WaitTimeout(f"gave up {self._line(why)}")

    def _line(self, why: object) -> str:
        return f"waiting for {self.what}, {self.elapsed:.0f} of {self.seconds:.0f} s{f': {why}' if str(why) else ''}"


def wait_until(
    holds: Callable[[], bool],
    what: str,
    *,
    seconds: float,
    stop: threading.Event,
    pause: float = 0.2,
    why: Callable[[], object] = str,
) -> bool:
    """Looks every `pause` seconds until `holds()` or `stop` is set; whether it holds. Raises `WaitTimeout` after `seconds`."""
    wait = BoundedWait(what, seconds)
    while not holds():
        if stop.is_set():
            return False
        if wait.over:
            raise wait.timeout(why())
        wait.say(why())
        stop.wait(pause)
    return True

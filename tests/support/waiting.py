"""Waits with a bound, for states that nothing announces: files that a process writes, its end, a service's answer."""

import threading
import time
from collections.abc import Callable
from typing import Any

_PAUSE = 0.01


def until(holds: Callable[[], Any], what: str, *, seconds: float, seen: Callable[[], str] = str) -> Any:
    """Returns the first true value of `holds`. After `seconds` an assertion fails with `what` and `seen()`."""
    found: list[Any] = []

    def found_something() -> bool:
        found[:] = [holds()]
        return bool(found[0])

    assert happens(found_something, within=seconds), f"waited {seconds:g} s until {what}. {seen()}"
    return found[0]


def happens(
    holds: Callable[[], bool], *, within: float, meanwhile: Callable[[], None] = lambda: None
) -> bool:
    """Whether `holds()` becomes true in `within` seconds. Calls `meanwhile` between two looks."""
    deadline = time.monotonic() + within
    while not holds():
        if time.monotonic() >= deadline:
            return False
        meanwhile()
        threading.Event().wait(_PAUSE)
    return True


def pause(seconds: float, meanwhile: Callable[[], None] = lambda: None) -> None:
    """Lets time pass, as part of an experiment. Calls `meanwhile` often."""
    happens(lambda: False, within=seconds, meanwhile=meanwhile)

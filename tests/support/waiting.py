"""Waiting for what another thread or process does where nothing tells of it: files that it writes, its end, what a service says."""

import threading
import time
from collections.abc import Callable
from typing import Any

_PAUSE = 0.01


def until(holds: Callable[[], Any], what: str, *, seconds: float, seen: Callable[[], str] = str) -> Any:
    """What `holds` returns once that is true. An assertion fails after `seconds` and says `what` was waited for and what was `seen`."""
    deadline = time.monotonic() + seconds
    while not (found := holds()):
        assert time.monotonic() < deadline, f"waited {seconds:g} s until {what}. {seen()}"
        threading.Event().wait(_PAUSE)
    return found

"""Bounded waiting for RPC futures."""

import threading
import time
from collections.abc import Callable
from typing import Any

from torch.futures import Future

from eagle_rpc.errors import WaitTimeout
from eagle_rpc.rpc.failures import classify

# torch marks a call as timed out itself; ours is the second fence, for a future that nobody ever completes.
_GRACE_SECONDS = 5.0
# Seconds between two looks at whether the answer is still wanted.
_LOOK_SECONDS = 0.2


class PendingCall:
    """One RPC under way. `Future.wait` has no bound and swallows Ctrl-C until it ends, so an event is waited for."""

    def __init__(self, future: Future, *, peer: str, what: str, timeout: float) -> None:
        self._future = future
        self._peer = peer
        self._what = what
        self._timeout = timeout
        self._deadline = time.monotonic() + timeout + _GRACE_SECONDS
        self._done = threading.Event()
        future.add_done_callback(lambda _: self._done.set())

    @property
    def done(self) -> bool:
        """Whether `result` returns at once: answered, or given up by torch or by us."""
        return self._done.is_set() or time.monotonic() >= self._deadline

    def when_done(self, callback: Callable[[], None]) -> None:
        """Calls `callback` from a thread of torch when the answer or torch's own error is there; it must not wait."""
        self._future.add_done_callback(lambda _: callback())

    def result(self, unless: Callable[[], bool] = lambda: False) -> Any:
        """The remote value. Raises `WaitTimeout`, `ConnectionLost`, or `TargetFailed` for what the peer raised.

        The wait ends early with `WaitTimeout` once `unless` holds.
        """
        while not self._done.wait(min(_LOOK_SECONDS, max(0.0, self._deadline - time.monotonic()))):
            if time.monotonic() >= self._deadline:
                raise WaitTimeout(f"{self._peer} did not answer {self._what} within {self._timeout:g} s")
            if unless():
                raise WaitTimeout(f"{self._peer} had not answered {self._what} when it was given up")
        try:
            return self._future.wait()
        except Exception as error:  # noqa: BLE001 - torch raises whatever class the peer raised
            raise classify(error, peer=self._peer, what=self._what) from None

"""Bounded waits for RPC futures."""

import threading
from collections.abc import Callable
from typing import Any

from torch.futures import Future

from eagle_rpc.errors import WaitTimeout
from eagle_rpc.process.waiting import BoundedWait
from eagle_rpc.rpc.failures import classify

# torch times a call out by itself; this much later the wait ends for a future that torch never completes.
_GRACE_SECONDS = 5.0
_LOOK_SECONDS = 0.2  # between two looks at whether the answer is still wanted


class PendingCall:
    """One RPC under way. It waits for an event: `Future.wait` has no bound and ignores Ctrl-C."""

    def __init__(self, future: Future[Any], *, peer: str, what: str, timeout: float) -> None:
        """`what` names the call in errors; `timeout`: seconds that torch gives the call."""
        self._future, self._peer, self._what, self._timeout = future, peer, what, timeout
        self._wait = BoundedWait(f"{peer} to answer {what}", timeout + _GRACE_SECONDS)
        self._done = threading.Event()
        future.add_done_callback(lambda _: self._done.set())

    @property
    def done(self) -> bool:
        """Whether `result` returns at once: there is an answer or an error, or the time is over."""
        return self._done.is_set() or self._wait.over

    def when_done(self, callback: Callable[[], None]) -> None:
        """Calls `callback` from a thread of torch after the answer or torch's own error; it must not wait."""
        self._future.add_done_callback(lambda _: callback())

    def result(self, unless: Callable[[], bool] = lambda: False) -> Any:
        """The remote value. Raises as `classify`, and `WaitTimeout` at the bound or once `unless` holds."""
        while not self._done.wait(min(_LOOK_SECONDS, self._wait.left)):
            if self._wait.over:
                raise WaitTimeout(f"{self._peer} did not answer {self._what} within {self._timeout:g} s")
            if unless():
                raise WaitTimeout(f"{self._peer} had not answered {self._what} when it was given up")
        try:
            return self._future.wait()
        except Exception as error:  # noqa: BLE001 - torch raises any class that the peer raised
            raise classify(error, peer=self._peer, what=self._what) from None

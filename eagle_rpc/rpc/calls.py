"""Bounded waits for RPC futures, and the errors that they end with.

torch RPC loses the classes of its own and of most remote errors, so their texts are read. Seen on torch 2.11
to 2.14; `tests/rpc` provokes each kind.
"""

import threading
from collections.abc import Callable
from typing import Any

from torch.futures import Future

from eagle_rpc.errors import ConnectionLost, EagleRpcError, PayloadRefused, TargetFailed, WaitTimeout
from eagle_rpc.process.waiting import BoundedWait

# torch times a call out by itself; this much later the wait ends for a future that torch never completes.
_GRACE_SECONDS = 5.0
_LOOK_SECONDS = 0.2  # between two looks at whether the answer is still wanted

_TIMEOUT = "RPCErr:1:"
_CONNECTION = (
    "this error originated at tensorpipe/",
    "pipe closed",
    "ECONNREFUSED",
    "could not find destination",
)
_REFUSAL = f"{PayloadRefused.__name__}: "
# Before and after the text of an error that a callback raised.
_CALLBACK, _PYTHON_FRAMES = "RuntimeError: ", "\n\nAt:\n"
_CPP_FRAMES = ("frame #", "Exception raised from")


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
            failure = classify(error, peer=self._peer, what=self._what)
            # The future holds the error in C++, where Python collects no cycle: by the frames of its traceback
            # the error would hold the future, and all that the caller holds, for ever.
            error.__traceback__ = None
            raise failure from None


def classify(error: Exception, *, peer: str, what: str) -> EagleRpcError:
    """The error of this package for an error of the RPC `what` to `peer`: `WaitTimeout`, `ConnectionLost`,
    `PayloadRefused`, or `TargetFailed` for an exception that the peer raised.
    """
    # Some classes (KeyError) quote their text when printed.
    text = str(error.args[0] if error.args else error).strip()
    text = text.partition(_PYTHON_FRAMES)[0].removeprefix(_CALLBACK)
    if text.startswith(_TIMEOUT):
        return WaitTimeout(f"{peer} did not answer {what} in time: {text.removeprefix(_TIMEOUT)}")
    if text.startswith(_REFUSAL):
        return PayloadRefused(f"{peer} refused {what}: {text.removeprefix(_REFUSAL)}")
    if any(mark in text for mark in _CONNECTION):
        return ConnectionLost(f"lost the connection to {peer} during {what}: {text.splitlines()[0]}")
    # The text is the peer's traceback: its last line that is no C++ frame names the error.
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith(_CPP_FRAMES)]
    return TargetFailed(f"{peer} raised during {what}: {lines[-1] if lines else text}")

"""The two ends of a call to a service: the object that a worker hosts, and a peer's link to it.

The host creates the only RRef to its object: torch never frees an object whose `rpc.remote` maker has died.
Control calls go by name, since they may take a connection of their own; an RRef is bound to its owner's id.
"""

import contextlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch.distributed import rpc
from torch.distributed.rpc.functions import async_execution
from torch.futures import Future

from eagle_rpc.errors import PayloadRefused, TargetFailed
from eagle_rpc.rpc.calls import PendingCall
from eagle_rpc.rpc.envelope import unwrap

_CLOSE_TIMEOUT = 1.0


class _Hosted(NamedTuple):
    service: Any
    methods: frozenset[str]  # that peers may call by name
    rref: Any


_hosted: _Hosted | None = None


def host(service: Any, methods: frozenset[str]) -> None:
    """Offers `service`, whose methods return torch futures, by RRef, and `methods` of it also by name."""
    global _hosted
    assert _hosted is None, "this process hosts an object already"
    _hosted = _Hosted(service, methods, rpc.RRef(service))


def withdraw() -> None:
    """Ends `host`. Calls by RRefs that peers already hold still arrive."""
    global _hosted
    _hosted = None


def hosted_rref() -> Any:
    """Runs at the host: the RRef to the object that it hosts, or None."""
    return None if _hosted is None else _hosted.rref


@async_execution
def call_hosted(method: str, *arguments: Any) -> Future[Any]:
    """Runs at the host: calls one of the methods that `host` named."""
    if _hosted is None or method not in _hosted.methods:
        raise PayloadRefused(f"{method!r:.80} must be a method that this process offers by name")
    future: Future[Any] = getattr(_hosted.service, method)(*arguments)
    return future


class ServiceCall(PendingCall):
    """A call of a hosted object's method. The answer is a `Reply`; `result` takes the value out of it."""

    def result(self, unless: Callable[[], bool] = lambda: False) -> Any:
        """The method's value. Raises the method's error, and the errors of `PendingCall.result`."""
        return unwrap(super().result(unless), sender=self._peer)


@dataclass(kw_only=True)
class Link:
    """The way from here to the service that a peer hosts. Closing it ends nothing at the peer."""

    peer: str  # for errors
    incarnation: str
    data_name: str  # RPC name of the connection for tensors
    control_name: str  # RPC name of the connection for the rest
    between_gpus: bool  # RPC carries CUDA tensors
    _rref: Any = None

    def use_rref(self, timeout: float) -> None:
        """From now on calls with tensors go by RRef instead of by name.

        Raises `TargetFailed` if the peer hosts nothing, `WaitTimeout` or `ConnectionLost` if it cannot be
        reached within `timeout` seconds.
        """
        future = _send(lambda: rpc.rpc_async(self.data_name, hosted_rref, timeout=timeout))
        what = "the request for its service"
        self._rref = PendingCall(future, peer=self.peer, what=what, timeout=timeout).result()
        if self._rref is None:
            raise TargetFailed(f"{self.peer} hosts no service")

    def call(self, method: str, *arguments: Any, what: str, timeout: float) -> ServiceCall:
        """A call that carries tensors; `what` names it in errors."""
        # Another thread may release it meanwhile.
        rref = self._rref
        if rref is None:
            return self._call_by_name(self.data_name, method, arguments, what, timeout)
        future = _send(lambda: getattr(rref.rpc_async(timeout=timeout), method)(*arguments))
        return ServiceCall(future, peer=self.peer, what=what, timeout=timeout)

    def control(self, method: str, *arguments: Any, timeout: float) -> ServiceCall:
        """A small call, which does not wait behind tensors."""
        return self._call_by_name(self.control_name, method, arguments, method, timeout)

    def _call_by_name(
        self, worker: str, method: str, arguments: tuple[Any, ...], what: str, timeout: float
    ) -> ServiceCall:
        args = (method, *arguments)
        future = _send(lambda: rpc.rpc_async(worker, call_hosted, args=args, timeout=timeout))
        return ServiceCall(future, peer=self.peer, what=what, timeout=timeout)

    def release(self, *, broken: bool = False) -> None:
        """Drops the RRef, which tells its owner, before the peer leaves this worker's table.

        `broken`: the connections do not work any more; torch closes their files.
        """
        self._rref = None
        for worker in (self.data_name, self.control_name) if broken else ():
            close_broken(worker)


def close_broken(worker: str) -> None:
    """Sends a call and ignores it: torch closes a broken connection's files only when a call on it fails."""
    with contextlib.suppress(RuntimeError):
        rpc.rpc_async(worker, hosted_rref, timeout=_CLOSE_TIMEOUT)


def _send(send: Callable[[], Future[Any]]) -> Future[Any]:
    """The future of a call. Where torch raises at once, the future holds the error."""
    try:
        return send()
    except RuntimeError as error:
        future: Future[Any] = Future()
        future.set_exception(error)
        return future

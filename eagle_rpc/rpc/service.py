"""The object that a worker serves, and the way its peers reach it.

The server creates one RRef to it: objects made by `rpc.remote` stay pinned for ever when their maker dies. Control calls
go by name, since they may take a connection of their own, which an RRef, bound to its owner's id, cannot.
"""

import contextlib
from typing import Any

from torch.distributed import rpc
from torch.distributed.rpc.functions import async_execution
from torch.futures import Future

from eagle_rpc.errors import PayloadRefused, TargetFailed
from eagle_rpc.rpc.calls import PendingCall

_NUDGE_TIMEOUT = 1.0

_rrefs: dict[str, Any] = {}
_by_name: dict[str, tuple[Any, frozenset[str]]] = {}


def host(name: str, service: Any, methods: frozenset[str]) -> None:
    """Makes `service` reachable for `Link`: by RRef, and its `methods` by name. One object a name."""
    assert name not in _rrefs, f"{name} is hosted already"
    _by_name[name] = (service, methods)
    _rrefs[name] = rpc.RRef(service)


def withdraw(name: str) -> None:
    """Ends what `host` began; calls on RRefs handed out before still arrive."""
    _rrefs.pop(name, None)
    _by_name.pop(name, None)


class Link:
    """The way from here to the object that a peer hosts. Closing it ends nothing at the peer."""

    def __init__(
        self,
        peer: str,
        service: str,
        *,
        incarnation: str,
        data: str,
        control: str,
        by_rref: bool,
        between_gpus: bool,
        timeout: float,
    ) -> None:
        """`peer`: the name for people; `data`, `control`: RPC names of the connections for tensors and for everything else.

        With `by_rref` bulk calls go by RRef, otherwise by name; `between_gpus`: RPC carries CUDA tensors.
        Raises `TargetFailed` if the peer hosts no such service, `WaitTimeout` or `ConnectionLost` if it cannot be reached
        within `timeout` seconds.
        """
        self.peer = peer
        self.incarnation = incarnation
        self.between_gpus = between_gpus
        self._service = service
        self._data = data
        self._control = control
        self._rref = self._fetch_rref(timeout) if by_rref else None

    def _fetch_rref(self, timeout: float) -> Any:
        what = f"the request for its {self._service}"
        rref = self._call_by_name(self._data, what, timeout, hosted_rref, self._service).result()
        if rref is None:
            raise TargetFailed(f"{self.peer} hosts no {self._service}")
        return rref

    def call(self, method: str, *arguments: Any, what: str, timeout: float) -> PendingCall:
        """A call that carries tensors; `what` names it in errors."""
        # Another thread may release it meanwhile.
        rref = self._rref
        if rref is None:
            return self._call_by_name(
                self._data, what, timeout, call_hosted, self._service, method, *arguments
            )
        try:
            future = getattr(rref.rpc_async(timeout=timeout), method)(*arguments)
        except RuntimeError as error:
            future = _failed(error)
        return PendingCall(future, peer=self.peer, what=what, timeout=timeout)

    def control(self, method: str, *arguments: Any, timeout: float) -> PendingCall:
        """A small call, which does not wait behind tensors."""
        return self._call_by_name(
            self._control, method, timeout, call_hosted, self._service, method, *arguments
        )

    def release(self) -> None:
        """Lets go of the RRef, which tells its owner; call it before the peer leaves this worker's table."""
        self._rref = None

    def nudge(self) -> None:
        """As the function of that name, on both connections."""
        for worker in (self._data, self._control):
            nudge(worker)

    def _call_by_name(
        self, worker: str, what: str, timeout: float, function: Any, *arguments: Any
    ) -> PendingCall:
        try:
            future = rpc.rpc_async(worker, function, args=arguments, timeout=timeout)
        except RuntimeError as error:
            future = _failed(error)
        return PendingCall(future, peer=self.peer, what=what, timeout=timeout)


def nudge(worker: str) -> None:
    """Sends something that nobody waits for: torch keeps a broken connection's files open until a call on it has failed."""
    with contextlib.suppress(RuntimeError):
        rpc.rpc_async(worker, hosted_rref, args=("",), timeout=_NUDGE_TIMEOUT)


def _failed(error: Exception) -> Future:
    """torch raises at once where it knows that a call cannot be sent; every failure should come the same way."""
    future: Future = Future()
    future.set_exception(error)
    return future


def hosted_rref(name: str) -> Any:
    """Runs at the host: the RRef to what it hosts under `name`, or None."""
    return _rrefs.get(name)


@async_execution
def call_hosted(name: str, method: str, *arguments: Any) -> Future:
    """Runs at the host: one of the methods that `host` named, whose value may be a future."""
    service, methods = _by_name.get(name, (None, frozenset()))
    if method not in methods:
        raise PayloadRefused(f"{method!r:.80} must be a method that {name!r:.80} offers by name")
    value = getattr(service, method)(*arguments)
    if isinstance(value, Future):
        return value
    answered: Future = Future()
    answered.set_result(value)
    return answered

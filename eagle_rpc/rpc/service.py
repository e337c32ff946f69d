"""The object that a worker serves, and the way its peers obtain one RRef to it.

The server creates the RRef: objects made by `rpc.remote` stay pinned for ever when their maker dies.
"""

from typing import Any

from torch.distributed import rpc

from eagle_rpc.errors import TargetFailed
from eagle_rpc.rpc.calls import PendingCall

_hosted: dict[str, Any] = {}


def host(name: str, service: Any) -> None:
    """Makes `service` reachable for `connect`. One object a name."""
    assert name not in _hosted, f"{name} is hosted already"
    _hosted[name] = rpc.RRef(service)


def withdraw(name: str) -> None:
    """Ends what `host` began; calls on RRefs handed out before still arrive."""
    _hosted.pop(name, None)


def connect(worker: str, name: str, *, timeout: float) -> Any:
    """An RRef to the object that `worker` hosts under `name`; waits `timeout` seconds at most.

    Raises `TargetFailed` if it hosts nothing of that name, `WaitTimeout` or `ConnectionLost` if it cannot be reached.
    """
    future = rpc.rpc_async(worker, _hosted_rref, args=(name,), timeout=timeout)
    rref = PendingCall(future, peer=worker, what=f"the request for its {name}", timeout=timeout).result()
    if rref is None:
        raise TargetFailed(f"{worker} hosts no {name}")
    return rref


def _hosted_rref(name: str) -> Any:
    return _hosted.get(name)

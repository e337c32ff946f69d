"""Every private part of torch RPC that this package touches, each in one function, and a check that they are what they were.

torch promises nothing about them. `tests/unit/rpc/test_torch_internals.py` has a test for each, so that a new torch fails there.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import astuple, dataclass
from typing import Any

import torch
from torch.distributed import rpc
from torch.distributed.rpc import _utils, api, internal, rref_proxy

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConfigError, PayloadRefused


def _part(module: Any, name: str) -> Any:
    if not hasattr(module, name):
        raise ConfigError(
            f"{module.__name__} must have {name} for the fence around RPC, torch {torch.__version__} has it not"
        )
    return getattr(module, name)


# A call as torch pickles it, and a failure as torch expects it in place of a value.
Call = _part(internal, "PythonUDF")
RemoteFailure = _part(internal, "RemoteException")

# Functions of torch that its own start and end, and RRef proxies, call at a peer.
GATHER, BROADCAST = _part(api, "_gather_to_leader"), _part(api, "_broadcast_to_followers")
UPDATE_MEMBERSHIP = _part(_utils, "_update_group_membership")
TYPE_OF_RREF = _part(api, "_rref_typeof_on_owner")
INVOKE_METHOD = _part(rref_proxy, "_local_invoke")
INVOKE_ASYNC_METHOD = _part(rref_proxy, "_local_invoke_async_execution")

# Tensors and RRefs are pickled as calls of these methods of torch's pickler, found with `getattr`.
PICKLER = _part(internal, "_InternalRPCPickler")
TENSOR_RECEIVER, RREF_RECEIVER = "_tensor_receiver", "_py_rref_receiver"


@dataclass(slots=True)
class WorkerName:
    """Stands for torch's `WorkerInfo` in a message: that one reads uninitialised memory if it comes without its values."""

    name: str
    id: int


def agent_options(init_method: str, config: RpcConfig, *, cuda: bool) -> rpc.TensorPipeRpcBackendOptions:
    """Options of an agent that uses the configured transports and channels alone; `cuda`: it carries CUDA tensors."""
    return rpc.TensorPipeRpcBackendOptions(
        init_method=init_method,
        num_worker_threads=config.worker_threads,
        rpc_timeout=config.request_timeout,
        _transports=config.transports,
        _channels=config.channels or (None if cuda else ["basic"]),
    )


def bound_url(name: str) -> str:
    """Where the running agent listens, which has that RPC name: `transport://host:port` of the last of its transports."""
    return api._get_current_rpc_agent().store.get(f"addrs/{name}").decode()


def add_peer(name: str, worker_id: int, url: str, device_maps: Mapping[str, Mapping[str, str]]) -> None:
    """Makes a peer known to an agent that is alone in its group.

    `device_maps`: for callers by name, from this process's device to the caller's, as `cuda:0`. A known name or id stays as it is.
    """
    agent = api._get_current_rpc_agent()
    agent.store.set(f"addrs/{name}", url)
    maps = {
        caller: {torch.device(here): torch.device(there) for here, there in one.items()}
        for caller, one in device_maps.items()
    }
    devices = sorted({here for one in maps.values() for here in one}, key=str)
    agent._update_group_membership(rpc.WorkerInfo(name, worker_id), devices, maps, True)


def remove_peer(name: str, worker_id: int) -> None:
    """Forgets a peer. torch keeps only those device maps and devices of the others that it is told to keep: all of them."""
    agent = api._get_current_rpc_agent()
    kept = {info.name: {} for info in agent.get_worker_infos() if info.name != name}
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    agent._update_group_membership(rpc.WorkerInfo(name, worker_id), devices, kept, False)


def join_alone(me: WorkerName, devices: list[torch.device], reverse_maps: dict[str, Any]) -> None:
    """What an agent that starts alone calls at itself."""
    api._get_current_rpc_agent()._update_group_membership(
        rpc.WorkerInfo(me.name, me.id), devices, reverse_maps, True
    )


def my_name() -> WorkerName:
    """Name and id of the running agent."""
    info = api._get_current_rpc_agent().get_worker_info()
    return WorkerName(info.name, info.id)


def static_workers() -> frozenset[str]:
    """Names of all workers of a static world; none if the running agent is not in one."""
    agent = api._get_current_rpc_agent()
    return frozenset(info.name for info in agent.get_worker_infos()) if agent.is_static_group else frozenset()


def agent_runs() -> bool:
    """Whether this process has an agent."""
    return api._is_current_rpc_agent_set()


def rref_id(rref: Any) -> str:
    """Identity of the object that an RRef refers to; every reference to it has the same."""
    _, _, after = str(rref).partition("GloballyUniqueId(")
    return after.partition(")")[0]


@dataclass(frozen=True, slots=True)
class RRefFork:
    """An RRef under way: what its `_serialize` gives."""

    owner: int  # worker id
    created_on: int  # with `local_id`: identity of the object
    local_id: int
    fork_created_on: int
    fork_local_id: int
    parent: int  # worker id of the sender
    type_name: str

    @classmethod
    def of(cls, parts: Any) -> "RRefFork":
        """Raises `PayloadRefused` unless `parts` are well formed: torch's C++ would parse any type in them, however deep."""
        if not (
            type(parts) is tuple
            and len(parts) == 7
            and all(type(part) is int for part in parts[:6])
            and parts[6] == "PyObject"
        ):
            raise PayloadRefused("an RRef must be six numbers and the type PyObject")
        return cls(*parts)

    @property
    def id(self) -> str:
        """As `rref_id` gives it."""
        return f"created_on={self.created_on}, local_id={self.local_id}"

    def receive(self) -> Any:
        """The RRef; torch counts it and tells its owner."""
        return rpc.PyRRef._deserialize(astuple(self))


def replace_handlers(*, deserialize: Callable[[bytes, list[Any]], Any], run: Callable[[Any], Any]) -> None:
    """Puts `deserialize` and `run` in place of the functions that torch's C++ looks up when the next agent starts."""
    internal.deserialize = deserialize
    internal._run_function = run


# What `check_internals` compares: parameters of functions, fields of named tuples, methods of classes.
_PARAMETERS = {
    "internal.deserialize": (internal, "deserialize", ["binary_data", "tensor_table"]),
    "internal._run_function": (internal, "_run_function", ["python_udf"]),
    "api._gather_to_leader": (
        api,
        "_gather_to_leader",
        ["sequence_id", "worker_name", "obj", "worker_names"],
    ),
    "api._broadcast_to_followers": (api, "_broadcast_to_followers", ["sequence_id", "objects_map"]),
    "api._rref_typeof_on_owner": (api, "_rref_typeof_on_owner", ["rref", "blocking"]),
    "rref_proxy._local_invoke": (rref_proxy, "_local_invoke", ["rref", "func_name", "args", "kwargs"]),
    "_utils._update_group_membership": (
        _utils,
        "_update_group_membership",
        ["worker_info", "my_devices", "reverse_device_map", "is_join"],
    ),
}
_FIELDS = {"PythonUDF": ("func", "args", "kwargs"), "RemoteException": ("msg", "exception_type")}
_METHODS = {
    "TensorPipeAgent": (
        rpc.TensorPipeAgent,
        ["store", "is_static_group", "get_worker_infos", "_update_group_membership"],
    ),
    "PyRRef": (rpc.PyRRef, ["_serialize", "_deserialize", "local_value", "is_owner"]),
    "_InternalRPCPickler": (PICKLER, [TENSOR_RECEIVER, RREF_RECEIVER]),
}


def check_internals() -> None:
    """Raises `ConfigError` naming the first part of torch that is not as the fence requires: better no RPC than an open one."""
    for name, (module, attribute, expected) in _PARAMETERS.items():
        # Ours have replaced two of them after the first fence.
        function = getattr(module, attribute, None)
        found = list(inspect.signature(function).parameters) if callable(function) else None
        if found != expected:
            raise _unexpected(name, f"take {', '.join(expected)}", found)
    for name, fields in _FIELDS.items():
        found = getattr(getattr(internal, name, None), "_fields", None)
        if found != fields:
            raise _unexpected(f"internal.{name}", f"have fields {', '.join(fields)}", found)
    for name, (cls, methods) in _METHODS.items():
        missing = [method for method in methods if not hasattr(cls, method)]
        if missing:
            raise _unexpected(name, f"have {', '.join(methods)}", f"no {', '.join(missing)}")


def _unexpected(name: str, rule: str, found: Any) -> ConfigError:
    return ConfigError(
        f"torch.distributed.rpc {name} must {rule} for the fence around RPC, torch {torch.__version__} has {found}"
    )

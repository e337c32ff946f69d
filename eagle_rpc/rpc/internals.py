"""The private parts of torch RPC that this package uses. No other module knows them.

torch promises nothing about them. `check_internals` refuses a torch in which one of them has changed, and
`tests/unit/rpc/test_torch_internals.py` has a test for the behaviour of each.
"""

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.distributed import rpc
from torch.distributed.rpc import _utils, api, internal, rref_proxy

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConfigError, PayloadRefused

_PARAMETERS: dict[tuple[Any, str], str] = {}


def _part(owner: Any, name: str, parameters: str) -> Any:
    """A part of torch and the parameters that `check_internals` expects of it; None if torch lacks it."""
    _PARAMETERS[owner, name] = parameters
    return getattr(owner, name, None)


# What C++ calls with each message: one function reads it, the other one runs it.
_part(internal, "deserialize", "binary_data, tensor_table")
_part(internal, "_run_function", "python_udf")

# A call as torch pickles it, and a failure that torch expects in place of a value.
Call = _part(internal, "PythonUDF", "func, args, kwargs")
RemoteFailure = _part(internal, "RemoteException", "msg, exception_type")

# torch's pickler writes tensors and RRefs as calls of two of its methods, which it finds with `getattr`.
PICKLER = _part(internal, "_InternalRPCPickler", "")
TENSOR_RECEIVER, RREF_RECEIVER = "_tensor_receiver", "_py_rref_receiver"
_part(PICKLER, TENSOR_RECEIVER, "tensor_index")
_part(PICKLER, RREF_RECEIVER, "rref_fork_data")

# Functions of torch that workers call at each other: at the start and end of a static world,
WORLD_FUNCTIONS = (
    _part(api, "_gather_to_leader", "sequence_id, worker_name, obj, worker_names"),
    _part(api, "_broadcast_to_followers", "sequence_id, objects_map"),
)
# when a worker joins, and for a method call by RRef.
_JOIN_PARAMETERS = "worker_info, my_devices, reverse_device_map, is_join"
UPDATE_MEMBERSHIP = _part(_utils, "_update_group_membership", _JOIN_PARAMETERS)
TYPE_OF_RREF = _part(api, "_rref_typeof_on_owner", "rref, blocking")
INVOKE_METHOD = _part(rref_proxy, "_local_invoke", "rref, func_name, args, kwargs")
INVOKE_ASYNC_METHOD = _part(rref_proxy, "_local_invoke_async_execution", "rref, func_name, args, kwargs")


def check_internals() -> None:
    """Raises `ConfigError` for a part of torch that has changed: no RPC is better than an open one."""
    for (owner, name), expected in _PARAMETERS.items():
        part = getattr(owner, name, None)
        found = ", ".join(inspect.signature(part).parameters) if callable(part) else None
        if found != expected:
            rule = f"{owner.__name__}.{name} must take ({expected}) for the fence around RPC"
            raise ConfigError(f"{rule}, torch {torch.__version__} has {found}")


def replace_handlers(*, deserialize: Callable[[bytes, list[Any]], Any], run: Callable[[Any], Any]) -> None:
    """Replaces the functions that torch's C++ looks up when the next agent starts."""
    internal.deserialize = deserialize
    internal._run_function = run


# --- the agent


def agent_options(init_method: str, config: RpcConfig, *, cuda: bool) -> rpc.TensorPipeRpcBackendOptions:
    """Options of an agent with the configured transports and channels only; `cuda`: it sends CUDA tensors."""
    return rpc.TensorPipeRpcBackendOptions(
        init_method=init_method,
        num_worker_threads=config.worker_threads,
        rpc_timeout=config.request_timeout,
        _transports=config.transports,
        _channels=config.channels or (None if cuda else ["basic"]),
    )


def _agent() -> rpc.TensorPipeAgent:
    return cast(rpc.TensorPipeAgent, api._get_current_rpc_agent())


def agent_name(worker: str) -> str:
    """The name of a worker in RPC, where torch allows no dots."""
    return worker.replace(".", "-")


def agent_runs() -> bool:
    """Whether this process has an agent."""
    return api._is_current_rpc_agent_set()


def bound_url(name: str) -> str:
    """Address of the running agent `name`: `transport://host:port` of its last transport."""
    return _agent().store.get(f"addrs/{name}").decode()


@dataclass(frozen=True, slots=True)
class WorkerName:
    """In messages in place of torch's `WorkerInfo`, which without its values reads uninitialised memory."""

    name: str
    id: int


def my_name() -> WorkerName:
    """Name and id of the running agent."""
    info = _agent().get_worker_info()
    return WorkerName(info.name, info.id)


def in_static_world() -> bool:
    """Whether the running agent has started together with others, and not alone."""
    return _agent().is_static_group


# --- the table of peers of an agent that is alone in its group


def add_peer(name: str, worker_id: int, url: str, device_maps: Mapping[str, Mapping[str, str]]) -> None:
    """Adds a peer. A name or an id that the table has already stays as it is.

    `device_maps`: by the name of a caller, devices of this process to devices of the caller, as `cuda:0`.
    """
    agent = _agent()
    agent.store.set(f"addrs/{name}", url)
    maps = {
        caller: {torch.device(here): torch.device(there) for here, there in one.items()}
        for caller, one in device_maps.items()
    }
    devices = sorted({here for one in maps.values() for here in one}, key=str)
    agent._update_group_membership(rpc.WorkerInfo(name, worker_id), devices, maps, True)


def remove_peer(name: str, worker_id: int) -> None:
    """Removes a peer. torch keeps only the device maps and devices given here: those of all others."""
    agent = _agent()
    kept: dict[str, dict[torch.device, torch.device]] = {
        info.name: {} for info in agent.get_worker_infos() if info.name != name
    }
    devices = [torch.device("cuda", index) for index in range(torch.cuda.device_count())]
    agent._update_group_membership(rpc.WorkerInfo(name, worker_id), devices, kept, False)


# --- RRefs


def rref_id(rref: Any) -> str:
    """Identity of the object that an RRef refers to; all references to one object have the same."""
    _, _, after = str(rref).partition("GloballyUniqueId(")
    return after.partition(")")[0]


def fork_identity(fork: Any) -> tuple[int, str]:
    """The owner's worker id and the `rref_id` of an RRef in the form in which it travels.

    Raises `PayloadRefused` for another form: torch's C++ would parse any type in it, nested at any depth.
    """
    if type(fork) is not tuple or [type(part) for part in fork] != [int] * 6 + [str] or fork[6] != "PyObject":
        raise PayloadRefused("an RRef must be six numbers and the type PyObject")
    owner, created_on, local_id, *_ = fork
    return owner, f"created_on={created_on}, local_id={local_id}"


def receive_rref(fork: tuple[Any, ...]) -> Any:
    """The RRef; torch counts it and tells its owner."""
    return rpc.PyRRef._deserialize(fork)

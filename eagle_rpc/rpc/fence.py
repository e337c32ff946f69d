"""The fence around RPC: torch runs and builds anything that a peer names, the fence permits a list only.

`docs/security.md` says which attacks it stops. Operators that torch calls below Python bypass it.
"""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.distributed import rpc

from eagle_rpc.errors import ConfigError, PayloadRefused
from eagle_rpc.rpc import internals
from eagle_rpc.rpc.unpickler import full_name, read_message, stand_in

logger = logging.getLogger(__name__)

_LOG_INTERVAL = 5.0  # seconds
_PROBE_TIMEOUT = 30.0  # seconds
_MAX_TEXT = 2000  # characters of an error that a peer gets


@dataclass(frozen=True, kw_only=True, slots=True)
class Permissions:
    """The functions, methods, values and sizes that this process permits in messages of peers."""

    functions: frozenset[Callable[..., Any]] = frozenset()  # of modules
    # By class, of objects whose RRef a function has returned.
    methods: Mapping[type[Any], frozenset[str]] = field(default_factory=dict)
    types: frozenset[type] = frozenset()  # dataclasses that messages may hold
    proxied: frozenset[type] = frozenset()  # classes of peers' objects whose RRefs this process may hold
    max_pickle_bytes: int  # of a message without its tensors
    max_request_bytes: int  # of the tensors of a call


def install_fence(permissions: Permissions) -> None:
    """Puts a fence around the agent that this process starts next; it replaces an earlier fence.

    Raises `ConfigError` if an agent runs already, which it would not reach, or if torch has changed.
    """
    if internals.agent_runs():
        raise ConfigError("the fence around RPC must be installed before RPC starts, got a running agent")
    internals.check_internals()
    fence = _Fence(permissions)
    internals.replace_handlers(deserialize=fence.deserialize, run=fence.run)


def probe_fence() -> None:
    """Sends the running agent a call to refuse. Raises `ConfigError` if the call succeeds."""
    try:
        rpc.rpc_sync(internals.my_name().name, _never_permitted, timeout=_PROBE_TIMEOUT)
    except RuntimeError as error:
        if PayloadRefused.__name__ not in str(error):
            raise
    else:
        bypass = f"torch {torch.__version__} bypasses the fence around RPC"
        raise ConfigError(f"{bypass}: it ran a function that is not listed")


def _never_permitted() -> None:
    """The function that `probe_fence` calls."""


class _Fence:
    """Reads every message of Python objects, requests and replies, and runs the requests."""

    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions
        self._handed_out: dict[str, Any] = {}  # hosted objects by the id of their RRef
        self._joined = False
        self._silent_until = 0.0  # by the monotonic clock
        functions: dict[Any, Callable[..., Any]] = {
            **{function: function for function in permissions.functions},
            internals.UPDATE_MEMBERSHIP: self._join_alone,
            internals.TYPE_OF_RREF: lambda rref, blocking=True: type(self._hosted(rref)),
            internals.INVOKE_METHOD: self._invoke,
            internals.INVOKE_ASYNC_METHOD: self._invoke,
        }
        self._functions = {full_name(named): function for named, function in functions.items()}
        classes = (internals.Call, internals.RemoteFailure, *permissions.types, *permissions.proxied)
        self._names: dict[str, Any] = {
            **{full_name(named): full_name(named) for named in (*functions, internals.PICKLER, RuntimeError)},
            **{full_name(cls): stand_in(cls) for cls in classes},
            # An agent that starts alone sends itself its name and devices.
            full_name(rpc.WorkerInfo): stand_in(internals.WorkerName),
            full_name(torch.device): torch.device,
        }

    # --- called by torch's C++, with torch's parameter names

    def deserialize(self, binary_data: bytes, tensor_table: list[torch.Tensor]) -> Any:
        """The value of a message, or torch's failure, which `run` returns or a waiting caller raises."""
        return self._guarded(self._read, binary_data, tensor_table)

    def run(self, python_udf: Any) -> Any:
        """The value of a call, or torch's failure."""
        return self._guarded(self._call, python_udf)

    def _guarded(self, step: Callable[..., Any], *values: Any) -> Any:
        try:
            return step(*values)
        except Exception as error:  # noqa: BLE001 - any error goes to the peer, and this process goes on
            text = " ".join(f"{type(error).__name__}: {error}"[:_MAX_TEXT].split())
            self._log(text)
            # torch decodes escapes.
            return internals.RemoteFailure(text.encode("unicode_escape").decode(), RuntimeError)

    def _log(self, text: str) -> None:
        now = time.monotonic()
        # A peer could fill the disk with lines, and the probe's refusal is no news.
        if now >= self._silent_until and _never_permitted.__name__ not in text:
            self._silent_until = now + _LOG_INTERVAL
            logger.warning("refused or failed a request of a peer: %.200a", text)

    # --- values

    def _read(self, data: bytes, tensors: list[torch.Tensor]) -> Any:
        _check_size("an RPC message without its tensors", len(data), self._permissions, "max_pickle_bytes")
        receivers = {
            internals.TENSOR_RECEIVER: tensors.__getitem__,
            internals.RREF_RECEIVER: lambda fork: self._receive_rref(fork),
        }
        message = read_message(data, self._names | {"builtins.getattr": lambda _, name: receivers[name]})
        if isinstance(message, internals.RemoteFailure):
            return internals.RemoteFailure(message.msg, RuntimeError)
        if isinstance(message, internals.Call):
            storages = {storage.data_ptr(): storage for storage in map(torch.Tensor.untyped_storage, tensors)}
            size = sum(storage.nbytes() for storage in storages.values())
            _check_size("the tensors of a call", size, self._permissions, "max_request_bytes")
        return message

    def _receive_rref(self, fork: Any) -> Any:
        owner, identity = internals.fork_identity(fork)
        mine = owner == internals.my_name().id
        # For an unknown id torch makes an empty object, and a caller of `local_value` waits for ever.
        if not (identity in self._handed_out if mine else self._permissions.proxied):
            raise PayloadRefused("an RPC message must hold RRefs only to objects that were handed out")
        return internals.receive_rref(fork)

    # --- calls

    def _call(self, message: Any) -> Any:
        if isinstance(message, internals.RemoteFailure):
            return message
        if not isinstance(message, internals.Call):
            raise PayloadRefused(f"a request must be a call, got {type(message).__name__}")
        function = self._functions.get(message.func) if type(message.func) is str else None
        if function is None:
            raise PayloadRefused(f"a request must call a function that is listed, got {message.func!r:.80}")
        value = _apply(function, message.args, message.kwargs)
        if isinstance(value, rpc.PyRRef) and value.is_owner():
            self._handed_out[internals.rref_id(value)] = value.local_value()
        return value

    def _hosted(self, rref: Any) -> Any:
        hosted = self._handed_out.get(internals.rref_id(rref)) if isinstance(rref, rpc.PyRRef) else None
        if type(hosted) not in self._permissions.methods:
            raise PayloadRefused("a method call must go to an object that was handed out")
        return hosted

    def _invoke(self, rref: Any, method: Any, args: Any, kwargs: Any) -> Any:
        hosted = self._hosted(rref)
        if type(method) is not str or method not in self._permissions.methods[type(hosted)]:
            name = type(hosted).__name__
            raise PayloadRefused(f"a method of {name} must be one that is listed, got {method!s:.80}")
        return _apply(getattr(hosted, method), args, kwargs)

    def _join_alone(self, me: Any, devices: Any, reverse_maps: Any, is_join: Any) -> None:
        if self._joined or internals.in_static_world() or me != internals.my_name():
            raise PayloadRefused("only an agent that starts alone may add itself to its table")
        self._joined = True
        internals.UPDATE_MEMBERSHIP(rpc.WorkerInfo(me.name, me.id), devices, reverse_maps, True)


def _apply(function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
    if type(args) is not tuple or type(kwargs) is not dict:
        raise PayloadRefused("a call must have a tuple and a dictionary of arguments")
    return function(*args, **kwargs)


def _check_size(subject: str, size: int, permissions: Permissions, limit: str) -> None:
    most = getattr(permissions, limit)
    if size > most:
        raise PayloadRefused(f"{subject} must have at most {most} bytes (rpc.{limit}), got {size}")

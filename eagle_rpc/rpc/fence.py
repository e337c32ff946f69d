"""The fence around RPC: torch runs and builds whatever a peer names; this lets in what is listed, and little enough of it.

`docs/security.md` says what it stops and what it does not: operators that torch calls below Python go past it.
"""

import logging
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from typing import Any

import torch
from torch.distributed import rpc

from eagle_rpc.errors import ConfigError, PayloadRefused
from eagle_rpc.rpc import internals
from eagle_rpc.rpc.pickle_reader import Receiver, read_pickle

logger = logging.getLogger(__name__)

_LOG_INTERVAL = 5.0  # seconds
_PROBE_TIMEOUT = 30.0  # seconds
# Set while `probe_fence` asks for a refusal, which is no news.
_probing = threading.Event()
_MAX_TEXT = 2000  # characters of an error that a peer is told


@dataclass(frozen=True, kw_only=True, slots=True)
class Permissions:
    """What peers may have this process do. Raises `ConfigError` for what could not be kept apart from the rest of Python."""

    functions: frozenset[Callable[..., Any]]  # of modules, by identity
    methods: Mapping[
        type, frozenset[str]
    ]  # of objects whose RRef one of `functions` has returned; exact classes
    types: frozenset[type]  # dataclasses that messages may hold
    proxied: frozenset[type]  # classes of peers' objects whose RRefs this process may hold
    max_pickle_bytes: int  # of a message without its tensors
    max_request_bytes: int | None  # tensors of a call; null: no limit

    def __post_init__(self) -> None:
        for cls in self.types:
            if not is_dataclass(cls):
                raise ConfigError(f"types must hold dataclasses only, got {cls.__qualname__}")
        private = [name for names in self.methods.values() for name in names if name.startswith("_")]
        if private:
            raise ConfigError(f"methods must not be private, got {', '.join(private)}")


def raise_fence(permissions: Permissions) -> None:
    """Puts the fence up for the agent that this process starts next, in place of an earlier one.

    Raises `ConfigError` if an agent runs already, which would not see it, or if torch is not as the fence requires.
    """
    if internals.agent_runs():
        raise ConfigError("the fence around RPC must be raised before RPC starts, got a running agent")
    internals.check_internals()
    fence = _Fence(permissions)
    internals.replace_handlers(deserialize=fence.deserialize, run=fence.run)


def probe_fence() -> None:
    """Asks the running agent, through itself, for what nobody may have. Raises `ConfigError` if it complies."""
    _probing.set()
    try:
        rpc.rpc_sync(internals.my_name().name, _forbidden, timeout=_PROBE_TIMEOUT)
    except RuntimeError as error:
        if PayloadRefused.__name__ in str(error):
            return
        raise
    finally:
        _probing.clear()
    raise ConfigError(
        f"torch {torch.__version__} goes past the fence around RPC: it must refuse functions that are not listed"
    )


def _forbidden() -> None:
    """What `probe_fence` asks for."""


class _Fence:
    """Reads every message of Python objects, requests and replies, and runs the requests."""

    def __init__(self, permissions: Permissions) -> None:
        self._permissions = permissions
        self._log = _RefusalLog()
        self._handed_out: dict[str, Any] = {}  # hosted objects by the id of their RRef
        self._starting = True
        self._torch_functions = {
            internals.GATHER: self._gather,
            internals.BROADCAST: self._broadcast,
            internals.UPDATE_MEMBERSHIP: self._join_alone,
            internals.TYPE_OF_RREF: self._type_of,
            internals.INVOKE_METHOD: self._invoke,
            internals.INVOKE_ASYNC_METHOD: self._invoke,
        }
        listed = (internals.Call, internals.RemoteFailure, internals.PICKLER, RuntimeError)
        self._names: dict[tuple[str, str], Any] = {
            (named.__module__, named.__qualname__): named
            for named in (
                *listed,
                *self._torch_functions,
                *permissions.functions,
                *permissions.types,
                *permissions.proxied,
            )
        }
        # An agent that starts alone sends itself its name and devices.
        worker, device = rpc.WorkerInfo, torch.device
        self._names[worker.__module__, worker.__qualname__] = internals.WorkerName
        self._names["torch", device.__qualname__] = Receiver(device)

    # --- called by torch's C++, under torch's names

    def deserialize(self, binary_data: bytes, tensor_table: list[torch.Tensor]) -> Any:
        """The value of a message; a refusal comes as torch's failure, which `run` returns and a waiting caller raises."""
        try:
            if len(binary_data) > self._permissions.max_pickle_bytes:
                raise PayloadRefused(
                    f"an RPC message must pickle to at most {self._permissions.max_pickle_bytes} bytes (rpc.max_pickle_bytes), "
                    f"got {len(binary_data)}"
                )
            message = read_pickle(
                binary_data, {**self._names, ("builtins", "getattr"): self._receivers(tensor_table)}
            )
            if isinstance(message, internals.Call):
                self._check_size(tensor_table)
            return message
        except Exception as error:  # noqa: BLE001 - whatever a peer's bytes lead to, it is told and this process goes on
            return self._refuse(error)

    def run(self, python_udf: Any) -> Any:
        """The value of a call, or torch's failure."""
        if isinstance(python_udf, internals.RemoteFailure):
            return python_udf
        try:
            return self._call(python_udf)
        except Exception as error:  # noqa: BLE001 - whatever a function raises is for its caller
            return self._refuse(error)

    def _refuse(self, error: Exception) -> Any:
        text = " ".join(f"{type(error).__name__}: {error}"[:_MAX_TEXT].split())
        if not _probing.is_set():
            self._log.note(text)
        # torch decodes escapes in what it is given.
        return internals.RemoteFailure(text.encode("unicode_escape").decode("ascii"), RuntimeError)

    # --- what messages may hold

    def _receivers(self, tensors: list[torch.Tensor]) -> Receiver:
        receivers = {
            internals.TENSOR_RECEIVER: Receiver(lambda index: _tensor(tensors, index)),
            internals.RREF_RECEIVER: Receiver(self._receive_rref),
        }

        def attribute(owner: Any, name: Any) -> Receiver:
            if owner is not internals.PICKLER or type(name) is not str or name not in receivers:
                raise PayloadRefused("an RPC message must use getattr for tensors and RRefs only")
            return receivers[name]

        return Receiver(attribute)

    def _receive_rref(self, parts: Any) -> Any:
        fork = internals.RRefFork.of(parts)
        mine = fork.owner == internals.my_name().id
        # torch makes an empty object for an id that it does not know, and whoever asks for its value waits for ever.
        if not (fork.id in self._handed_out if mine else self._permissions.proxied):
            raise PayloadRefused("an RPC message must hold RRefs only to what was handed out")
        return fork.receive()

    def _check_size(self, tensors: list[torch.Tensor]) -> None:
        limit = self._permissions.max_request_bytes
        storages = {storage.data_ptr(): storage.nbytes() for storage in map(_storage, tensors)}
        size = sum(storages.values())
        if limit is not None and size > limit:
            raise PayloadRefused(
                f"the tensors of a call must have at most {limit} bytes (rpc.max_request_bytes), got {size}"
            )

    # --- what messages may call

    def _call(self, message: Any) -> Any:
        if (
            not isinstance(message, internals.Call)
            or type(message.args) is not tuple
            or type(message.kwargs) is not dict
        ):
            raise PayloadRefused(f"a request must be a call with arguments, got {type(message).__name__}")
        own = self._torch_functions.get(message.func) if callable(message.func) else None
        if own is None and message.func not in self._permissions.functions:
            raise PayloadRefused(f"a request must call a function that is listed, got {message.func!r:.80}")
        value = (own or message.func)(*message.args, **message.kwargs)
        if isinstance(value, rpc.PyRRef) and value.is_owner():
            self._handed_out[internals.rref_id(value)] = value.local_value()
        return value

    def _hosted(self, rref: Any) -> Any:
        hosted = self._handed_out.get(internals.rref_id(rref)) if isinstance(rref, rpc.PyRRef) else None
        if hosted is None or type(hosted) not in self._permissions.methods:
            raise PayloadRefused("a method call must go to an object that was handed out")
        return hosted

    def _type_of(self, rref: Any, blocking: Any = True) -> type:
        return type(self._hosted(rref))

    def _invoke(self, rref: Any, method: Any, args: Any, kwargs: Any) -> Any:
        hosted = self._hosted(rref)
        if type(method) is not str or method not in self._permissions.methods[type(hosted)]:
            raise PayloadRefused(
                f"{type(hosted).__name__} must be asked for a method that is listed, got {method!s:.80}"
            )
        if type(args) is not tuple or type(kwargs) is not dict:
            raise PayloadRefused("a method call must have a tuple and a dictionary of arguments")
        return getattr(hosted, method)(*args, **kwargs)

    def _join_alone(self, me: Any, devices: Any, reverse_maps: Any, is_join: Any) -> None:
        if (
            not self._starting
            or internals.static_workers()
            or me != internals.my_name()
            or is_join is not True
        ):
            raise PayloadRefused("only an agent that starts alone may have itself added to its table")
        self._starting = False
        internals.join_alone(me, devices, reverse_maps)

    def _gather(self, sequence: Any, worker: Any, value: Any, workers: Any = None) -> None:
        everybody = internals.static_workers()
        if (
            type(sequence) is not str
            or type(worker) is not str
            or worker not in everybody
            or value is not None
        ):
            raise PayloadRefused("only workers of a static world may gather at its start and end")
        if workers is not None and workers != everybody:
            raise PayloadRefused("all workers of a static world must gather together")
        internals.GATHER(sequence, worker, None, set(everybody))

    def _broadcast(self, sequence: Any, gathered: Any) -> None:
        everybody = internals.static_workers()
        if (
            type(sequence) is not str
            or type(gathered) is not dict
            or not everybody
            or gathered != dict.fromkeys(everybody)
        ):
            raise PayloadRefused("only a static world at its start and end may broadcast")
        internals.BROADCAST(sequence, gathered)


def _tensor(tensors: list[torch.Tensor], index: Any) -> torch.Tensor:
    if type(index) is not int or not 0 <= index < len(tensors):
        raise PayloadRefused(
            f"an RPC message must refer to one of its {len(tensors)} tensors, got {index!r:.80}"
        )
    tensor = tensors[index]
    _storage(tensor)
    return tensor


def _storage(tensor: torch.Tensor) -> Any:
    if tensor.layout is not torch.strided or tensor.is_meta or tensor.is_quantized:
        raise PayloadRefused(
            f"tensors of a message must be dense and have data, got {tensor.layout} {tensor.dtype} on {tensor.device}"
        )
    return tensor.untyped_storage()


class _RefusalLog:
    """One line for the first refusal and at most one every few seconds after it: a peer could fill the disk otherwise."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._silent_until = 0.0
        self._unsaid = 0

    def note(self, text: str) -> None:
        with self._lock:
            now = time.monotonic()
            if now < self._silent_until:
                self._unsaid += 1
                return
            unsaid, self._unsaid = self._unsaid, 0
            self._silent_until = now + _LOG_INTERVAL
        logger.warning(
            "refused or failed a request of a peer (%d more since the last line): %.200s", unsaid, text
        )

"""Python's own unpickler with an allow-list of names and of pickle operations.

Names alone are not enough: the operation BUILD sets attributes of any named object. So a message gets a
stand-in that it cannot change: text for a function, a sealed subclass for a class.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any, NoReturn

from eagle_rpc.errors import PayloadRefused

# Operations for plain values, dataclasses, and calls of the functions that read tensors and RRefs.
_OPERATIONS = frozenset(
    "PROTO FRAME STOP MARK MEMOIZE BINGET LONG_BINGET NONE NEWTRUE NEWFALSE BININT BININT1 BININT2 LONG1 "
    "BINFLOAT SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES EMPTY_TUPLE TUPLE TUPLE1 TUPLE2 TUPLE3 "
    "EMPTY_LIST APPEND APPENDS EMPTY_DICT SETITEM SETITEMS EMPTY_SET ADDITEMS STACK_GLOBAL NEWOBJ BUILD "
    "REDUCE".split()
)
# Results that a message may hold twice. A container that holds another one twice, at sixty levels, cannot be
# printed.
_SHARED = frozenset("SHORT_BINUNICODE BINUNICODE SHORT_BINBYTES BINBYTES STACK_GLOBAL REDUCE".split())
# Five times the largest message, a status with 256 sessions. Hashing a tuple 200,000 levels deep ends the
# process.
MAX_OPERATIONS = 50_000


def full_name(named: Any) -> str:
    """The name under which pickle refers to a class or a function."""
    return f"{named.__module__}.{named.__qualname__}"


def read_message(data: bytes, names: Mapping[str, Any]) -> Any:
    """The value that the pickle `data` stands for; `names`: objects by `full_name`.

    Raises `PayloadRefused` for a name or an operation that is not listed, and for damaged data.
    """
    try:
        _check_operations(data)
        return _Unpickler(data, names).load()
    except PayloadRefused:
        raise
    except Exception as error:  # noqa: BLE001 - damaged data can lead to any error
        text = f"{type(error).__name__}: {error}"
        raise PayloadRefused(f"an RPC message must be a pickle of permitted values, got {text}") from None


def _check_operations(data: bytes) -> None:
    previous, memo = "", []
    argument: Any
    for count, (operation, argument, _) in enumerate(pickletools.genops(data)):
        if operation.name not in _OPERATIONS:
            raise PayloadRefused(f"an RPC message must not use pickle operation {operation.name}")
        if count == MAX_OPERATIONS:
            raise PayloadRefused(f"an RPC message must have at most {count} pickle operations, got more")
        if operation.name == "MEMOIZE":
            memo.append(previous)
        elif operation.name.endswith("BINGET") and memo[argument] not in _SHARED:
            raise PayloadRefused(f"an RPC message must hold the result of {memo[argument]} only once")
        previous = operation.name


class _Unpickler(pickle.Unpickler):
    def __init__(self, data: bytes, names: Mapping[str, Any]) -> None:
        super().__init__(io.BytesIO(data))
        self._names = names

    def find_class(self, module: str, name: str) -> Any:
        if f"{module}.{name}" not in self._names:
            raise PayloadRefused(f"an RPC message must not name {module:.80}.{name:.80}")
        return self._names[f"{module}.{name}"]


class _Sealed(type):
    """The type of a stand-in."""

    def _refuse(cls, *args: Any, **kwargs: Any) -> NoReturn:
        raise PayloadRefused(f"an RPC message must not call {cls.__name__} or set its attributes")

    __call__ = __setattr__ = _refuse


def stand_in(cls: type) -> type:
    """A subclass of `cls` for messages to name in its place.

    A pickle makes from it a dataclass with exactly the fields of `cls`, or a named tuple, nothing else.
    """
    making: dict[str, Any] = {"__new__": None}
    if is_dataclass(cls):
        making = {"__setstate__": _field_setter(cls)}
    elif issubclass(cls, tuple):
        making = {"__new__": lambda _, *values: cls(*values)}
    return _Sealed(cls.__name__, (cls,), {"__slots__": (), **making})


def _field_setter(cls: type) -> Callable[[Any, Any], None]:
    names = [field.name for field in fields(cls)]

    def set_fields(made: Any, state: Any) -> None:
        # (None, slots) in general, a list of values from a frozen dataclass, a tuple of values from torch.
        slots = type(state) is tuple and state[0] is None
        values = state[1] if slots else dict(zip(names, state, strict=True))
        if set(values) != set(names):
            raise PayloadRefused(f"an RPC message must give {cls.__name__} its fields {', '.join(names)}")
        for name in names:
            object.__setattr__(made, name, values[name])
        object.__setattr__(made, "__class__", cls)

    return set_fields

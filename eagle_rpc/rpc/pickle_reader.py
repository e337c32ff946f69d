"""Reads the part of pickle that messages need, and nothing beyond it.

Python's own unpickler is a machine that calls what the bytes name; even with an allow-list it sets attributes on classes
and allocates by a number in the data. Here three things make an object: a class that the caller lists, whose fields come
all at once; a `Receiver`; and the plain types of Python. What comes out is a shallow tree: hashing or printing a deeply
nested tuple ends the process, and one that contains another twice, and so on, takes for ever.
"""

import struct
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from typing import Any

from eagle_rpc.errors import PayloadRefused

# Values and operations in one message; the largest legitimate one, a status with all its sessions, has a tenth of it.
MAX_OPERATIONS = 100_000
MAX_DEPTH = 16

_CONTAINERS = (tuple, list, dict, set)
_SCALARS = (str, int, float, bool, bytes, type(None))
_MARK = object()


class Receiver:
    """What a message may call: `receive` gets the arguments as they came and must check them."""

    def __init__(self, receive: Callable[..., Any]) -> None:
        self.receive = receive


def read_pickle(data: bytes, names: Mapping[tuple[str, str], Any]) -> Any:
    """The value that `data` stands for; `names` maps (module, qualified name) to what a message may refer to.

    Of these, dataclasses and named tuples can be made, a `Receiver` can be called, anything else is a mere value.
    Raises `PayloadRefused` for everything else; then nothing has been called but receivers.
    """
    reader = _Reader(data, names)
    try:
        return reader.read()
    except (IndexError, KeyError, struct.error, UnicodeDecodeError) as error:
        raise PayloadRefused(
            f"an RPC message must be a whole pickle, got {type(error).__name__} at byte {reader.position}"
        ) from None


class _Reader:
    def __init__(self, data: bytes, names: Mapping[tuple[str, str], Any]) -> None:
        self.position = 0
        self._data = data
        self._names = names
        self._stack: list[Any] = []
        self._memo: list[Any] = []
        self._blank: dict[int, Any] = {}  # made, but without their fields yet

    def read(self) -> Any:
        for _ in range(MAX_OPERATIONS):
            operation = self._data[self.position]
            self.position += 1
            if operation == _STOP:
                return self._finish()
            handler = _OPERATIONS.get(operation)
            if handler is None:
                raise PayloadRefused(f"an RPC message must not hold pickle operation {bytes([operation])!r}")
            handler(self)
        raise PayloadRefused(f"an RPC message must have at most {MAX_OPERATIONS} pickle operations, got more")

    def _finish(self) -> Any:
        if len(self._stack) != 1 or self._stack[0] is _MARK or self._blank:
            raise PayloadRefused("an RPC message must hold one whole value")
        value = self._stack[0]
        level = [value]
        for _ in range(MAX_DEPTH):
            level = [part for one in level for part in _parts(one)]
            if not level:
                return value
        raise PayloadRefused(f"an RPC message must be nested at most {MAX_DEPTH} deep, got more")

    # --- bytes and the stack

    def _take(self, size: int) -> bytes:
        taken = self._data[self.position : self.position + size]
        if len(taken) < size:
            raise IndexError
        self.position += size
        return taken

    def _number(self, form: str) -> Any:
        return struct.unpack(form, self._take(struct.calcsize(form)))[0]

    def _pop(self) -> Any:
        value = self._stack.pop()
        if value is _MARK:
            raise IndexError
        return value

    def _push(self, value: Any) -> None:
        self._stack.append(value)

    def _since_mark(self) -> list[Any]:
        values = []
        while (value := self._stack.pop()) is not _MARK:
            values.append(value)
        return values[::-1]

    def _top(self, wanted: type) -> Any:
        if type(self._stack[-1]) is not wanted:
            raise PayloadRefused(
                f"an RPC message must add to a {wanted.__name__}, got {type(self._stack[-1]).__name__}"
            )
        return self._stack[-1]

    # --- operations

    def _skip_protocol(self) -> None:
        self._take(1)

    def _skip_frame(self) -> None:
        self._take(8)

    def _push_mark(self) -> None:
        self._push(_MARK)

    def _tuple_of(self, size: int) -> None:
        values = [self._pop() for _ in range(size)]
        self._push(tuple(values[::-1]))

    def _append(self) -> None:
        value = self._pop()
        self._top(list).append(value)

    def _appends(self) -> None:
        values = self._since_mark()
        self._top(list).extend(values)

    def _set_item(self) -> None:
        value, key = self._pop(), self._pop()
        self._top(dict)[_hashable(key)] = value

    def _set_items(self) -> None:
        values = self._since_mark()
        target = self._top(dict)
        for key, value in zip(values[::2], values[1::2], strict=False):
            target[_hashable(key)] = value

    def _add_items(self) -> None:
        values = self._since_mark()
        self._top(set).update(map(_hashable, values))

    def _memoize(self) -> None:
        self._memo.append(self._stack[-1])

    def _recall(self, form: str) -> None:
        value = self._memo[self._number(form)]
        if isinstance(value, _CONTAINERS) or value is _MARK or _is_record(value):
            raise PayloadRefused(f"an RPC message must hold a {type(value).__name__} once only")
        self._push(value)

    def _find(self) -> None:
        name, module = self._pop(), self._pop()
        if type(name) is not str or type(module) is not str:
            raise PayloadRefused("an RPC message must name things by text")
        if (module, name) not in self._names:
            raise PayloadRefused(f"an RPC message must not name {module:.80}.{name:.80}")
        self._push(self._names[module, name])

    def _make(self) -> None:
        values, cls = self._pop(), self._pop()
        if type(values) is not tuple or not isinstance(cls, type):
            raise PayloadRefused("an RPC message must make an object of a class and a tuple")
        if is_dataclass(cls) and not values:
            made = object.__new__(cls)
            self._blank[id(made)] = made
        elif len(values) == len(getattr(cls, "_fields", ())) > 0:
            made = cls(*values)
        else:
            raise PayloadRefused(f"an RPC message must not make a {cls.__name__} of {len(values)} values")
        self._push(made)

    def _fill(self) -> None:
        """Gives a dataclass its fields: a list if it is frozen, a dictionary otherwise, a tuple for what is pickled by value."""
        state, made = self._pop(), self._stack[-1]
        if self._blank.pop(id(made), None) is not made:
            raise PayloadRefused(f"an RPC message must not set attributes of a {type(made).__name__}")
        names = [field.name for field in fields(made)]
        if type(state) is tuple and len(state) == 2 and state[0] is None and type(state[1]) is dict:
            values = state[1]
        else:
            values = (
                dict(zip(names, state, strict=False))
                if type(state) in (list, tuple) and len(state) == len(names)
                else {}
            )
        if values.keys() != set(names):
            raise PayloadRefused(
                f"an RPC message must give a {type(made).__name__} its fields {', '.join(names)}"
            )
        for name in names:
            object.__setattr__(made, name, values[name])

    def _call(self) -> None:
        values, receiver = self._pop(), self._pop()
        if type(receiver) is not Receiver or type(values) is not tuple:
            raise PayloadRefused(f"an RPC message must not call a {type(receiver).__name__}")
        self._push(receiver.receive(*values))


def _is_record(value: Any) -> bool:
    return is_dataclass(value) and not isinstance(value, type)


def _parts(value: Any) -> list[Any]:
    """What a value directly holds."""
    if isinstance(value, dict):
        return list(value.values())
    if isinstance(value, _CONTAINERS):
        return list(value)
    if _is_record(value):
        return [getattr(value, field.name) for field in fields(value)]
    return []


def _hashable(key: Any) -> Any:
    """Keys are plain: hashing a deeply nested tuple ends the process."""
    if type(key) not in _SCALARS:
        raise PayloadRefused(f"an RPC message must have plain keys, got a {type(key).__name__}")
    return key


def _text(reader: _Reader, form: str) -> None:
    # Strict: a lone surrogate could be written to no log.
    reader._push(str(reader._take(reader._number(form)), "utf-8"))


_STOP = ord(b".")
_OPERATIONS: dict[int, Callable[[_Reader], None]] = {
    operation[0]: handler
    for operation, handler in {
        b"\x80": _Reader._skip_protocol,
        b"\x95": _Reader._skip_frame,
        b"N": lambda reader: reader._push(None),
        b"\x88": lambda reader: reader._push(True),
        b"\x89": lambda reader: reader._push(False),
        b"K": lambda reader: reader._push(reader._number("<B")),
        b"M": lambda reader: reader._push(reader._number("<H")),
        b"J": lambda reader: reader._push(reader._number("<i")),
        b"\x8a": lambda reader: reader._push(
            int.from_bytes(reader._take(reader._number("<B")), "little", signed=True)
        ),
        b"G": lambda reader: reader._push(reader._number(">d")),
        b"\x8c": lambda reader: _text(reader, "<B"),
        b"X": lambda reader: _text(reader, "<I"),
        b"C": lambda reader: reader._push(reader._take(reader._number("<B"))),
        b"B": lambda reader: reader._push(reader._take(reader._number("<I"))),
        b"(": _Reader._push_mark,
        b")": lambda reader: reader._push(()),
        b"\x85": lambda reader: reader._tuple_of(1),
        b"\x86": lambda reader: reader._tuple_of(2),
        b"\x87": lambda reader: reader._tuple_of(3),
        b"t": lambda reader: reader._push(tuple(reader._since_mark())),
        b"]": lambda reader: reader._push([]),
        b"a": _Reader._append,
        b"e": _Reader._appends,
        b"}": lambda reader: reader._push({}),
        b"s": _Reader._set_item,
        b"u": _Reader._set_items,
        b"\x8f": lambda reader: reader._push(set()),
        b"\x90": _Reader._add_items,
        b"\x94": _Reader._memoize,
        b"h": lambda reader: reader._recall("<B"),
        b"j": lambda reader: reader._recall("<I"),
        b"\x93": _Reader._find,
        b"\x81": _Reader._make,
        b"b": _Reader._fill,
        b"R": _Reader._call,
    }.items()
}

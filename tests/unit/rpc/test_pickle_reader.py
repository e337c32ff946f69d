"""The reader of messages against Python's own pickler."""

import pickle
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_rpc.errors import PayloadRefused
from eagle_rpc.rpc.pickle_reader import MAX_DEPTH, MAX_OPERATIONS, Receiver, read_pickle


@dataclass(frozen=True, slots=True)
class Frozen:
    one: Any
    other: Any = 2


@dataclass(slots=True)
class Slotted:
    one: Any
    other: Any = 2


@dataclass(slots=True)
class Victim:
    """Not for other tests: one of them changes it."""

    one: Any
    other: Any = 2


@dataclass
class Plain:
    one: Any
    other: Any = 2


Pair = namedtuple("Pair", "left right")
LISTED = (Frozen, Slotted, Victim, Pair)
NAMES = {(cls.__module__, cls.__qualname__): cls for cls in LISTED}
KEYS = st.none() | st.booleans() | st.integers(-(2**60), 2**60) | st.text(max_size=9) | st.binary(max_size=9)
VALUES = st.recursive(
    KEYS | st.integers(-(2**900), 2**900) | st.floats(allow_nan=False) | st.sets(KEYS, max_size=4),
    lambda inner: (
        st.lists(inner, max_size=5)
        | st.lists(inner, max_size=5).map(tuple)
        | st.dictionaries(KEYS, inner, max_size=4)
        | st.builds(Frozen, inner, inner)
        | st.builds(Slotted, inner, inner)
        | st.builds(Pair, inner, inner)
    ),
    max_leaves=20,
)


@pytest.mark.parametrize("protocol", [4, 5])
@given(value=VALUES)
def test_what_python_writes_is_read_as_python_reads_it(protocol: int, value: Any):
    try:
        read = read_pickle(pickle.dumps(value, protocol), NAMES)
    except PayloadRefused as refused:
        assert "nested" in str(refused) or "once only" in str(refused)
    else:
        assert read == pickle.loads(pickle.dumps(value)) and type(read) is type(value)


@given(st.binary(max_size=200))
def test_whatever_the_bytes_are_they_are_read_or_refused(data: bytes):
    with_header = b"\x80\x04" + data + b"."
    for message in (data, with_header):
        try:
            read_pickle(message, NAMES)
        except PayloadRefused as refused:
            assert "RPC message must" in str(refused)


def test_only_receivers_are_called():
    heard = []
    names = {
        (__name__, "listen"): Receiver(lambda *args: heard.append(args)),
        (__name__, "deaf"): heard.append,
    }
    call = b"\x80\x04\x8c%c" + __name__.encode() + b"\x8c%c%s\x93K\x05\x85R."
    read_pickle(call % (len(__name__), 6, b"listen"), names)
    with pytest.raises(PayloadRefused, match="must not call a builtin_function_or_method"):
        read_pickle(call % (len(__name__), 4, b"deaf"), names)
    assert heard == [(5,)]


def nested(depth: int) -> Any:
    value: Any = 7
    for _ in range(depth):
        value = [value]
    return value


def test_nesting_is_bounded():
    assert read_pickle(pickle.dumps(nested(MAX_DEPTH - 1)), NAMES) == nested(MAX_DEPTH - 1)
    with pytest.raises(PayloadRefused, match="nested at most"):
        read_pickle(pickle.dumps(nested(MAX_DEPTH)), NAMES)


def test_the_work_for_one_message_is_bounded():
    assert len(read_pickle(pickle.dumps([None] * (MAX_OPERATIONS // 2)), NAMES)) == MAX_OPERATIONS // 2
    with pytest.raises(PayloadRefused, match="pickle operations, got more"):
        read_pickle(pickle.dumps([None] * MAX_OPERATIONS), NAMES)


def test_a_value_that_holds_itself_is_refused():
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(PayloadRefused, match="must hold a list once only"):
        read_pickle(pickle.dumps(cycle), NAMES)


@pytest.mark.parametrize(
    "value", [Plain(1), Frozen, len, frozenset([1]), bytearray(2), 2**3000, 1j, ValueError("x")]
)
def test_what_is_not_listed_is_refused_or_a_mere_value(value: Any):
    if value is Frozen:
        assert read_pickle(pickle.dumps(value), NAMES) is Frozen
        return
    with pytest.raises(PayloadRefused):
        read_pickle(pickle.dumps(value), NAMES)


def test_attributes_of_classes_stay_as_they_are():
    text = [b"\x8c%c%s" % (len(part), part.encode()) for part in (__name__, "Victim", "one", "other")]
    change = b"\x80\x04" + text[0] + text[1] + b"\x93N}" + text[2] + b"K\x01s" + text[3] + b"K\x01s\x86b."
    with pytest.raises(PayloadRefused, match="must not set attributes of a type"):
        read_pickle(change, NAMES)
    assert Victim.one != 1
    pickle.loads(change)
    assert Victim.one == 1, "Python's own reader falls for it, which is why there is another one"

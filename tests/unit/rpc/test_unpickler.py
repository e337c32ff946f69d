"""The allow-list of messages: everything that a message needs is read as Python reads it, and everything else
is refused.
"""

import pickle
from collections import namedtuple
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from eagle_rpc.errors import PayloadRefused
from eagle_rpc.rpc.unpickler import MAX_OPERATIONS, full_name, read_message, stand_in


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


class Other:
    """Neither a dataclass nor a named tuple."""


Pair = namedtuple("Pair", "left right")
NAMES = {full_name(cls): stand_in(cls) for cls in (Frozen, Slotted, Victim, Pair)}
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
        read = read_message(pickle.dumps(value, protocol), NAMES)
    except PayloadRefused as refused:
        assert "only once" in str(refused)
    else:
        assert read == pickle.loads(pickle.dumps(value)) and type(read) is type(value)


@given(st.binary(max_size=200))
def test_any_bytes_are_read_or_refused(data: bytes):
    with_header = b"\x80\x04" + data + b"."
    for message in (data, with_header):
        try:
            read_message(message, NAMES)
        except PayloadRefused as refused:
            assert "RPC message must" in str(refused)


def short_text(text: str) -> bytes:
    return b"\x8c%c%s" % (len(text), text.encode())


def name(attribute: str) -> bytes:
    return short_text(__name__) + short_text(attribute) + b"\x93"


def test_a_function_that_names_allow_is_called_with_the_arguments_of_the_message():
    heard = []
    names = {f"{__name__}.listen": lambda *values: heard.append(values), f"{__name__}.text": "text"}
    read_message(b"\x80\x04" + name("listen") + b"K\x05\x85R.", names)
    assert heard == [(5,)]
    with pytest.raises(PayloadRefused, match="'str' object is not callable"):
        read_message(b"\x80\x04" + name("text") + b"K\x05\x85R.", names)


@pytest.mark.parametrize("cls", ["Frozen", "Slotted", "Pair"])
def test_a_class_is_not_called(cls: str):
    with pytest.raises(PayloadRefused, match=f"must not call {cls}"):
        read_message(b"\x80\x04" + name(cls) + b"K\x05K\x06\x86R.", NAMES)


@pytest.mark.parametrize("dotted", ["Frozen.__init__", "Frozen.__init__.__globals__", "Frozen.one"])
def test_a_dotted_name_leads_nowhere(dotted: str):
    with pytest.raises(PayloadRefused, match="must not name"):
        read_message(b"\x80\x04" + name(dotted) + b".", NAMES)


def test_the_work_for_one_message_is_bounded():
    assert len(read_message(pickle.dumps([None] * (MAX_OPERATIONS // 2)), NAMES)) == MAX_OPERATIONS // 2
    with pytest.raises(PayloadRefused, match=f"at most {MAX_OPERATIONS} pickle operations"):
        read_message(pickle.dumps([None] * MAX_OPERATIONS), NAMES)


def test_the_deepest_tuple_can_be_hashed():
    depth = MAX_OPERATIONS - 5
    assert hash(read_message(b"\x80\x04)" + b"\x85" * depth + b".", NAMES))


def test_a_value_that_holds_itself_is_refused():
    cycle: list[Any] = []
    cycle.append(cycle)
    with pytest.raises(PayloadRefused, match="must hold the result of EMPTY_LIST only once"):
        read_message(pickle.dumps(cycle), NAMES)


@pytest.mark.parametrize("value", [len, frozenset([1]), bytearray(2), 2**3000, 1j, ValueError("x"), range(3)])
def test_a_value_that_is_not_listed_is_refused(value: Any):
    with pytest.raises(PayloadRefused):
        read_message(pickle.dumps(value), NAMES)


def test_an_object_of_a_class_that_is_no_dataclass_is_not_made():
    names = {full_name(Other): stand_in(Other)}
    assert issubclass(read_message(b"\x80\x04" + name("Other") + b".", names), Other)
    with pytest.raises(PayloadRefused):
        read_message(pickle.dumps(Other()), names)


@pytest.mark.parametrize("cls", [Victim, Pair, Other])
def test_attributes_of_classes_stay_as_they_are(cls: type):
    names = {full_name(cls): stand_in(cls)}
    change = b"\x80\x04" + name(cls.__name__) + b"N}" + short_text("changed") + b"K\x01s\x86b."
    with pytest.raises(PayloadRefused):
        read_message(change, names)
    assert not hasattr(cls, "changed")
    pickle.loads(change)
    assert cls.changed == 1, "an allow-list of names alone permits this, which is why classes have stand-ins"


@pytest.mark.parametrize("state", [b"]K\x05a", b"](K\x05K\x06K\x07e", b"N\x85", b")"])
def test_a_frozen_dataclass_of_another_version_is_refused(state: bytes):
    with pytest.raises(PayloadRefused):
        read_message(b"\x80\x04" + name("Frozen") + b")\x81" + state + b"b.", NAMES)


@pytest.mark.parametrize("fields", [("one",), ("one", "another"), ("one", "other", "another")])
def test_a_dataclass_of_another_version_is_refused(fields: tuple[str, ...]):
    slots = b"}" + b"".join(short_text(field) + b"K\x05s" for field in fields)
    with pytest.raises(PayloadRefused, match="must give Slotted its fields one, other"):
        read_message(b"\x80\x04" + name("Slotted") + b")\x81N" + slots + b"\x86b.", NAMES)

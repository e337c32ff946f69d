from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from registry_cases import target

from eagle_rpc.errors import InvalidRequest
from eagle_rpc.registry.record import from_json, record_from_json, record_to_json, sighting_from_json, to_json

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4),
    max_leaves=12,
)


@settings(deadline=None)
@given(status=st.dictionaries(st.text(max_size=8), JSON, max_size=5))
def test_a_record_survives_the_wire(status):
    record = target(status=status)
    assert record_from_json(from_json(to_json(record_to_json(record)))) == record


@settings(deadline=None)
@given(value=JSON)
def test_anything_else_is_refused_by_type(value):
    for read in (record_from_json, sighting_from_json):
        with pytest.raises(InvalidRequest):
            read(value)


@settings(deadline=None)
@given(field=st.sampled_from(sorted(record_to_json(target()))), value=JSON)
def test_a_foreign_value_in_any_field_is_refused_or_kept_as_it_is(field, value):
    changed = {**record_to_json(target()), field: value}
    try:
        record = record_from_json(changed)
    except InvalidRequest as error:
        assert str(error).startswith(f"{field} of a record must be ")
    else:
        assert record_to_json(record) == changed


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "target 0"),
        ("name", "t" * 65),
        ("name", "target0\n"),
        ("role", "worker"),
        ("run", "a\x1b[2J"),
        ("run", "j" * 129),
        ("id", 0),
        ("id", 2**14),
        ("id", True),
        ("incarnation", "abc"),
        ("incarnation", "A" * 16),
        ("url", ""),
        ("device", "tpu"),
        ("host", "a b"),
        ("pid", 0),
        ("status", []),
    ],
)
def test_the_rule_of_a_field_is_named(field, value):
    with pytest.raises(InvalidRequest, match=f"^{field} of a record must be "):
        replace(target(), **{field: value})


@pytest.mark.parametrize("text", [b"", b"{", b"\xff", b"NaN", b"[Infinity]", b"[" * 200_000])
def test_what_is_no_json_is_refused(text):
    with pytest.raises(InvalidRequest):
        from_json(text)


@pytest.mark.parametrize("value", [float("nan"), {1, 2}, b"bytes", object()])
def test_what_json_cannot_say_is_not_sent(value):
    with pytest.raises(InvalidRequest):
        to_json({"status": value})

"""What a worker announces of itself, and how it is written as JSON. Everything that is read is checked field by field."""

import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from typing import Any

from eagle_rpc.config.texts import NAME_RULE, is_name
from eagle_rpc.errors import InvalidRequest
from eagle_rpc.registry.ids import LAST_WORKER_ID

# A target with 256 sessions describes itself in a fifth of this.
MAX_RECORD_BYTES = 256 * 2**10


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A worker as the registry knows it. Raises `InvalidRequest` naming field, rule and value."""

    name: str  # "target0"
    role: str  # "target" or "trainer"
    job: str  # run that a trainer belongs to; "" for a target
    id: int  # worker id, from the registry
    incarnation: str  # random id of this process, hexadecimal
    url: str  # TensorPipe's: "uv://127.0.0.1:1234"
    device: str  # "cpu" or "cuda:N"
    host: str
    pid: int
    status: dict[str, Any]  # what the worker tells of itself, for `job=status`

    def __post_init__(self) -> None:
        for field, (holds, rule) in _RULES.items():
            value = getattr(self, field)
            if not holds(value):
                raise InvalidRequest(f"{field} of a record must be {rule}, got {value!r:.80}")

    @property
    def place(self) -> tuple[str, str, str]:
        """What only one living worker may have."""
        return self.role, self.job, self.name

    def __str__(self) -> str:
        return f"{self.name} (incarnation {self.incarnation[:8]}, process {self.pid} on {self.host})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """A record and when it was last heard of."""

    record: Record
    seconds_silent: float
    living: bool  # silent for less than the registry's time to live


def _text(pattern: str) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value) is not None


def _number(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: type(value) is int and low <= value <= high


_RULES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (_text(r"[A-Za-z0-9_-]{1,64}"), "1 to 64 letters, digits, - or _"),
    "role": (_text("target|trainer"), "target or trainer"),
    "job": (is_name, NAME_RULE),
    "id": (_number(1, LAST_WORKER_ID), f"a whole number in 1..{LAST_WORKER_ID}"),
    "incarnation": (_text("[0-9a-f]{16,64}"), "16 to 64 hexadecimal digits"),
    "url": (_text(r"[!-~]{1,512}"), "1 to 512 ASCII characters without blanks"),
    "device": (_text(r"cpu|cuda:\d{1,3}"), "cpu or cuda:N"),
    "host": (_text(r"[!-~]{1,255}"), "1 to 255 ASCII characters without blanks"),
    "pid": (_number(1, 2**31 - 1), "a whole number in 1..2147483647"),
    "status": (lambda value: isinstance(value, dict), "a dict"),
}
_FIELDS = {field.name for field in fields(Record)}


def outlined(record: Record) -> Record:
    """The record as its peers need it: its status says whether it drains, if it said so, and nothing else."""
    draining = record.status.get("draining")
    return replace(record, status={"draining": draining} if isinstance(draining, bool) else {})


def record_to_json(record: Record) -> dict[str, Any]:
    """Its fields, not copied."""
    return {field.name: getattr(record, field.name) for field in fields(record)}


def encoded_record(record: Record) -> bytes:
    """The record as JSON. Raises `InvalidRequest` if it is too large or its status is no plain JSON."""
    encoded = to_json(record_to_json(record))
    if len(encoded) > MAX_RECORD_BYTES:
        raise InvalidRequest(
            f"a record must have at most {MAX_RECORD_BYTES} bytes as JSON, that of {record.name} has {len(encoded)}"
        )
    return encoded


def record_from_json(value: Any) -> Record:
    """Raises `InvalidRequest` for anything but a record."""
    if not isinstance(value, dict) or value.keys() != _FIELDS:
        found = sorted(map(str, value)) if isinstance(value, dict) else value
        raise InvalidRequest(
            f"a record must have exactly the fields {', '.join(sorted(_FIELDS))}, got {found!r:.200}"
        )
    return Record(**value)


def encoded_sighting(record: bytes, *, seconds_silent: float, living: bool) -> bytes:
    """As JSON, made of a record that is JSON already; seconds to the millisecond."""
    return b'{"record":%b,"seconds_silent":%.3f,"living":%b}' % (
        record,
        seconds_silent,
        b"true" if living else b"false",
    )


def encoded_list(values: Iterable[bytes]) -> bytes:
    """The JSON list of values that are JSON already."""
    return b"[%b]" % b",".join(values)


def sighting_from_json(value: Any) -> Sighting:
    """Raises `InvalidRequest` for anything but a sighting."""
    if not isinstance(value, dict) or value.keys() != {"record", "seconds_silent", "living"}:
        raise InvalidRequest(
            f"an entry of a listing must have record, seconds_silent and living, got {value!r:.80}"
        )
    silent, living = value["seconds_silent"], value["living"]
    if not isinstance(silent, int | float) or not isinstance(living, bool):
        raise InvalidRequest(
            f"seconds_silent must be a number and living a bool, got {silent!r:.40} and {living!r:.40}"
        )
    return Sighting(record=record_from_json(value["record"]), seconds_silent=float(silent), living=living)


def to_json(value: Any) -> bytes:
    """Raises `InvalidRequest` for what JSON cannot say, NaN included."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"a message must be plain JSON: {error}") from None


def from_json(text: bytes) -> Any:
    """Raises `InvalidRequest` for anything but JSON."""
    try:
        return json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"a message must be JSON: {error}, got {text!r:.80}") from None


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON number")

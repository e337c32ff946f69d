"""The entry of a worker in the registry, and its JSON. Every field that is read is checked."""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from eagle_rpc.config.texts import NAME_RULE, is_name
from eagle_rpc.errors import InvalidRequest
from eagle_rpc.registry.ids import LAST_WORKER_ID

# Five times the record of a target with 256 sessions.
MAX_RECORD_BYTES = 256 * 2**10


def _matching(pattern: str) -> Callable[[Any], object]:
    return lambda value: isinstance(value, str) and re.fullmatch(pattern, value)


def _within(low: int, high: int) -> Callable[[Any], object]:
    return lambda value: type(value) is int and low <= value <= high


_RULES: dict[str, tuple[Callable[[Any], object], str]] = {
    "name": (_matching(r"[A-Za-z0-9_.-]{1,64}"), "1 to 64 letters, digits, -, _ or ."),
    "role": (_matching("target|stage|trainer"), "target, stage or trainer"),
    "run": (is_name, NAME_RULE),
    "id": (_within(1, LAST_WORKER_ID), f"a whole number in 1..{LAST_WORKER_ID}"),
    "incarnation": (_matching("[0-9a-f]{16,64}"), "16 to 64 hexadecimal digits"),
    "url": (_matching(r"[!-~]{1,512}"), "1 to 512 ASCII characters without blanks"),
    "device": (_matching(r"cpu|cuda:\d{1,3}"), "cpu or cuda:N"),
    "gpu": (_matching("(GPU-[0-9a-f-]{36})?"), "empty or the id of a GPU"),
    "host": (_matching(r"[!-~]{1,255}"), "1 to 255 ASCII characters without blanks"),
    "pid": (_within(1, 2**31 - 1), "a whole number in 1..2147483647"),
    "status": (lambda value: isinstance(value, dict), "a dict"),
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Record:
    """A worker as it announces itself. Raises `InvalidRequest` with field, rule and value."""

    name: str  # "target0"
    role: str  # "target", "stage" (of a target, behind its first one) or "trainer"
    run: str  # run of a trainer; "" for a target
    id: int  # worker id, from the registry
    incarnation: str  # random id of the process, hexadecimal
    url: str  # TensorPipe's: "uv://127.0.0.1:1234"
    device: str  # "cpu" or "cuda:N"
    gpu: str  # "GPU-" and its UUID, the same for all processes; "" for a CPU
    host: str
    pid: int
    status: dict[str, Any]  # plain JSON, for `job=status`

    def __post_init__(self) -> None:
        for field, (holds, rule) in _RULES.items():
            value = getattr(self, field)
            if not holds(value):
                raise InvalidRequest(f"{field} of a record must be {rule}, got {value!r:.80}")

    @property
    def place(self) -> tuple[str, str, str]:
        """Role, run and name: one living worker may have them."""
        return self.role, self.run, self.name

    def __str__(self) -> str:
        return f"{self.name} (incarnation {self.incarnation[:8]}, process {self.pid} on {self.host})"


@dataclass(frozen=True, kw_only=True, slots=True)
class Sighting:
    """A record, and the time since its worker was last heard of."""

    record: Record
    seconds_silent: float
    living: bool  # silent for less than the registry's time to live


def outlined(record: Record) -> Record:
    """The record without its status, except whether the worker drains: peers need no more."""
    draining = record.status.get("draining")
    return replace(record, status={"draining": draining} if isinstance(draining, bool) else {})


def record_to_json(record: Record) -> dict[str, Any]:
    """The fields, not copied."""
    return {field: getattr(record, field) for field in _RULES}


def encoded_record(record: Record) -> bytes:
    """The record as JSON text. Raises `InvalidRequest` if it is too large or its status is not plain JSON."""
    encoded = to_json(record_to_json(record))
    if len(encoded) > MAX_RECORD_BYTES:
        rule = f"a record must have at most {MAX_RECORD_BYTES} bytes as JSON"
        raise InvalidRequest(f"{rule}, that of {record.name} has {len(encoded)}")
    return encoded


def record_from_json(value: Any) -> Record:
    """Raises `InvalidRequest` for anything but a record."""
    if not isinstance(value, dict) or value.keys() != _RULES.keys():
        raise InvalidRequest(f"a record must have exactly the fields {', '.join(_RULES)}, got {value!r:.80}")
    return Record(**value)


def sighting_to_json(sighting: Sighting) -> dict[str, Any]:
    """The fields of the record, `seconds_silent` to the millisecond and `living`, in one dict."""
    silent = round(sighting.seconds_silent, 3)
    return {**record_to_json(sighting.record), "seconds_silent": silent, "living": sighting.living}


def sighting_from_json(value: Any) -> Sighting:
    """Raises `InvalidRequest` for anything but a sighting."""
    match value:
        case {"seconds_silent": int() | float() as silent, "living": bool() as living, **record}:
            return Sighting(record=record_from_json(record), seconds_silent=silent, living=living)
    rule = "a sighting must have the number seconds_silent and the bool living"
    raise InvalidRequest(f"{rule}, got {value!r:.80}")


def to_json(value: Any) -> bytes:
    """Raises `InvalidRequest` for values that JSON does not have, NaN included."""
    try:
        return json.dumps(value, allow_nan=False, separators=(",", ":")).encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidRequest(f"a message must be plain JSON: {error}") from None


def from_json(text: bytes) -> Any:
    """Raises `InvalidRequest` for anything but JSON."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not a JSON number")

    try:
        return json.loads(text, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise InvalidRequest(f"a message must be JSON: {error}, got {text!r:.80}") from None

"""Rules for single settings. A field's type carries its rule: `Positive[int]` or `Annotated[str, NAME]`."""

import functools
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields, is_dataclass
from enum import Enum
from typing import Annotated, Any, TypeVar, get_args, get_type_hints

from eagle_rpc.config.choices import DType
from eagle_rpc.config.texts import ADDRESS_RULE, NAME_RULE, is_address, is_date, is_name, is_pair

_DEVICE = re.compile(r"auto|cpu|cuda(:\d+)?")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Rule:
    """`text` continues "FIELD must"; `holds` judges a value that is not null; the type allows null or not."""

    text: str
    holds: Callable[[Any], bool]


Positive = Annotated[T, Rule("be positive", lambda value: value > 0)]
NotNegative = Annotated[T, Rule("not be negative", lambda value: value >= 0)]
PATH = Rule("not be empty", lambda value: bool(value.strip()))
FilePath = Annotated[str, PATH]
"""Names a file or directory, or something else that may be one; `~` at its start is the home directory."""
Share = Annotated[T, Rule("lie in [0, 1]", lambda value: 0 <= value <= 1)]

SHARE_ABOVE_0 = Rule("lie in (0, 1]", lambda value: 0 < value <= 1)
AT_LEAST_2 = Rule("be at least 2", lambda value: value >= 2)
AT_LEAST_3 = Rule("be at least 3", lambda value: value >= 3)
DECAY = Rule("lie in (0, 1]", lambda value: 0 < value <= 1)
SHARE_BELOW_1 = Rule("lie in [0, 1)", lambda value: 0 <= value < 1)
TWO_SHARES = Rule("be two numbers in [0, 1)", lambda v: len(v) == 2 and all(0 <= beta < 1 for beta in v))
ASCENDING = Rule("ascend", lambda value: value == sorted(set(value)))
ASCENDING_SIZES = Rule(
    "be positive and ascend", lambda value: value == sorted(set(value)) and all(size > 0 for size in value)
)
WEIGHTS = Rule(
    "be empty, or not negative with a positive sum",
    lambda value: not value or (min(value) >= 0 and sum(value) > 0),
)
AUX_LAYERS = Rule(
    "be one to eight distinct layers in ascending order", lambda v: 1 <= len(v) <= 8 and v == sorted(set(v))
)
NOT_FLOAT16 = Rule("be bfloat16 or float32", lambda value: value is not DType.float16)
DATE = Rule("be a day as 2026-01-31", is_date)
NAME = Rule(f"be {NAME_RULE} and not empty", lambda value: is_name(value) and bool(value.strip()))
URLS = Rule(
    "be URLs that begin with http:// or https://",
    lambda value: all(url.startswith(("http://", "https://")) for url in value),
)
DEVICE = Rule("be auto, cpu, cuda or cuda:N", lambda value: _DEVICE.fullmatch(value) is not None)
PORT = Rule("lie in [1024, 65000]", lambda value: 1024 <= value <= 65000)
ADDRESS = Rule(f"be {ADDRESS_RULE}", is_address)
TOPOLOGIES = Rule(
    "name at least one topology, targets x trainers as in 1x2", lambda v: len(v) > 0 and all(map(is_pair, v))
)
SHAPES = Rule("name shapes, sequences x tokens as in 4x2048", lambda value: all(map(is_pair, value)))
UV_LAST = Rule("end with uv, whose address is checked", lambda value: value[-1:] == ["uv"])
FORMS = Rule("name one form or two different ones", lambda v: 0 < len(v) == len(set(v)))
EACH_RUN_ONCE = Rule("name each run once", lambda value: len({one.run for one in value}) == len(value))
NOT_PAGED = Rule("be an implementation without pages", lambda value: not value.startswith("paged"))


def rule_of(hint: Any) -> Rule | None:
    """The rule that a field's type carries."""
    for part in (hint, *get_args(hint)):
        for extra in getattr(part, "__metadata__", ()):
            if isinstance(extra, Rule):
                return extra
    return None


@dataclass(frozen=True, slots=True)
class Setting:
    """One setting of a configuration."""

    path: str
    """As on the command line: `SECTION.FIELD`."""
    hint: Any
    """Its type, with the rule."""
    value: Any
    owner: Any
    """The dataclass that holds it."""

    @property
    def is_path(self) -> bool:
        """Whether it names a file or directory; null does not."""
        return rule_of(self.hint) is PATH and self.value is not None


@functools.cache
def hints_of(section: type) -> dict[str, Any]:
    """The type of each field of a dataclass, with its rule."""
    return get_type_hints(section, include_extras=True)


def settings_of(config: Any, prefix: str = "") -> Iterator[Setting]:
    """All settings of a dataclass, and of dataclasses and lists of them inside it."""
    kind: type = type(config)
    hints = hints_of(kind)
    for name in (field.name for field in fields(config)):
        path, value = f"{prefix}{name}", getattr(config, name)
        if is_dataclass(value):
            yield from settings_of(value, f"{path}.")
            continue
        yield Setting(path, hints[name], value, config)
        for position, element in enumerate(value if isinstance(value, list) else ()):
            if is_dataclass(element):
                yield from settings_of(element, f"{path}[{position}].")


def broken_rules(config: Any) -> Iterator[tuple[str, str]]:
    """Each setting of `config` that breaks its rule: its path and a message."""
    for setting in settings_of(config):
        rule, value = rule_of(setting.hint), setting.value
        nullable = type(None) in get_args(setting.hint)
        if rule and not (nullable and value is None) and not rule.holds(value):
            got = value.name if isinstance(value, Enum) else value
            if isinstance(value, str) and not value.strip():
                got = repr(value)
            or_null = " or null" if nullable else ""
            yield setting.path, f"{setting.path} must {rule.text}{or_null}, got {got}"

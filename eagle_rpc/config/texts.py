"""Rules for texts that other rooms take from their peers as well: one place for each, so that config refuses what they would."""

import re
from typing import Any

from eagle_rpc.errors import ConfigError

# Names are kept, logged and shown.
_LONGEST_NAME = 128
NAME_RULE = f"at most {_LONGEST_NAME} printable characters"
_ADDRESS = re.compile(r"([^\s:]+):([0-9]{1,5})")


def is_name(value: Any) -> bool:
    """Whether `value` is a short line of text, as `NAME_RULE` says; it may be empty."""
    return isinstance(value, str) and len(value) <= _LONGEST_NAME and value.isprintable()


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`. Raises `ConfigError` if it is anything else."""
    match = _ADDRESS.fullmatch(text)
    if match is None or not 0 < int(match[2]) < 2**16:
        raise ConfigError(f"rpc.registry must be host:port with a port in 1..65535, got {text!r}")
    return match[1], int(match[2])

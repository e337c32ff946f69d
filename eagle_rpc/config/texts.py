"""Forms of text that several rooms accept, defined once: the configuration refuses all that they refuse."""

import re
from datetime import date
from typing import Any

from eagle_rpc.errors import ConfigError

NAME_RULE = "at most 128 printable characters"
ADDRESS_RULE = "host:port with a port in 1..65535"
_PAIR = re.compile(r"([1-9]\d*)x([1-9]\d*)")
_ADDRESS = re.compile(r"([^\s:]+):([0-9]{1,5})")


def is_name(value: Any) -> bool:
    """Whether `value` is text as `NAME_RULE` says, and so safe to log and show; it may be empty."""
    return isinstance(value, str) and len(value) <= 128 and value.isprintable()


def is_address(text: str) -> bool:
    """Whether `text` is an address as `ADDRESS_RULE` says."""
    match = _ADDRESS.fullmatch(text)
    return match is not None and 0 < int(match[2]) < 2**16


def parse_address(text: str) -> tuple[str, int]:
    """Host and port of `host:port`. Raises `ConfigError` for any other text."""
    if not is_address(text):
        raise ConfigError(f"rpc.registry must be {ADDRESS_RULE}, got {text!r}")
    host, port = text.split(":")
    return host, int(port)


def is_date(text: str) -> bool:
    """Whether `text` is a day as in 2026-01-31."""
    try:
        return date.fromisoformat(text).isoformat() == text
    except ValueError:
        return False


def is_pair(text: str) -> bool:
    """Whether `text` is two positive numbers as in 4x2048."""
    return _PAIR.fullmatch(text) is not None


def parse_pair(text: str) -> tuple[int, int]:
    """Both numbers of `TARGETSxTRAINERS` or `SEQUENCESxTOKENS`. Raises `ConfigError` for any other text."""
    if not is_pair(text):
        raise ConfigError(f"a topology or shape must be two positive numbers as in 4x2048, got {text!r}")
    first, second = text.split("x")
    return int(first), int(second)

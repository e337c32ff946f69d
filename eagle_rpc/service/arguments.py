"""Checks of arguments: a sender may pass anything."""

import math
from typing import Any

from eagle_rpc.config.texts import NAME_RULE, is_name
from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision import (
    AnswerPrompt,
    AnswerRequest,
    AnswerSettings,
    GenerateRequest,
    SessionSpec,
    TargetExpectation,
    TokenBatch,
)


def check_type(name: str, value: Any, wanted: type) -> None:
    """Raises `InvalidRequest` unless `value` is a `wanted`."""
    if not isinstance(value, wanted):
        raise InvalidRequest(f"{name} must be a {wanted.__name__}, got {type(value).__name__}")


def check_name(name: str, value: Any) -> None:
    """Raises `InvalidRequest` unless `value` is a short line of text; it may be empty."""
    check_type(name, value, str)
    if not is_name(value):
        raise InvalidRequest(f"{name} must be {NAME_RULE}, got {value!r:.80}")


def check_seconds(name: str, value: Any) -> None:
    """Raises `InvalidRequest` unless `value` is a positive, finite number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidRequest(f"{name} must be a positive, finite number of seconds, got {value!r:.80}")


def check_spec(spec: Any) -> None:
    """Raises `InvalidRequest` unless `spec` is a `SessionSpec` with known settings and any ids."""
    check_type("spec", spec, SessionSpec)
    for name in ("encoding", "rows", "run", "trainer"):
        check_name(name, getattr(spec, name))
    check_type("expected", spec.expected, TargetExpectation)
    check_type("through_host", spec.through_host, bool)
    check_type("answers", spec.answers, bool)
    spec.check()


def check_request(request: Any) -> None:
    """Raises `InvalidRequest` unless `request` is a `GenerateRequest`, of any session and tokens."""
    _check_fields(request, GenerateRequest)
    check_type("tokens", request.tokens, TokenBatch)


def check_answer_request(request: Any) -> None:
    """Raises `InvalidRequest` unless `request` is an `AnswerRequest`, of any session, ids and settings."""
    _check_fields(request, AnswerRequest)
    check_type("prompt", request.prompt, AnswerPrompt)
    check_name("key", request.prompt.key)
    check_type("settings", request.prompt.settings, AnswerSettings)


def _check_fields(request: Any, wanted: type) -> None:
    check_type("request", request, wanted)
    check_name("request_id", request.request_id)
    check_type("incarnation", request.incarnation, str)
    check_seconds("seconds_left", request.seconds_left)

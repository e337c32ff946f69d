"""Envelopes of every answer of the service.

torch RPC keeps the class of few exceptions, so a refusal travels as a value with a code, and the caller's side raises
the exception that belongs to the code.
"""

from dataclasses import dataclass
from typing import Any

from eagle_rpc import errors

_ERROR_OF_CODE: dict[str, type[errors.EagleRpcError]] = {
    "invalid_request": errors.InvalidRequest,
    "target_mismatch": errors.TargetMismatch,
    "unsupported_target": errors.UnsupportedTarget,
    "unknown_session": errors.UnknownSession,
    "stale_incarnation": errors.StaleIncarnation,
    "busy": errors.TargetBusy,
    "draining": errors.TargetDraining,
    "expired": errors.RequestExpired,
    "out_of_memory": errors.TargetOutOfMemory,
    "failed": errors.TargetFailed,
}


@dataclass(frozen=True, slots=True)
class Ok:
    """A value."""

    value: Any


@dataclass(frozen=True, slots=True)
class Failure:
    """A refusal or a mishap, with one of the codes above and a message for people."""

    code: str
    message: str
    retry_after: float | None = None  # seconds; with `busy` only


Reply = Ok | Failure


def failure_of(error: errors.EagleRpcError) -> Failure:
    """The envelope of an error of this package; classes without a code travel as `failed`."""
    if isinstance(error, errors.TargetBusy):
        return Failure("busy", str(error), error.retry_after)
    for code, cls in _ERROR_OF_CODE.items():
        if isinstance(error, cls):
            return Failure(code, str(error))
    return Failure("failed", f"{type(error).__name__}: {error}")


def unwrap(reply: Reply, *, sender: str) -> Any:
    """The value, or the exception that the failure's code stands for, with the sender's name before the message.

    A code that only newer targets have is a `TargetFailed`.
    """
    if isinstance(reply, Ok):
        return reply.value
    error = _ERROR_OF_CODE.get(reply.code, errors.TargetFailed)(f"{sender}: {reply.message}")
    if isinstance(error, errors.TargetBusy) and reply.retry_after is not None:
        error.retry_after = reply.retry_after
    raise error

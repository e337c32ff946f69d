"""The envelope of every answer: errors travel as codes, since torch RPC keeps the class of few exceptions."""

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from eagle_rpc.errors import EagleRpcError, TargetBusy, TargetFailed

logger = logging.getLogger(__name__)

_ERROR_OF_CODE: dict[str, type[EagleRpcError]] = {
    **{error.code: error for error in EagleRpcError.__subclasses__() if "code" in vars(error)},
    TargetFailed.code: TargetFailed,
}


@dataclass(frozen=True, slots=True)
class Ok:
    """A value."""

    value: Any


@dataclass(frozen=True, slots=True)
class Failure:
    """An error: its code and its message."""

    code: str
    message: str
    retry_after: float | None = None  # seconds; with `busy` only


Reply = Ok | Failure


def reply_of(run: Callable[[], Any]) -> Reply:
    """The value of `run`, or the failure for its exception; an unforeseen one is logged."""
    try:
        return Ok(run())
    except EagleRpcError as error:
        return failure_of(error)
    except Exception as error:
        # The caller gets an answer in every case.
        logger.exception("a call failed")
        return Failure(TargetFailed.code, f"{type(error).__name__}: {error}")


def failure_of(error: EagleRpcError) -> Failure:
    """The envelope of an error. A class without a code travels as `failed`, its name in the message."""
    if not isinstance(error, _ERROR_OF_CODE[error.code]):
        return Failure(error.code, f"{type(error).__name__}: {error}")
    retry_after = error.retry_after if isinstance(error, TargetBusy) else None
    return Failure(error.code, str(error), retry_after)


def unwrap(reply: Reply, *, sender: str) -> Any:
    """The value, or the exception of a failure's code raised; `TargetFailed` for a code of newer targets."""
    if isinstance(reply, Ok):
        return reply.value
    error = _ERROR_OF_CODE.get(reply.code, TargetFailed)(f"{sender}: {reply.message}")
    if isinstance(error, TargetBusy) and reply.retry_after is not None:
        error.retry_after = reply.retry_after
    raise error

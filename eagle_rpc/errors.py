"""One exception tree. Every message says which field, which rule and which value.

Classes take one message and keep it, so that they survive pickling and a process boundary.
"""

from typing import ClassVar


class EagleRpcError(Exception):
    """Root of everything that this package raises on purpose."""

    code: ClassVar[str] = "failed"
    """Names the error in a target's replies and in its counts of outcomes."""


class ConfigError(EagleRpcError, ValueError):
    """A configuration that cannot work; raised before anything heavy starts."""


class DataError(EagleRpcError, ValueError):
    """A data file or record that cannot be used; names file and line."""


class InvalidRequest(EagleRpcError, ValueError):
    """A request that the target refuses; the sender has to change it."""

    code = "invalid_request"


class TargetMismatch(EagleRpcError, ValueError):
    """The target that answered is not the one that the draft expects."""

    code = "target_mismatch"


class UnsupportedTarget(EagleRpcError, ValueError):
    """A model whose supervision would not be exact, or that has no layers to capture."""

    code = "unsupported_target"


class UnknownSession(EagleRpcError, LookupError):
    """The session is not (or no longer) registered at this target; open it again."""

    code = "unknown_session"


class StaleIncarnation(EagleRpcError, LookupError):
    """Another process than the one that was meant answers at this address; look it up again."""

    code = "stale_incarnation"


class TargetBusy(EagleRpcError, RuntimeError):
    """The target's queue is full; try again after `retry_after` seconds."""

    code = "busy"
    retry_after: float = 0.05


class TargetDraining(EagleRpcError, RuntimeError):
    """The target is shutting down and takes no new work."""

    code = "draining"


class RequestExpired(EagleRpcError, TimeoutError):
    """The request's deadline passed before the target ran it."""

    code = "expired"


class TargetOutOfMemory(EagleRpcError, MemoryError):
    """The target had too little memory for this request; the server lives on."""

    code = "out_of_memory"


class TargetFailed(EagleRpcError, RuntimeError):
    """The target raised something unforeseen while it ran a request."""


class TargetLost(TargetFailed):
    """The target cannot run another pass; its process has to be started again."""


class ConnectionLost(EagleRpcError, ConnectionError):
    """The peer's process or the way to it is gone."""


class TargetUnavailable(EagleRpcError, ConnectionError):
    """No target could be reached within the reconnect deadline."""


class NameTaken(EagleRpcError, RuntimeError):
    """A living worker has this name already."""


class AccessRefused(EagleRpcError, PermissionError):
    """A peer that does not know the registry's token, or a token file that others may read."""


class PayloadRefused(EagleRpcError, ValueError):
    """An RPC message that asks for more than the allow-list and the size limits permit."""


class WaitTimeout(EagleRpcError, TimeoutError):
    """A bounded wait ended; the message says what it was waiting for and how long."""


class CheckpointError(EagleRpcError, RuntimeError):
    """A checkpoint that is absent, incomplete, or of another run."""


class TrainingDiverged(EagleRpcError, RuntimeError):
    """A loss or a weight is not finite; nothing was saved over a good checkpoint."""


def in_one_line(error: Exception) -> str:
    """The text of an error without line breaks."""
    return " ".join(str(error).split())

"""The settings of a trainer's client."""

from dataclasses import dataclass
from pathlib import Path

from eagle_rpc.supervision import SessionSettings


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientSettings:
    """The session at every target, and the bounds of every wait; times in seconds."""

    session: SessionSettings  # its `trainer` also begins request ids
    index: int  # number among the trainers; spreads their first requests over the targets
    prefetch: int  # requests under way: of a stream, or at each target (> 0)
    request_timeout: float  # of one attempt at one target, queue included
    reconnect_deadline: float  # without any target
    heartbeat_interval: float
    heartbeat_misses: int
    most_targets: int | None = None  # connected to at a time, of an elastic service; None: all
    shared_dir: Path | None = (
        None  # of the host's copies of embedding and head rows; None: each trainer has its own
    )

    @property
    def silence(self) -> float:
        """Seconds without an answer to a heartbeat after which a target is silent."""
        return self.heartbeat_interval * self.heartbeat_misses

    @property
    def patience(self) -> float:
        """Seconds within which a trainer gets an answer that does not change, or gives up."""
        return self.reconnect_deadline + self.request_timeout

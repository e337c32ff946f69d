"""What a trainer's client is told once."""

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True, slots=True)
class ClientSettings:
    """Names, the form of the supervision, and the bounds of every wait; times in seconds."""

    trainer: str  # this worker's name, for logs and request ids
    index: int  # its number among the trainers, which spreads their first requests
    job: str  # trainers of one job share it
    encoding: str
    rows: str
    prefetch: int  # requests under way at a time while streaming (> 0)
    request_timeout: float  # of one attempt at one target, queue included
    reconnect_deadline: float  # without any target
    heartbeat_interval: float
    heartbeat_misses: int

    @property
    def silence(self) -> float:
        """Seconds without an answer to a heartbeat after which a target is silent."""
        return self.heartbeat_interval * self.heartbeat_misses

"""The time in which a trainer has no target that it can use."""

from eagle_rpc.client.fleet import Fleet
from eagle_rpc.errors import TargetUnavailable
from eagle_rpc.process.waiting import BoundedWait


class Absence:
    """Begins when it is first asked for `failure`, and ends with the reconnect deadline at the latest."""

    def __init__(self, fleet: Fleet, reconnect_deadline: float) -> None:
        self._fleet = fleet
        self._deadline = reconnect_deadline  # seconds
        self._wait: BoundedWait | None = None  # while it lasts

    @property
    def lasts(self) -> bool:
        return self._wait is not None

    def failure(self) -> TargetUnavailable | None:
        """Null, and a line in the log, while waiting may help: until the deadline, if a target can come back."""
        wait = self._wait = self._wait or BoundedWait("a target to come back", self._deadline)
        can_recover = self._fleet.can_recover
        if not wait.over and can_recover:
            wait.say(self._fleet.last_loss)
            return None
        bound = f"rpc.reconnect_deadline {wait.seconds:.0f} s"
        limit = bound if can_recover else "a static job gets no other"
        return TargetUnavailable(
            f"no target could be reached for {wait.elapsed:.1f} s ({limit}): {self._fleet.last_loss}"
        )

    def end(self) -> float:
        """Seconds that it lasted."""
        assert self._wait is not None, "an absence has begun"
        seconds, self._wait = self._wait.elapsed, None
        return seconds

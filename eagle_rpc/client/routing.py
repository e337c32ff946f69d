"""The choice of the replica that gets the next request."""

from collections.abc import Sequence

from eagle_rpc.client.replica import Replica


class Router:
    """Chooses the replica with the shortest expected wait, so that a slow replica gets fewer requests.

    Equal replicas take turns. Trainers start at different ones, so that they do not all ask the same one.
    """

    def __init__(self, *, offset: int) -> None:
        self._turn = offset

    def choose(self, replicas: Sequence[Replica], now: float) -> Replica | None:
        """A replica that has a credit at `now` (of time.monotonic), None if there is none."""
        willing = [replica for replica in replicas if replica.has_credit(now)]
        if not willing:
            return None
        start = self._turn % len(willing)
        self._turn += 1
        paces = [one.seconds_per_request for one in willing if one.seconds_per_request is not None]
        usual = min(paces, default=0.0)
        return min(
            willing[start:] + willing[:start],
            key=lambda one: (one.expected_wait(now, usual_pace=usual), one.num_outstanding),
        )

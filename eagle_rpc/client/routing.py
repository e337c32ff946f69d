"""Which replica gets the next request."""

from collections.abc import Sequence

from eagle_rpc.client.replica import Replica


class Router:
    """The shortest expected wait first, so that a slow replica loses its share before it loses its place.

    Among equals turns are taken; trainers start at different replicas, so they do not move as a convoy.
    """

    def __init__(self, *, offset: int) -> None:
        self._turn = offset

    def choose(self, replicas: Sequence[Replica], now: float) -> Replica | None:
        """One that has a credit at time `now` (of time.monotonic); None if there is none."""
        willing = [replica for replica in replicas if replica.has_credit(now)]
        if not willing:
            return None
        start = self._turn % len(willing)
        self._turn += 1
        usual = min(
            (one.seconds_per_request for one in willing if one.seconds_per_request is not None), default=0.0
        )
        return min(
            willing[start:] + willing[:start],
            key=lambda one: (one.expected_wait(now, usual_pace=usual), one.num_outstanding),
        )

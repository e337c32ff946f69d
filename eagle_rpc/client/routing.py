"""Which replica gets the next request."""

from collections.abc import Sequence

from eagle_rpc.client.replica import Replica


class Router:
    """Fewest outstanding requests first; trainers start at different replicas, so they do not move as a convoy."""

    def __init__(self, replicas: Sequence[Replica], *, offset: int) -> None:
        self._replicas = list(replicas)
        self._next = offset % len(self._replicas)

    def choose(self) -> Replica:
        """The least loaded replica; among equals the one whose turn it is."""
        in_turn = self._replicas[self._next :] + self._replicas[: self._next]
        chosen = min(in_turn, key=lambda replica: replica.num_outstanding)
        self._next = (self._replicas.index(chosen) + 1) % len(self._replicas)
        return chosen

"""Sums that grow, and their recent growth."""

from eagle_rpc.process.waiting import Clock

# Seconds that rates look back.
_WINDOW = 10.0


class RecentRate:
    """A growing sum, and its growth a second over the last ten seconds. Not safe for threads."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock
        self._started = clock()
        self._recent: dict[int, float] = {}  # amount by second
        self.total: float = 0

    def add(self, amount: float) -> None:
        self.total += amount
        self._forget_old()
        second = int(self._clock())
        self._recent[second] = self._recent.get(second, 0) + amount

    @property
    def per_second(self) -> float:
        """Mean over the last ten seconds, or since the start where that is less."""
        self._forget_old()
        age = min(self._clock() - self._started, _WINDOW)
        return sum(self._recent.values()) / max(age, 1.0)

    def _forget_old(self) -> None:
        oldest = self._clock() - _WINDOW
        self._recent = {second: amount for second, amount in self._recent.items() if second > oldest}

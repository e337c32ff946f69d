"""What a target has answered since its start, and how fast it has been of late."""

import threading
from collections import Counter, deque
from collections.abc import Callable

# Seconds that rates look back.
_WINDOW = 10.0


class RecentRate:
    """A sum that grows, and its growth a second over the last ten. Not safe for threads."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds, as `time.monotonic`."""
        self._clock = clock
        self._started = clock()
        self._recent: deque[list[float]] = deque()  # [second, amount], at most one a second
        self.total = 0

    def add(self, amount: int) -> None:
        self.total += amount
        second = float(int(self._clock()))
        if self._recent and self._recent[-1][0] == second:
            self._recent[-1][1] += amount
        else:
            self._forget_old()
            self._recent.append([second, amount])

    @property
    def per_second(self) -> float:
        """Mean over the last ten seconds, or since the start while that is less."""
        self._forget_old()
        age = min(self._clock() - self._started, _WINDOW)
        return sum(amount for _, amount in self._recent) / max(age, 1.0)

    def _forget_old(self) -> None:
        oldest = self._clock() - _WINDOW
        while self._recent and self._recent[0][0] <= oldest:
            self._recent.popleft()


class Throughput:
    """Requests by outcome, tokens and bytes of the answers."""

    def __init__(self, clock: Callable[[], float]) -> None:
        """`clock`: seconds, as `time.monotonic`."""
        self._lock = threading.Lock()
        self._requests: Counter[str] = Counter()
        self._tokens = RecentRate(clock)
        self._reply_bytes = RecentRate(clock)

    def answered(self, num_tokens: int, num_bytes: int) -> None:
        """One request got its supervision of `num_tokens` real tokens in `num_bytes` of tensors."""
        with self._lock:
            self._requests["ok"] += 1
            self._tokens.add(num_tokens)
            self._reply_bytes.add(num_bytes)

    def refused(self, code: str) -> None:
        """One request was answered by a failure."""
        with self._lock:
            self._requests[code] += 1

    def status(self) -> dict[str, object]:
        """The figures by their names in the target's status."""
        with self._lock:
            return {
                "requests": dict(self._requests),
                "tokens": self._tokens.total,
                "tokens_per_second": self._tokens.per_second,
                "reply_bytes": self._reply_bytes.total,
                "reply_bytes_per_second": self._reply_bytes.per_second,
            }

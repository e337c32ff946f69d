"""One request of a trainer, from asking until it is answered."""

import threading
import time

from eagle_rpc.client.replica import Attempt, Replica
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.supervision import EncodedSupervision, TokenBatch


class Ticket:
    """One request until it is answered, by whichever target comes first."""

    def __init__(self, number: int, request_id: str, tokens: TokenBatch, patience: float) -> None:
        self.number = number
        self.id = request_id
        self.tokens = tokens
        self.deadline = time.monotonic() + patience
        self.failures = 0
        self.let_down_by: set[Replica] = set()  # asked again only where nobody else is left
        self.attempts: dict[Replica, Attempt] = {}
        self._answered = threading.Event()
        self._reply: EncodedSupervision | None = None
        self._error: EagleRpcError | None = None

    def __lt__(self, other: "Ticket") -> bool:
        return self.number < other.number

    @property
    def settled(self) -> bool:
        return self._answered.is_set()

    def deliver(self, reply: EncodedSupervision) -> None:
        """The first outcome counts, here and in `fail`."""
        if not self.settled:
            self._reply = reply
            self._answered.set()

    def fail(self, error: EagleRpcError) -> None:
        if not self.settled:
            self._error = error
            self._answered.set()

    def wait(self, seconds: float) -> bool:
        """Whether it was answered within `seconds`."""
        return self._answered.wait(seconds)

    def result(self) -> EncodedSupervision:
        if self._error is not None:
            raise self._error
        assert self._reply is not None
        return self._reply

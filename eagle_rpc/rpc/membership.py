"""What a worker sees of the others, however they find each other."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from eagle_rpc.rpc.link import Link


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetAddress:
    """A target that serves, as somebody else finds it."""

    name: str  # "target0"
    incarnation: str  # random id of that process; static: its name, since a lost worker never returns
    worker_id: int
    url: str  # TensorPipe's
    device: str  # "cpu" or "cuda:N"
    host: str


class Membership(Protocol):
    """Static and elastic membership satisfy this."""

    @property
    def elastic(self) -> bool:
        """Whether targets may join later, and return after they were lost."""

    def targets(self) -> Sequence[TargetAddress]:
        """Those that serve now. Raises `ConnectionLost` or `WaitTimeout` if nobody can be asked."""

    def connect(self, address: TargetAddress, service: str) -> Link:
        """A link to the service that this target hosts; bounded, raises what `Link` raises and `StaleIncarnation`."""

    def leave(self, link: Link, *, lost: bool) -> None:
        """Gives up a link; `lost`: because its connection broke, so it will not be used again. Waits for nobody."""

"""How a worker sees the other workers, in a static job and in an elastic service alike."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from eagle_rpc.rpc.link import Link


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetAddress:
    """A target that serves, as trainers find it."""

    name: str  # "target0"
    incarnation: str  # random id of the process; in a static job the name, since a lost worker never returns
    worker_id: int
    url: str = ""  # TensorPipe's; this and the following only in an elastic service
    device: str = ""  # "cpu" or "cuda:N"
    host: str = ""


class Membership(Protocol):
    """What static and elastic membership have in common."""

    @property
    def elastic(self) -> bool:
        """Whether targets may join later, and return after they were lost."""

    def targets(self) -> Sequence[TargetAddress]:
        """The targets that serve now. Raises `ConnectionLost` or `WaitTimeout` without a registry."""

    def connect(self, address: TargetAddress, service: str) -> Link:
        """A link to the service that this target hosts.

        Waits within a bound; raises the errors of `Link`, and `StaleIncarnation` if another process answers.
        """

    def leave(self, link: Link, *, lost: bool) -> None:
        """Gives up a link at once. `lost`: its connection broke, so it must not be used again."""

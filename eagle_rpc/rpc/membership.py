"""A worker's view of the other workers, the same in a static job and in an elastic service."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from eagle_rpc.registry import Record
from eagle_rpc.rpc.link import Link


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetAddress:
    """A target that serves, as trainers find it."""

    name: str  # "target0"
    incarnation: str  # random id of the process; in a static job the name, since a lost worker never returns
    record: Record | None = None  # its entry in the registry of an elastic service


class Membership(Protocol):
    """What static and elastic membership have in common."""

    @property
    def elastic(self) -> bool:
        """Whether targets may join later, and return after they were lost."""

    def targets(self) -> Sequence[TargetAddress]:
        """The targets that serve now. Raises `ConnectionLost` or `WaitTimeout` without a registry."""

    def stages(self, target: str) -> Sequence[TargetAddress]:
        """The stages of a target behind the first one, as far as they serve now. Raises as `targets`."""

    def connect(self, address: TargetAddress) -> Link:
        """A link to this target. Raises as `Link.use_rref`, and `StaleIncarnation` if another process answers."""

    def leave(self, link: Link, *, lost: bool) -> None:
        """Gives a link up. `lost`: its connection broke, so it must not be used again."""

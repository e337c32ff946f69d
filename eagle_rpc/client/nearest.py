"""The targets of a large service to which one trainer connects."""

import hashlib
import math
from collections.abc import Sequence

from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.rpc import TargetAddress

# Multiples of it, without their whole parts, lie evenly in 0..1, however many there are.
_GOLDEN_RATIO = (math.sqrt(5) - 1) / 2


def nearest(addresses: Sequence[TargetAddress], settings: ClientSettings) -> Sequence[TargetAddress]:
    """`settings.most_targets` of the targets: the next ones on a ring, on which all have fixed places.

    Places follow from the numbers of targets and trainers, so that all targets have about equally many trainers.
    A target that comes or goes changes the choice of its own trainers only, and gets them back under its name.
    """
    if settings.most_targets is None or len(addresses) <= settings.most_targets:
        return addresses
    run = hashlib.sha256(settings.session.run.encode()).digest()
    mine = _place(settings.index, int.from_bytes(run[:4]) / 2**32)

    def distance(address: TargetAddress) -> float:
        return (_place(int(address.name.removeprefix("target")), 0.0) - mine) % 1.0

    return sorted(addresses, key=distance)[: settings.most_targets]


def _place(number: int, offset: float) -> float:
    return (offset + number * _GOLDEN_RATIO) % 1.0

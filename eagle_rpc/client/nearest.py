"""The targets of a large service to which one trainer connects."""

import hashlib
from collections.abc import Sequence

from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.rpc import TargetAddress


def nearest(addresses: Sequence[TargetAddress], settings: ClientSettings) -> Sequence[TargetAddress]:
    """`settings.most_targets` of the targets, by a hash of both names (rendezvous hashing).

    Trainers spread evenly, and a target that comes or goes changes the choice of its own trainers only. A
    target that returns under its name gets its trainers back.
    """
    if settings.most_targets is None or len(addresses) <= settings.most_targets:
        return addresses
    trainer = f"{settings.session.run}\n{settings.session.trainer}\n"

    def distance(address: TargetAddress) -> bytes:
        return hashlib.sha256((trainer + address.name).encode()).digest()

    return sorted(addresses, key=distance)[: settings.most_targets]

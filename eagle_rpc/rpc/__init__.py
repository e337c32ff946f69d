"""Start, calls and shutdown of torch.distributed.rpc, and the only room that knows its private parts."""

from eagle_rpc.rpc.calls import PendingCall
from eagle_rpc.rpc.elastic import ElasticMembership, join_elastic
from eagle_rpc.rpc.fence import Permissions
from eagle_rpc.rpc.gathering import gathered_store
from eagle_rpc.rpc.internals import WORLD_FUNCTIONS
from eagle_rpc.rpc.link import Link, ServiceCall, host, withdraw
from eagle_rpc.rpc.membership import Membership, TargetAddress
from eagle_rpc.rpc.static import StaticMembership, attempt_store, join_static

__all__ = [
    "WORLD_FUNCTIONS",
    "ElasticMembership",
    "Link",
    "Membership",
    "PendingCall",
    "Permissions",
    "ServiceCall",
    "StaticMembership",
    "TargetAddress",
    "attempt_store",
    "gathered_store",
    "host",
    "join_elastic",
    "join_static",
    "withdraw",
]

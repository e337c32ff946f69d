"""Bring-up, calls and shutdown of torch.distributed.rpc: the only room that knows its private parts."""

from eagle_rpc.rpc.calls import PendingCall
from eagle_rpc.rpc.membership import StaticMembership, attempt_store, join
from eagle_rpc.rpc.service import connect, host, withdraw

__all__ = ["PendingCall", "StaticMembership", "attempt_store", "connect", "host", "join", "withdraw"]

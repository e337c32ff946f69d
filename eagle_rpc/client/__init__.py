"""The trainer's side of the service: replicas, routing, prefetch."""

from eagle_rpc.client.remote import RemoteEagle3TargetModel
from eagle_rpc.client.replica import SERVICE_NAME

__all__ = ["SERVICE_NAME", "RemoteEagle3TargetModel"]

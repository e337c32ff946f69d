"""The trainer's side of the service: the fleet of targets, routing, failover, prefetch."""

from eagle_rpc.client.remote import RemoteEagle3TargetModel
from eagle_rpc.client.settings import ClientSettings

__all__ = ["ClientSettings", "RemoteEagle3TargetModel"]

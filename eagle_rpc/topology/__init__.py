"""Roles, worker names, devices and device maps, as pure data. Importing it loads no torch."""

from eagle_rpc.topology.devices import (
    DevicePlan,
    carries,
    count_gpus,
    plan_devices,
    resolve_device,
    resolve_devices,
)
from eagle_rpc.topology.roles import (
    Cast,
    Role,
    Worker,
    assign_elastic_roles,
    assign_roles,
    assign_trainers,
    stage_name,
    worker_name,
)

__all__ = [
    "Cast",
    "DevicePlan",
    "Role",
    "Worker",
    "assign_elastic_roles",
    "assign_roles",
    "assign_trainers",
    "carries",
    "count_gpus",
    "plan_devices",
    "resolve_device",
    "resolve_devices",
    "stage_name",
    "worker_name",
]

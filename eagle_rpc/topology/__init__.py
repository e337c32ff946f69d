"""Who is who: torchrun's environment, roles, worker names and devices."""

from eagle_rpc.topology.devices import DevicePlan, plan_devices, resolve_device
from eagle_rpc.topology.environment import World, bind_to_interface, prepare_environment, read_world
from eagle_rpc.topology.lifetime import die_with_parent
from eagle_rpc.topology.roles import Cast, Role, Worker, assign_roles

__all__ = [
    "Cast",
    "DevicePlan",
    "Role",
    "Worker",
    "World",
    "assign_roles",
    "bind_to_interface",
    "die_with_parent",
    "plan_devices",
    "prepare_environment",
    "read_world",
    "resolve_device",
]

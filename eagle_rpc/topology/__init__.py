"""Who is who: torchrun's environment, roles, worker names and devices."""

from eagle_rpc.topology.devices import DevicePlan, plan_devices, resolve_device
from eagle_rpc.topology.environment import World, bind_to_interface, keep_compiled_code, prepare_environment, read_world
from eagle_rpc.topology.interface import interface_address
from eagle_rpc.topology.lifetime import die_with_parent, stop_signals
from eagle_rpc.topology.roles import Cast, Role, Worker, assign_elastic_roles, assign_roles

__all__ = [
    "Cast",
    "DevicePlan",
    "Role",
    "Worker",
    "World",
    "assign_elastic_roles",
    "assign_roles",
    "bind_to_interface",
    "die_with_parent",
    "interface_address",
    "keep_compiled_code",
    "plan_devices",
    "prepare_environment",
    "read_world",
    "resolve_device",
    "stop_signals",
]

"""What a process is: torchrun's environment, signals, the network interface, bounds. Imports nothing heavy."""

from eagle_rpc.process.environment import (
    World,
    bind_to_interface,
    keep_compiled_code,
    prepare_environment,
    read_world,
)
from eagle_rpc.process.interface import interface_address
from eagle_rpc.process.signals import die_with_parent, stop_signals

__all__ = [
    "World",
    "bind_to_interface",
    "die_with_parent",
    "interface_address",
    "keep_compiled_code",
    "prepare_environment",
    "read_world",
    "stop_signals",
]

"""The process itself: environment, signals, interface, start-up, log, waits. Importing it loads no torch."""

from eagle_rpc.process.environment import (
    World,
    bind_to_interface,
    keep_compiled_code,
    prepare_environment,
    read_world,
)
from eagle_rpc.process.interface import host_address, interface_address, is_loopback
from eagle_rpc.process.signals import die_with_parent, stop_signals, tolerate_stop

__all__ = [
    "World",
    "bind_to_interface",
    "die_with_parent",
    "host_address",
    "interface_address",
    "is_loopback",
    "keep_compiled_code",
    "prepare_environment",
    "read_world",
    "stop_signals",
    "tolerate_stop",
]

"""Addresses of network interfaces."""

import fcntl
import socket
import struct

from eagle_rpc.errors import ConfigError

_SIOCGIFADDR = 0x8915


def interface_address(interface: str) -> str:
    """IPv4 address of a network interface. Raises `ConfigError` if there is none: torch would silently take loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            answer = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            raise ConfigError(
                f"rpc.interface must be a network interface with an IPv4 address, got {interface!r} ({error})"
            ) from None
    return socket.inet_ntoa(answer[20:24])

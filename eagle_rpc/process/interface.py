"""Addresses of network interfaces and of hosts."""

import fcntl
import socket
import struct

from eagle_rpc.errors import ConfigError

_SIOCGIFADDR = 0x8915


def interface_address(interface: str) -> str:
    """IPv4 address of an interface. Raises `ConfigError` if it has none; torch would use loopback."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            reply = fcntl.ioctl(probe.fileno(), _SIOCGIFADDR, struct.pack("256s", interface.encode()[:15]))
        except OSError as error:
            rule = "rpc.interface must be a network interface with an IPv4 address"
            raise ConfigError(f"{rule}, got {interface!r} ({error})") from None
    return socket.inet_ntoa(reply[20:24])


def host_address(host: str) -> str:
    """IPv4 address that this machine knows for a host's name. Raises `OSError` if it knows none."""
    return socket.gethostbyname(host)


def is_loopback(address: str) -> bool:
    """Whether an IPv4 address reaches no other machine."""
    return address.startswith("127.")

"""A network and a /dev/shm for the fault test alone: it disturbs nothing else, and every leftover shows."""

import contextlib
import ctypes
import os
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

_CLONE_NEWNS, _CLONE_NEWNET = 0x00020000, 0x40000000
_MS_REC, _MS_PRIVATE = 0x4000, 0x40000
_SHARED_MEMORY = Path("/dev/shm")
_LISTENING = "0A"


@dataclass(frozen=True)
class Isolation:
    """Whether this process has its own network and shared memory, and whether it can slow a port down there."""

    private: bool
    can_slow: bool
    note: str  # the missing permission, "" if there is none


def isolate() -> Isolation:
    """Moves this process and its later children into new namespaces, where that is permitted."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET | _CLONE_NEWNS) != 0:
        reason = os.strerror(ctypes.get_errno())
        return Isolation(
            private=False, can_slow=False, note=f"no namespaces ({reason}): connections are not slowed down"
        )
    if libc.mount(b"none", b"/", None, _MS_REC | _MS_PRIVATE, None) or libc.mount(
        b"tmpfs", b"/dev/shm", b"tmpfs", 0, None
    ):
        raise OSError(ctypes.get_errno(), "cannot mount a /dev/shm in the new namespace")
    try:
        _run("ip", "link", "set", "lo", "up")
    except FileNotFoundError:
        raise OSError("a new network namespace needs `ip` (iproute2) to bring its loopback up") from None
    try:
        with slowed_down(1, kilobits=1000):
            pass
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        return Isolation(
            private=True,
            can_slow=False,
            note=f"no traffic control ({error}): connections are not slowed down",
        )
    return Isolation(private=True, can_slow=True, note="")


@contextlib.contextmanager
def slowed_down(port: int, *, kilobits: int) -> Iterator[None]:
    """Loopback connections from and to `port` share `kilobits` per second while the body runs; needs
    `Isolation.can_slow`.
    """
    _run("tc", "qdisc", "add", "dev", "lo", "root", "handle", "1:", "htb", "default", "10")
    try:
        # A burst must hold the largest packet of the loopback device.
        for number, rate in ((10, "10gbit"), (20, f"{kilobits}kbit")):
            lane = f"parent 1: classid 1:{number} htb rate {rate} burst 70kb quantum 60000".split()
            _run("tc", "class", "add", "dev", "lo", *lane)
        for end in ("sport", "dport"):
            match = f"u32 match ip {end} {port} 0xffff flowid 1:20".split()
            _run("tc", "filter", "add", "dev", "lo", "parent", "1:", "protocol", "ip", *match)
        yield
    finally:
        _run("tc", "qdisc", "del", "dev", "lo", "root")


def _run(*command: str) -> None:
    subprocess.run(command, check=True, capture_output=True, timeout=10)


def listening_ports() -> set[int]:
    """TCP ports on which any process in this network listens."""
    tables = [tcp_sockets(Path("/proc/self/net", table)) for table in ("tcp", "tcp6")]
    return {one.local for table in tables for one in table if one.state == _LISTENING}


class TcpSocket(NamedTuple):
    """A line of a table of /proc: local and remote port, state and inode."""

    local: int
    remote: int
    state: str
    inode: str


def tcp_sockets(table: Path) -> list[TcpSocket]:
    fields = [line.split() for line in table.read_text().splitlines()[1:]]
    return [TcpSocket(_port(one[1]), _port(one[2]), one[3], one[9]) for one in fields]


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def shared_memory_files() -> set[str]:
    return {entry.name for entry in _SHARED_MEMORY.iterdir()}

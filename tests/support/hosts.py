"""Hosts within this machine: each has a network, a name and an /etc/hosts of its own, and a wire joins them.

The wire runs in this process: it carries IP packets between TUN devices, the hosts' interfaces, delays all and
loses some. So it needs no netem of the kernel's, and can be cut between any hosts. A host ends with its last
process, and its holder ends with this process.

A host has a /var/run of its own, and all other files in common. As on Debian, its own name is 127.0.1.1 in its
/etc/hosts; other hosts know it by its address.
"""

import contextlib
import ctypes
import fcntl
import os
import random
import select
import shutil
import socket
import struct
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INTERFACE = "eth1"
# Seconds that a packet travels, and the share of packets that get lost.
DELAY, LOSS = 0.001, 0.001

_TUN = Path("/dev/net/tun")
_PROGRAMS = ("ip", "nsenter", "unshare")
# By the names in /proc/PID/ns: flags of setns(2).
_NAMESPACES = {"net": 0x40000000, "uts": 0x04000000, "mnt": 0x00020000}
# linux/if_tun.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_MAX_PACKET = 65536
_PROTOCOL, _DESTINATION = 9, slice(16, 20)  # in an IPv4 packet
_COMMAND_SECONDS = 30.0


def missing() -> str:
    """The reason why this machine permits no hosts, "" if it does."""
    absent = [name for name in _PROGRAMS if shutil.which(name) is None]
    if absent:
        return f"needs {', '.join(absent)} (iproute2, util-linux)"
    if os.geteuid() != 0:
        return "needs root, to make network namespaces"
    if not os.access(_TUN, os.R_OK | os.W_OK):
        return f"needs {_TUN}"
    tried = subprocess.run(
        ["unshare", "--net", "--uts", "--mount", "true"], capture_output=True, text=True, check=False
    )
    return f"needs network namespaces: {tried.stderr.strip()}" if tried.returncode else ""


def enter(holder: int) -> None:
    """Moves this process, which must have one thread, to the host whose holder has this process id."""
    for name in _NAMESPACES:
        _enter_namespace(holder, name)


def _enter_namespace(holder: int, name: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    with open(f"/proc/{holder}/ns/{name}", "rb") as namespace:
        if libc.setns(namespace.fileno(), _NAMESPACES[name]) != 0:
            raise OSError(ctypes.get_errno(), f"setns({name}): {os.strerror(ctypes.get_errno())}")


@dataclass(frozen=True)
class Host:
    """A host, and the process that holds its namespaces."""

    name: str
    address: str
    holder: subprocess.Popen[bytes]

    def command(self, *words: str, directory: Path | None = None) -> list[str]:
        """The command that runs `words` on this host, in `directory` (None: the caller's)."""
        # Links to files would fail from a directory that was opened on the other side.
        places = ["--net", "--uts", "--mount", f"--wdns={directory or Path.cwd()}"]
        return ["nsenter", f"--target={self.holder.pid}", *places, *words]

    def run(self, *words: str) -> str:
        """What `words` print on this host. Raises `RuntimeError` if they fail."""
        done = subprocess.run(
            self.command(*words), capture_output=True, text=True, timeout=_COMMAND_SECONDS, check=False
        )
        if done.returncode:
            raise RuntimeError(f"{' '.join(words)} on {self.name}: {done.stdout}{done.stderr}")
        return done.stdout

    def within(self, function: Callable[[], Any]) -> Any:
        """Calls `function` in a thread that is on this host's network, as its sockets and threads will be."""
        outcome: list[tuple[Any, BaseException | None]] = []

        def call() -> None:
            try:
                _enter_namespace(self.holder.pid, "net")
                outcome.append((function(), None))
            except BaseException as error:  # noqa: BLE001 - raised again below
                outcome.append((None, error))

        thread = threading.Thread(target=call)
        thread.start()
        thread.join()
        value, error = outcome[0]
        if error is not None:
            raise error
        return value


@contextlib.contextmanager
def joined_hosts(
    names: Sequence[str], directory: Path, *, delay: float = DELAY, loss: float = LOSS
) -> Iterator["Wire"]:
    """Hosts of these names on one wire, until the body ends; files of theirs lie in `directory`."""
    addresses = {name: f"10.77.0.{number}" for number, name in enumerate(names, 1)}
    with contextlib.ExitStack() as stack:
        hosts = [stack.enter_context(_held(name, addresses, directory)) for name in names]
        wire = Wire(hosts, delay=delay, loss=loss)
        stack.enter_context(contextlib.closing(wire))
        yield wire


@contextlib.contextmanager
def _held(name: str, addresses: dict[str, str], directory: Path) -> Iterator[Host]:
    """A host without a wire."""
    known = directory / f"hosts.{name}"
    lines = ["127.0.0.1 localhost", f"127.0.1.1 {name}"]
    lines += [f"{address} {other}" for other, address in addresses.items() if other != name]
    known.write_text("\n".join(lines) + "\n")
    mounts = f"mount --bind '{known}' /etc/hosts && mount -t tmpfs none /var/run"
    script = f"hostname {name} && {mounts} && ip link set lo up && echo held && exec cat"
    holder = subprocess.Popen(
        ["unshare", "--net", "--uts", "--mount", "sh", "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    try:
        assert holder.stdout is not None and holder.stdin is not None
        if holder.stdout.readline() != b"held\n":
            raise RuntimeError(f"host {name} could not be set up")
        yield Host(name, addresses[name], holder)
    finally:
        holder.communicate(timeout=_COMMAND_SECONDS)


class Wire:
    """Joins hosts: packets arrive `delay` seconds later, a share `loss` of them never, drawn from a seed."""

    def __init__(self, hosts: Sequence[Host], *, delay: float, loss: float) -> None:
        self.hosts = list(hosts)
        self.protocols: set[int] = set()  # of the packets between hosts so far, as in socket.IPPROTO_TCP
        self._delay, self._loss = delay, loss
        self._draw = random.Random(0)
        self._cut: set[tuple[int, int]] = set()  # pairs of descriptors between which nothing passes
        self._descriptors = {host.name: host.within(_open_interface) for host in hosts}
        self._by_address = {
            socket.inet_aton(host.address): self._descriptors[host.name] for host in self.hosts
        }
        for host in hosts:
            host.run("ip", "address", "add", f"{host.address}/24", "dev", INTERFACE)
            host.run("ip", "link", "set", INTERFACE, "up")
        self._end, self._ended = os.pipe()
        self._thread = threading.Thread(target=self._carry, name="wire", daemon=True)
        self._thread.start()

    def cut(self, some: Sequence[Host], others: Sequence[Host]) -> None:
        """From now on nothing passes between a host of `some` and one of `others`; nobody is told."""
        pairs = {(self._descriptors[one.name], self._descriptors[two.name]) for one in some for two in others}
        self._cut = self._cut | pairs | {(two, one) for one, two in pairs}

    def mend(self) -> None:
        """Everything passes again."""
        self._cut = set()

    def lead(self, address: str, host: Host) -> None:
        """Brings packets for a further address to `host`, as a neighbour that knows its hardware can."""
        self._by_address[socket.inet_aton(address)] = self._descriptors[host.name]

    def close(self) -> None:
        os.write(self._ended, b"-")
        self._thread.join()
        for descriptor in (*self._descriptors.values(), self._end, self._ended):
            os.close(descriptor)

    def _carry(self) -> None:
        under_way: deque[tuple[float, int, bytes]] = deque()  # time of arrival, where to, packet
        sources = list(self._descriptors.values())
        while True:
            patience = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
            readable, _, _ = select.select([self._end, *sources], [], [], patience)
            if self._end in readable:
                return
            for source in readable:
                with contextlib.suppress(BlockingIOError):
                    packet = os.read(source, _MAX_PACKET)
                    to = self._by_address.get(packet[_DESTINATION])
                    if to is None:
                        continue
                    self.protocols.add(packet[_PROTOCOL])
                    if (source, to) not in self._cut and self._draw.random() >= self._loss:
                        under_way.append((time.monotonic() + self._delay, to, packet))
            while under_way and under_way[0][0] <= time.monotonic():
                _, to, packet = under_way.popleft()
                with contextlib.suppress(BlockingIOError):
                    os.write(to, packet)


def _open_interface() -> int:
    """A descriptor for the packets of a new interface of this thread's network."""
    descriptor = os.open(_TUN, os.O_RDWR | os.O_NONBLOCK)
    request = struct.pack("16sH22x", INTERFACE.encode(), _IFF_TUN | _IFF_NO_PI)
    fcntl.ioctl(descriptor, _TUNSETIFF, request)
    return descriptor

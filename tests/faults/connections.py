"""TCP connections: found in /proc, cut while both processes live, and opened to send garbage."""

import contextlib
import ctypes
import errno
import os
import random
import re
import socket
from dataclasses import dataclass
from pathlib import Path

from faults.isolation import tcp_sockets

_PIDFD_GETFD = 438  # the same number on every architecture
_ESTABLISHED = "01"
_SOCKET = re.compile(r"socket:\[(\d+)\]")
_CONNECT_TIMEOUT = 2.0


@dataclass(frozen=True)
class Connection:
    """One end of an established connection."""

    pid: int
    descriptor: int
    local: int  # ports
    remote: int

    def cut(self) -> bool:
        """Ends the stream for both processes. False if the process has closed it itself.

        Raises `OSError` where that is not permitted.
        """
        process = os.pidfd_open(self.pid)
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            descriptor = libc.syscall(_PIDFD_GETFD, process, self.descriptor, 0)
            if descriptor < 0 and ctypes.get_errno() == errno.EBADF:
                return False
            if descriptor < 0:
                raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
            with socket.socket(fileno=descriptor) as copy, contextlib.suppress(OSError):
                copy.shutdown(socket.SHUT_RDWR)
            return True
        finally:
            os.close(process)


def connections_between(one: int, other: int) -> list[Connection]:
    """The ends at process `one` of its connections with process `other`."""
    theirs = {(end.local, end.remote) for end in connections_of(other)}
    return [end for end in connections_of(one) if (end.remote, end.local) in theirs]


def connections_of(pid: int) -> list[Connection]:
    sockets = tcp_sockets(Path(f"/proc/{pid}/net/tcp"))
    ports = {one.inode: (one.local, one.remote) for one in sockets if one.state == _ESTABLISHED}
    found = []
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            match = _SOCKET.fullmatch(os.readlink(entry))
        except FileNotFoundError:
            continue
        if match and match[1] in ports:
            found.append(Connection(pid, int(entry.name), *ports[match[1]]))
    return sorted(found, key=lambda end: end.descriptor)


def can_cut() -> bool:
    """Whether this process is permitted to shut down its children's sockets."""
    with (
        socket.create_server(("127.0.0.1", 0)) as server,
        socket.create_connection(server.getsockname()) as client,
    ):
        own = [end for end in connections_of(os.getpid()) if end.descriptor == client.fileno()]
        try:
            own[0].cut()
        except OSError:
            return False
    return True


def send_garbage(port: int, draw: random.Random) -> int:
    """Connects and sends 0 to 4096 random bytes; returns their number."""
    data = draw.randbytes(draw.choice((0, 1, 7, 8, 64, 512, 4096)))
    send(port, data)
    return len(data)


def send(port: int, data: bytes) -> None:
    """Connects, sends and closes; errors of the connection are ignored."""
    try:
        with socket.create_connection(("127.0.0.1", port), timeout=_CONNECT_TIMEOUT) as connection:
            connection.sendall(data)
    except OSError:
        pass


def listening_port(url: str) -> int:
    """The port of `uv://127.0.0.1:1234`."""
    return int(url.rpartition(":")[2])

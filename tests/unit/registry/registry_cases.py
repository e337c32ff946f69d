"""A registry in this process, records to announce, and a clock that only tests move."""

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from support.processes import free_port

from eagle_rpc.registry import Directory, IdFile, Record, RegistryClient, RegistryServer

TOKEN = b"t" * 32
TTL = 3.0
# Seconds that no test takes, on a busy machine either.
BOUND = 60.0


class Clock:
    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def target(number: int = 0, **changes: object) -> Record:
    """A record of target `number`; `incarnation` may be a short hexadecimal word."""
    if "incarnation" in changes:
        changes["incarnation"] = str(changes["incarnation"]).ljust(16, "0")
    usual = Record(
        name=f"target{number}",
        role="target",
        run="",
        id=number + 1,
        incarnation=f"{number:016x}",
        url="uv://127.0.0.1:1234",
        device="cpu",
        gpu="",
        host="here",
        pid=4711,
        status={},
    )
    return replace(usual, **changes)


@contextlib.contextmanager
def running_registry(
    directory: Path,
    *,
    address: str | None = None,
    ttl: float = BOUND,
    message_seconds: float = BOUND,
    ids: IdFile | None = None,
) -> Iterator[RegistryServer]:
    """Slow enough in what it takes for silence that only tests of silence see any."""
    # A port that no outgoing connection takes, for tests that close the registry and start it again.
    host, port = (address or f"127.0.0.1:{free_port()}").split(":")
    ids = ids or IdFile(directory / "ids", lock_seconds=BOUND)
    with RegistryServer(
        (host, int(port)), TOKEN, Directory(ids, ttl=ttl), message_seconds=message_seconds
    ) as server:
        yield server


def client_of(server: RegistryServer, token: bytes = TOKEN, timeout: float = BOUND) -> RegistryClient:
    return RegistryClient(server.address, token, timeout=timeout)

"""An elastic service for tests: a registry in this process, targets and trainers in processes that can be
killed.
"""

import contextlib
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from support.processes import free_port
from support.tiny_target import tiny_target_config
from support.workers import forking

from eagle_rpc.client import ClientSettings, RemoteEagle3TargetModel
from eagle_rpc.config import Config
from eagle_rpc.config.choices import MembershipKind
from eagle_rpc.config.schema import RpcConfig, RunConfig, TargetConfig
from eagle_rpc.config.texts import parse_address
from eagle_rpc.jobs.answering import EngineAnswering
from eagle_rpc.jobs.permissions import permissions
from eagle_rpc.jobs.serve import elastic_target
from eagle_rpc.registry import Directory, IdFile, RegistryClient, RegistryServer, load_or_create_token
from eagle_rpc.rpc import ElasticMembership, host, join_elastic
from eagle_rpc.service.endpoint import CONTROL_METHODS, TargetEndpoint
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import SessionSettings, TargetExpectation
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.topology import Role

WAIT = 60.0
# A worker is silent after 5 s: a busy machine may keep a living one from answering for a second or two.
HEARTBEATS: dict[str, Any] = {"heartbeat_interval": 0.2, "heartbeat_misses": 25}


class Worker:
    """A process that runs `function(link, *args)`; `link` is the other end of `receive` and `send`."""

    def __init__(self, function: Callable[..., None], *args: Any) -> None:
        self._link, theirs = forking.Pipe()
        self.process = forking.Process(target=_run, args=(theirs, function, args), daemon=True)
        self.process.start()
        theirs.close()

    def receive(self, seconds: float = WAIT) -> Any:
        """The next thing that it sent; raises what it raised."""
        assert self._link.poll(seconds), "a worker said nothing in time"
        kind, value = self._link.recv()
        assert kind != "raised", value
        return value

    def send(self, value: Any) -> None:
        self._link.send(value)

    def end(self) -> None:
        self.process.kill()
        self.process.join(WAIT)


class Link:
    """A worker's way to the test."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    def send(self, value: Any) -> None:
        self._connection.send(("value", value))

    def receive_forever(self) -> Any:
        """For a thread that waits beside the worker's own."""
        return self._connection.recv()

    def receive(self) -> Any:
        assert self._connection.poll(WAIT), "the test said nothing in time"
        return self._connection.recv()


def _run(connection: Any, function: Callable[..., None], args: tuple[Any, ...]) -> None:
    torch.set_num_threads(1)
    try:
        function(Link(connection), *args)
    except BaseException:  # noqa: BLE001 - whatever went wrong, the test has to show it
        connection.send(("raised", traceback.format_exc()))


class Registry:
    """A registry on loopback that can be ended and started again at the same address."""

    def __init__(self, directory: Path) -> None:
        self.token_file = directory / "token"
        self.token = load_or_create_token(self.token_file)
        self._ids = IdFile(directory / "ids")
        # No outgoing connection takes this port while the registry is down.
        self.address = f"127.0.0.1:{free_port()}"
        self.restart()

    @property
    def client(self) -> RegistryClient:
        return RegistryClient(self.address, self.token)

    def end(self) -> None:
        self._server.close()

    def restart(self) -> None:
        directory = Directory(
            self._ids, ttl=HEARTBEATS["heartbeat_interval"] * HEARTBEATS["heartbeat_misses"]
        )
        self._server = RegistryServer(parse_address(self.address), self.token, directory)


@contextlib.contextmanager
def joined(name: str, role: str, address: str, token: bytes) -> Iterator[ElasticMembership]:
    config = RpcConfig(
        start_timeout=WAIT,
        request_timeout=20.0,
        shutdown_timeout=20.0,
        registry=address,
        **HEARTBEATS,
    )
    with join_elastic(
        name,
        role,
        run="" if role == "target" else "test",
        device="cpu",
        config=config,
        permissions=permissions(config, Role(role)),
        registry=RegistryClient(address, token),
        stop=threading.Event(),
        when_superseded=lambda: None,
    ) as membership:
        yield membership


def serve_tiny_target(link: Link, name: str, address: str, token: bytes) -> None:
    """A target until the test sends anything; says its incarnation when it serves. Told to drain, it drains
    first.
    """
    serve_target(link, name, tiny_target_config(), address, token)


def serve_target(link: Link, name: str, config: TargetConfig, address: str, token: bytes) -> None:
    with joined(name, "target", address, token) as membership:
        target = HFEagle3TargetModel.load(config, "cpu", cache_dir="unused", seed=0)
        answering = EngineAnswering(target.model)
        incarnation = membership.me.incarnation
        server = TargetModelServer(target, config, incarnation=incarnation, answering=answering)
        host(TargetEndpoint(server), CONTROL_METHODS)
        membership.report(server.status)
        link.send(incarnation)
        if link.receive() == "drain":
            server.drain(WAIT)
            link.send("drained")
            link.receive()
        server.close()


def service_config(registry: Registry, directory: Path, target: TargetConfig) -> Config:
    """The configuration of a target as a job."""
    rpc = RpcConfig(
        membership=MembershipKind.elastic,
        registry=registry.address,
        token_file=str(registry.token_file),
        start_timeout=WAIT,
        **HEARTBEATS,
    )
    return Config(run=RunConfig(dir=str(directory), cache_dir=str(directory)), rpc=rpc, target=target)


def serve_as_a_job(link: Link, name: str, config: Config) -> None:
    """A target that lives as in `job=serve` until it is drained; says then what it has answered."""
    with elastic_target(config, name, ["cpu"], threading.Event(), hosts_registry=False) as life:
        life.run()
    link.send(life.server.throughput.requests)


def client_settings(name: str, **changes: Any) -> ClientSettings:
    settings: dict[str, Any] = {
        "session": SessionSettings(run="test", trainer=name),
        "index": 0,
        "prefetch": 3,
        "request_timeout": 20.0,
        "reconnect_deadline": WAIT,
        **HEARTBEATS,
    }
    return ClientSettings(**{**settings, **changes})


@contextlib.contextmanager
def remote_target(name: str, address: str, token: bytes, **changes: Any) -> Iterator[RemoteEagle3TargetModel]:
    """A trainer's client in an elastic service."""
    with joined(name, "trainer", address, token) as membership:
        backend = RemoteEagle3TargetModel(
            membership,
            settings=client_settings(name, **changes),
            expected=TargetExpectation(),
            device=torch.device("cpu"),
            stop=threading.Event(),
        )
        with contextlib.closing(backend):
            yield backend

"""Targets that answer in the same process, and a membership that finds them."""

import threading
from collections.abc import Callable
from typing import Any

import torch
from torch.futures import Future

from eagle_rpc.client import ClientSettings, RemoteEagle3TargetModel
from eagle_rpc.errors import ConnectionLost
from eagle_rpc.rpc import ServiceCall, TargetAddress
from eagle_rpc.service.endpoint import TargetEndpoint
from eagle_rpc.supervision import SessionSettings, TargetExpectation

SETTINGS = {
    "session": SessionSettings(run="test", trainer="trainer0"),
    "index": 0,
    "prefetch": 4,
    "request_timeout": 30.0,
    "reconnect_deadline": 30.0,
    "heartbeat_interval": 0.05,
    "heartbeat_misses": 40,
}


class FakeTarget:
    """A `TargetModelServer` behind a connection that tests can cut, hold or answer for."""

    def __init__(self, name: str, server: Any) -> None:
        self.name = name
        self.server = server
        self._endpoint = TargetEndpoint(server)
        self.alive = True
        self.between_gpus = False
        self.num_requests = 0
        self.dies_at: int | None = None  # the request with which it dies
        self.sessions: list[str] = []
        self.refuse: Callable[[str], Any] = lambda method: None  # a reply instead of the server's, or None
        self.sticks_at: str | None = None  # a method that never answers; the request does not arrive
        self.held: list[tuple[Future, Callable[[], Any]]] | None = None  # calls that wait until `release`

    def call(self, method: str, *arguments: Any) -> Future:
        future: Future = Future()
        self.num_requests += method == "generate"
        if self.num_requests == self.dies_at:
            self.die()
        if not self.alive:
            future.set_exception(RuntimeError("eof (this error originated at tensorpipe/fake)"))
            return future
        answer = self.refuse(method)
        if answer is not None:
            future.set_result(answer)
        elif self.held is not None:
            self.held.append((future, lambda: getattr(self._endpoint, method)(*arguments)))
        else:
            self._answer(future, getattr(self._endpoint, method)(*arguments))
        if method == "open_session":
            future.add_done_callback(lambda done: self.sessions.append(done.value().value.id))
        return future

    def expire_session(self) -> None:
        """Ends the session that was opened last, as an expired lease does."""
        self.server.disconnect(self.sessions[-1])

    def hold(self) -> None:
        self.held = []

    def release(self) -> None:
        held, self.held = self.held or [], None
        for future, run in held:
            self._answer(future, run())

    def die(self) -> None:
        """Every call under way and to come ends as it does when a process is killed."""
        self.alive = False
        for future, _ in self.held or []:
            future.set_exception(RuntimeError("eof (this error originated at tensorpipe/fake)"))
        self.held = None

    def _answer(self, future: Future, reply: Any) -> None:
        if isinstance(reply, Future):
            reply.add_done_callback(lambda done: future.set_result(done.wait()))
        else:
            future.set_result(reply)


def timed_out(seconds: float) -> Future:
    """A call that is never answered, as torch ends it."""
    future: Future = Future()
    error = RuntimeError(f"RPCErr:1:RPC ran for more than set timeout ({seconds} s)")
    threading.Timer(seconds, future.set_exception, [error]).start()
    return future


class FakeLink:
    def __init__(self, target: FakeTarget) -> None:
        self.peer = target.name
        self.between_gpus = target.between_gpus
        self.target = target

    def call(self, method: str, *arguments: Any, what: str, timeout: float) -> ServiceCall:
        future = (
            timed_out(timeout) if method == self.target.sticks_at else self.target.call(method, *arguments)
        )
        return ServiceCall(future, peer=self.peer, what=what, timeout=timeout)

    def control(self, method: str, *arguments: Any, timeout: float) -> ServiceCall:
        return ServiceCall(self.target.call(method, *arguments), peer=self.peer, what=method, timeout=timeout)


class FakeMembership:
    """Lists the targets that are alive."""

    def __init__(self, *targets: FakeTarget, elastic: bool = True) -> None:
        self.elastic = elastic
        self.known = list(targets)
        self.num_lost = 0
        self.when_connected: Callable[[], None] = lambda: None

    def targets(self) -> list[TargetAddress]:
        return [
            TargetAddress(name=one.name, incarnation=f"{one.name}-{id(one)}")
            for one in self.known
            if one.alive or not self.elastic
        ]

    def connect(self, address: TargetAddress) -> FakeLink:
        target = next(one for one in self.known if f"{one.name}-{id(one)}" == address.incarnation)
        if not target.alive:
            raise ConnectionLost(f"{target.name} is gone")
        self.when_connected()
        return FakeLink(target)

    def leave(self, link: FakeLink, *, lost: bool) -> None:
        self.num_lost += lost


def remote_model(
    membership: FakeMembership, *, stop: threading.Event | None = None, **changes: Any
) -> RemoteEagle3TargetModel:
    return RemoteEagle3TargetModel(
        membership,
        settings=ClientSettings(**{**SETTINGS, **changes}),
        expected=TargetExpectation(),
        device=torch.device("cpu"),
        stop=stop or threading.Event(),
    )

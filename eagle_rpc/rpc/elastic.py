"""Elastic membership: each worker is an RPC agent alone in its group and adds peers from the registry.

The first worker that dies breaks torch's own dynamic groups, and its static groups admit nobody later. An
agent alone in its group has neither problem: the death of a worker concerns only those that call it.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import rpc

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConfigError, ConnectionLost, EagleRpcError, StaleIncarnation
from eagle_rpc.registry import LAST_WORKER_ID, Beat, Record, RegistryClient, take_id
from eagle_rpc.rpc.agent import listens, running_agent
from eagle_rpc.rpc.calls import PendingCall
from eagle_rpc.rpc.fence import Permissions
from eagle_rpc.rpc.internals import add_peer, agent_name, bound_url, remove_peer
from eagle_rpc.rpc.link import Link, close_broken
from eagle_rpc.rpc.membership import TargetAddress
from eagle_rpc.topology import carries

logger = logging.getLogger(__name__)

# The registry numbers workers upwards from 1, each process its connections downwards from torch's last id.
_LAST_CONNECTION = 2**15 - 1
_LOWEST_CONNECTION = LAST_WORKER_ID + 1
# torch takes a caller's device maps only before its start, when no target is known: so all these names get
# one. They let replies arrive on the GPU; requests are CPU tensors.
_MAPPED_TARGETS = 64
# Seconds for a call that only looks something up at a peer.
_MEET_TIMEOUT = 5.0


class ElasticMembership:
    """This worker and the others in the registry. One per process."""

    elastic = True

    def __init__(self, me: Record, registry: RegistryClient) -> None:
        self.me = me
        self._registry = registry
        self.status: Callable[[], dict[str, Any]] = dict  # asked by each beat
        self._lock = threading.Lock()
        self._peers: dict[str, int] = {}  # worker id by RPC name, as this agent knows its peers
        self._lost: set[str] = set()  # incarnations to which a connection broke
        self._closed: set[int] = set()  # ids of dead peers whose connections are closed
        self._next_connection = _LAST_CONNECTION

    def report(self, status: Callable[[], dict[str, Any]]) -> None:
        """From now on beats announce `status()`. Trainers use a target once its `draining` is false."""
        self.status = status

    @property
    def reachable(self) -> bool:
        """Whether new peers can still connect to this worker."""
        return listens(self.me.url)

    def targets(self) -> Sequence[TargetAddress]:
        """The living targets that serve and do not drain."""
        return [
            TargetAddress(name=one.name, incarnation=one.incarnation, record=one)
            for one in self._registry.living()
            if one.role == "target" and one.status.get("draining") is False
        ]

    def stages(self, target: str) -> Sequence[TargetAddress]:
        return [
            TargetAddress(name=one.name, incarnation=one.incarnation, record=one)
            for one in self._registry.living()
            if one.role == "stage"
            and one.name.startswith(f"{target}.")
            and one.status.get("draining") is False
        ]

    def connect(self, address: TargetAddress) -> Link:
        """A link with two connections, for tensors and for other calls; checks the incarnation first.

        Calls with tensors go by RRef, whose connection has the target's own worker id. torch keeps a broken
        connection for its id: after a loss, connections to this incarnation get fresh ids and calls go by
        name. They also go by name if this worker is not reachable, since the owner of an RRef calls back.
        """
        peer = address.record
        assert peer is not None, "targets of an elastic service have a record"
        data, control = agent_name(peer.name), f"{agent_name(peer.name)}-control"
        with self._lock:
            by_rref = peer.incarnation not in self._lost and self.reachable
            self._add(data, peer.id if by_rref else self._fresh_id(), peer.url)
            self._add(control, self._fresh_id(), peer.url)
        try:
            call = rpc.rpc_async(control, introduce, args=(self.me.id,), timeout=_MEET_TIMEOUT)
            met = PendingCall(call, peer=peer.name, what="the introduction", timeout=_MEET_TIMEOUT).result()
            if met != peer.incarnation:
                rule = f"{peer.name} must be incarnation {peer.incarnation}"
                raise StaleIncarnation(f"{rule}, {met} answers at {peer.url}")
            link = Link(
                peer=peer.name,
                incarnation=peer.incarnation,
                data_name=data,
                control_name=control,
                between_gpus=self._carries_gpus(peer),
            )
            if by_rref:
                link.use_rref(_MEET_TIMEOUT)
            return link
        except EagleRpcError:
            self._lost.add(peer.incarnation)
            raise

    def leave(self, link: Link, *, lost: bool) -> None:
        # The peer stays known until another one takes its name: torch has yet to tell it of the RRef's end.
        if lost:
            self._lost.add(link.incarnation)
        link.release(broken=lost)

    def _carries_gpus(self, target: Record) -> bool:
        """Whether supervision is to come from GPU to GPU, by what the registry knows of both GPUs now."""
        if not _on_gpus(self.me, target):
            return False
        return carries(self.me.gpu, target.gpu, [[one.gpu] for one in self._registry.living()])

    def admit(self, worker_id: int) -> None:
        """Adds a peer that has introduced itself, so that RRefs can call it back. Closes files of dead ones.

        Raises `ConnectionLost` if the registry does not know the peer or cannot be reached.
        """
        with self._lock:
            if worker_id in self._peers.values():
                return
        living = {one.id: one for one in self._registry.living()}
        if worker_id not in living:
            raise ConnectionLost(f"worker {worker_id} is not in the registry (yet)")
        peer = living[worker_id]
        maps = {_rpc_name(peer): {self.me.device: peer.device}} if _on_gpus(self.me, peer) else {}
        with self._lock:
            gone = {id_: name for name, id_ in self._peers.items() if id_ not in living}
            dead = [name for id_, name in gone.items() if id_ not in self._closed]
            self._closed = set(gone)
            self._add(_rpc_name(peer), peer.id, peer.url, maps)
        for name in dead:
            close_broken(name)

    def _add(
        self, name: str, worker_id: int, url: str, device_maps: dict[str, dict[str, str]] | None = None
    ) -> None:
        """Makes a peer known to the agent, in place of an older peer of this name."""
        if self._peers.get(name) == worker_id:
            return
        if name in self._peers:
            remove_peer(name, self._peers.pop(name))
        add_peer(name, worker_id, url, device_maps or {})
        self._peers[name] = worker_id

    def _fresh_id(self) -> int:
        if self._next_connection < _LOWEST_CONNECTION:
            opened = f"this process has opened {_LAST_CONNECTION - LAST_WORKER_ID} connections"
            raise ConnectionLost(f"{opened}, torch has ids for no more: restart it")
        self._next_connection -= 1
        return self._next_connection + 1


def _rpc_name(record: Record) -> str:
    """The RPC name of a worker's own agent: unique, since its id is."""
    return f"{agent_name(record.name)}:{record.id}"


def _on_gpus(one: Record, other: Record) -> bool:
    """Whether TensorPipe can carry CUDA tensors between the two: it maps devices of one host only."""
    return bool(one.gpu and other.gpu) and one.host == other.host


def _gpu_id(device: str) -> str:
    """The GPU's name for all processes: each sees the GPUs that it may use under numbers of its own."""
    return f"GPU-{torch.cuda.get_device_properties(device).uuid}" if device.startswith("cuda") else ""


# torch calls functions of modules, so `introduce` finds its membership here. A process joins once.
_memberships: list[ElasticMembership] = []


def introduce(worker_id: int) -> str:
    """Runs at a target: admits the trainer that calls and returns the target's incarnation."""
    membership = _memberships[0]
    membership.admit(worker_id)
    return membership.me.incarnation


@contextlib.contextmanager
def join_elastic(
    name: str,
    role: str,
    *,
    run: str,
    device: str,
    config: RpcConfig,
    permissions: Permissions,
    registry: RegistryClient,
    stop: threading.Event,
    when_superseded: Callable[[], None],
    when_drained: Callable[[], None] = lambda: None,
) -> Iterator[ElasticMembership]:
    """This worker's membership, announced at the registry while the body runs. Its agent shuts down alone.

    Calls `when_superseded` if another process takes the name over, and `when_drained` if an operator takes this
    worker out. Waits for the registry and for the name,
    each `config.start_timeout` seconds at most and not beyond `stop`. Raises `ConnectionLost` or
    `WaitTimeout` without a registry, `ConfigError` if all worker ids are used or this process has joined
    before, `NameTaken` while a living worker has the name; otherwise raises and exits as `running_agent`.
    """
    if _memberships:
        raise ConfigError(f"{name} must join RPC in a process of its own, got one that has joined it before")
    worker_id = take_id(registry, config.start_timeout, stop)
    targets = [f"target{index}" for index in range(_MAPPED_TARGETS)]
    device_maps = {target: {device: device} for target in targets} if device.startswith("cuda") else {}
    rpc_name = f"{agent_name(name)}:{worker_id}"
    with running_agent(
        rpc_name,
        worker_id=worker_id,
        world_size=None,
        store=dist.HashStore(),
        config=config,
        device_maps=device_maps,
        permissions=permissions,
    ):
        me = Record(
            name=name,
            role=role,
            run=run,
            id=worker_id,
            incarnation=secrets.token_hex(16),
            url=bound_url(rpc_name),
            device=device,
            gpu=_gpu_id(device),
            host=socket.gethostname(),
            pid=os.getpid(),
            status={},
        )
        membership = ElasticMembership(me, registry)
        _memberships.append(membership)
        with Beat(
            client=registry,
            record=me,
            status=lambda: membership.status(),
            interval=config.heartbeat_interval,
            patience=config.start_timeout,
            stop=stop,
            when_superseded=when_superseded,
            when_drained=when_drained,
        ):
            logger.info("%s listens on %s and is known to %s", rpc_name, me.url, registry)
            yield membership

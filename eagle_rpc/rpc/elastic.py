"""Elastic membership: every worker is an RPC agent of its own and adds peers as it meets them in the registry.

torch's own dynamic groups are poisoned by the first unclean leave, and its static groups admit nobody later. An agent
that is alone in its group has neither trouble: nobody's death is its business but that of its callers.
"""

import contextlib
import logging
import os
import secrets
import socket
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from typing import Any

import torch.distributed as dist
from torch.distributed import rpc

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConnectionLost, EagleRpcError, StaleIncarnation
from eagle_rpc.registry import LAST_WORKER_ID, Beat, Record, RegistryClient, take_id
from eagle_rpc.rpc.agent import listens, running_agent
from eagle_rpc.rpc.calls import PendingCall
from eagle_rpc.rpc.fence import Permissions
from eagle_rpc.rpc.internals import add_peer, bound_url, remove_peer
from eagle_rpc.rpc.link import Link, nudge
from eagle_rpc.rpc.membership import TargetAddress

logger = logging.getLogger(__name__)

# Ids of connections count down from torch's last to those of workers, which the registry counts up from 1.
_LAST_CONNECTION = 2**15 - 1
_LOWEST_CONNECTION = LAST_WORKER_ID + 1
# torch takes a caller's device maps only before it starts, when the targets are not known yet: so all of these names get
# one. Requests are CPU tensors; where replies go is the targets' maps' business, which `admit` makes.
_MAPPED_TARGETS = 64
# Seconds that a peer may take to answer a call that does next to nothing.
_MEET_TIMEOUT = 5.0


class ElasticMembership:
    """This worker among those of the registry. One a process."""

    elastic = True

    def __init__(self, me: Record, registry: RegistryClient) -> None:
        self.me = me
        self._registry = registry
        self._status: Callable[[], dict[str, Any]] = dict
        self._lock = threading.Lock()
        self._table: dict[str, int] = {}  # RPC names of peers, as this agent knows them
        self._lost: set[str] = set()  # incarnations with which a connection broke
        self._nudged: set[int] = set()  # ids of peers that were gone when somebody else came
        self._next_connection = _LAST_CONNECTION

    def report(self, status: Callable[[], dict[str, Any]]) -> None:
        """Has `status` asked at every beat from now on; a target serves once its status says that it does not drain."""
        self._status = status

    def status(self) -> dict[str, Any]:
        """What the next beat says."""
        return self._status()

    @property
    def reachable(self) -> bool:
        """Whether peers that come now can still connect with this worker."""
        return listens(self.me.url)

    def targets(self) -> Sequence[TargetAddress]:
        """The targets that have announced lately that they serve."""
        return [
            TargetAddress(
                name=one.name,
                incarnation=one.incarnation,
                worker_id=one.id,
                url=one.url,
                device=one.device,
                host=one.host,
            )
            for one in self._registry.living()
            if one.role == "target" and one.status.get("draining") is False
        ]

    def connect(self, address: TargetAddress, service: str) -> Link:
        """Two connections, one for tensors and one for everything else, once the incarnation has been verified.

        torch keeps a broken pipe for the id that it had, and an RRef is bound to its owner's id: so connections with an
        incarnation take its own id and call by RRef until one is lost; from then on they take fresh ids and call by name. So
        does a worker that cannot be reached itself: an RRef's owner calls back.
        """
        data, control = address.name, f"{address.name}-control"
        with self._lock:
            by_rref = address.incarnation not in self._lost and self.reachable
            self._put(data, address.worker_id if by_rref else self._fresh_id(), address.url)
            self._put(control, self._fresh_id(), address.url)
        try:
            self._introduce_myself(address, control)
            return Link(
                address.name,
                service,
                incarnation=address.incarnation,
                data=data,
                control=control,
                by_rref=by_rref,
                between_gpus=on_gpus(self.me, address),
                timeout=_MEET_TIMEOUT,
            )
        except EagleRpcError:
            self._mark_lost(address.incarnation)
            raise

    def _introduce_myself(self, address: TargetAddress, control: str) -> None:
        """Raises `StaleIncarnation` if somebody else than the one that is meant answers."""
        call = rpc.rpc_async(control, introduce, args=(self.me.id,), timeout=_MEET_TIMEOUT)
        incarnation = PendingCall(
            call, peer=address.name, what="the introduction", timeout=_MEET_TIMEOUT
        ).result()
        if incarnation != address.incarnation:
            raise StaleIncarnation(
                f"{address.name} must be incarnation {address.incarnation}, {incarnation} answers at {address.url}"
            )

    def leave(self, link: Link, *, lost: bool) -> None:
        # The names stay in the table until somebody else takes them: torch still tells the owner that the RRef is gone.
        link.release()
        if lost:
            self._mark_lost(link.incarnation)
            link.nudge()

    def _mark_lost(self, incarnation: str) -> None:
        with self._lock:
            self._lost.add(incarnation)

    def admit(self, worker_id: int) -> None:
        """Adds a peer that has introduced itself, as the registry knows it: an RRef's owner calls back."""
        with self._lock:
            if worker_id in self._table.values():
                return
        living = {one.id: one for one in self._registry.living()}
        if worker_id not in living:
            raise ConnectionLost(f"worker {worker_id} is not in the registry (yet)")
        self._let_go(living.keys())
        peer = living[worker_id]
        maps = {peer_name(peer): {self.me.device: peer.device}} if on_gpus(self.me, peer) else {}
        with self._lock:
            self._put(peer_name(peer), peer.id, peer.url, maps)

    def _let_go(self, living: Collection[int]) -> None:
        """Has torch close what it still holds of peers that have gone since the last one came."""
        with self._lock:
            self._nudged.difference_update(living)
            gone = [
                name
                for name, worker_id in self._table.items()
                if worker_id not in living and worker_id not in self._nudged
            ]
            self._nudged.update(self._table[name] for name in gone)
        for name in gone:
            nudge(name)

    def _put(
        self, name: str, worker_id: int, url: str, device_maps: dict[str, dict[str, str]] | None = None
    ) -> None:
        if self._table.get(name) == worker_id:
            return
        if name in self._table:
            remove_peer(name, self._table.pop(name))
        add_peer(name, worker_id, url, device_maps or {})
        self._table[name] = worker_id

    def _fresh_id(self) -> int:
        if self._next_connection < _LOWEST_CONNECTION:
            raise ConnectionLost(
                f"this process has opened {_LAST_CONNECTION - LAST_WORKER_ID} connections, torch numbers no more"
            )
        self._next_connection -= 1
        return self._next_connection + 1


def peer_name(record: Record) -> str:
    """The RPC name that a worker gives itself: unique, since its id is."""
    return f"{record.name}:{record.id}"


def on_gpus(one: Record | TargetAddress, other: Record | TargetAddress) -> bool:
    """Whether TensorPipe can carry CUDA tensors between the two: it maps devices of one host."""
    return one.device.startswith("cuda") and other.device.startswith("cuda") and one.host == other.host


# What `introduce` admits peers to: torch calls functions of modules, not methods of objects, and a process joins once.
_here: list[ElasticMembership] = []


def introduce(worker_id: int) -> str:
    """Runs at a target: lets a trainer in that the registry knows, and says which incarnation it has reached."""
    membership = _here[0]
    membership.admit(worker_id)
    return membership.me.incarnation


@contextlib.contextmanager
def join_elastic(
    name: str,
    role: str,
    *,
    job: str,
    device: str,
    config: RpcConfig,
    permissions: Permissions,
    registry: RegistryClient,
    stop: threading.Event,
    when_superseded: Callable[[], None],
) -> Iterator[ElasticMembership]:
    """Starts this worker's agent and announces it at the registry until the body ends; peers that it met stay as they are.

    `when_superseded` is called if another process takes the name over. Waits `config.start_timeout` for the registry and for
    the name, unless `stop` is set; raises `ConnectionLost` or `WaitTimeout` without a registry, `ConfigError` when it has
    numbered all the workers that torch can, `NameTaken` while a living worker has the name, otherwise as `running_agent` does.
    """
    worker_id = take_id(registry, config.start_timeout, stop)
    targets = [f"target{index}" for index in range(_MAPPED_TARGETS)]
    device_maps = {target: {device: device} for target in targets} if device.startswith("cuda") else {}
    with running_agent(
        f"{name}:{worker_id}",
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
            job=job,
            id=worker_id,
            incarnation=secrets.token_hex(16),
            url=bound_url(f"{name}:{worker_id}"),
            device=device,
            host=socket.gethostname(),
            pid=os.getpid(),
            status={},
        )
        membership = ElasticMembership(me, registry)
        _here.append(membership)
        with Beat(
            registry,
            me,
            status=membership.status,
            interval=config.heartbeat_interval,
            patience=config.start_timeout,
            stop=stop,
            when_superseded=when_superseded,
        ):
            logger.info(
                "%s listens on %s, known to the registry at %s", peer_name(me), me.url, config.registry
            )
            yield membership

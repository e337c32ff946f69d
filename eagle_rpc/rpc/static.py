"""Static membership: one torchrun job, all ranks in one TensorPipe world that starts and ends together.

torch's own rendezvous keeps the keys of a killed attempt, so a restart would read them. Here every attempt
has a namespace of its own in the store.
"""

import contextlib
import logging
import threading
from collections.abc import Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import WaitTimeout
from eagle_rpc.process import World
from eagle_rpc.process.waiting import wait_until
from eagle_rpc.rpc.agent import running_agent
from eagle_rpc.rpc.fence import Permissions
from eagle_rpc.rpc.internals import agent_name
from eagle_rpc.rpc.link import Link
from eagle_rpc.rpc.membership import TargetAddress
from eagle_rpc.topology import Cast, DevicePlan

logger = logging.getLogger(__name__)

# How all agents of the job shut down: the key in the store, and its values.
_SHUTDOWN, _TOGETHER, _ALONE = "shutdown", "together", "alone"

# The event of a worker that reads the store no more.
_LEFT = "left"


class StaticMembership:
    """The workers of one job, and the store through which they tell each other of events."""

    elastic = False

    def __init__(self, cast: Cast, store: dist.Store, config: RpcConfig, devices: DevicePlan) -> None:
        self.cast = cast
        self.store = store
        self._devices = devices
        self._config = config
        self._lost: set[str] = set()
        self._together = False

    def targets(self) -> Sequence[TargetAddress]:
        """The targets of the job except lost ones: torch never reconnects to a worker with the same id."""
        names = [name for name in self.cast.target_names if name not in self._lost]
        return [TargetAddress(name=name, incarnation=name) for name in names]

    def stages(self, target: str) -> Sequence[TargetAddress]:
        names = [name for name in self.cast.stages_of(target) if name not in self._lost]
        return [TargetAddress(name=name, incarnation=name) for name in names]

    def connect(self, address: TargetAddress) -> Link:
        """A link with one connection for all calls: a static world offers no second one."""
        name = address.name
        link = Link(
            peer=name,
            incarnation=address.incarnation,
            data_name=agent_name(name),
            control_name=agent_name(name),
            between_gpus=name in self._devices.device_maps,
        )
        link.use_rref(self._config.start_timeout)
        return link

    def leave(self, link: Link, *, lost: bool) -> None:
        if lost:
            self._lost.add(link.peer)
        link.release()

    def mark(self, event: str) -> None:
        """Tells all workers that `event` has happened to this one."""
        self.store.set(f"{self.cast.me.name}/{event}", "1")

    def marked(self, names: Sequence[str], event: str) -> bool:
        """Whether all of `names` have marked `event`."""
        return self.store.check([f"{name}/{event}" for name in names])

    def wait_for(
        self, names: Sequence[str], event: str, *, timeout: float, stop: threading.Event | None = None
    ) -> None:
        """Waits for all `names` to mark `event`, or for `stop`; raises `WaitTimeout` after `timeout` s."""

        def missing() -> str:
            return f"missing {', '.join(name for name in names if not self.marked([name], event))}"

        what = f"{', '.join(names)} to be {event}"
        unstopped = stop or threading.Event()
        wait_until(lambda: self.marked(names, event), what, seconds=timeout, stop=unstopped, why=missing)

    def announce_leaving(self) -> None:
        """Says that this worker may leave before the others; each agent then shuts down alone.

        Without effect if another worker already waits in a common shutdown.
        """
        self.store.compare_set(_SHUTDOWN, "", _ALONE)

    def shuts_down_together(self) -> bool:
        """Whether the agents shut down together; decides so unless a worker has announced leaving."""
        # The first proposal holds for all: an agent that shuts down alone would block a common shutdown.
        self._together = self.store.compare_set(_SHUTDOWN, "", _TOGETHER).decode() == _TOGETHER
        return self._together

    def leave_store(self, *, host: bool) -> None:
        """Marks that this worker shut down with the others; the store's `host` waits until all have.

        Agents that shut down together end by reading the store: without this wait they would find it gone.
        """
        if not self._together:
            return
        self.mark(_LEFT)
        if not host:
            return
        try:
            self.wait_for(self.cast.names, _LEFT, timeout=self._config.shutdown_timeout)
        except WaitTimeout as error:
            logger.warning("leaving although other workers may still shut down: %s", error)


@contextlib.contextmanager
def join_static(
    cast: Cast, world: World, config: RpcConfig, devices: DevicePlan, permissions: Permissions
) -> Iterator[StaticMembership]:
    """This worker's membership while the body runs; the agents shut down together unless one left early.

    After an exception the agent shuts down alone and at once: peers may be gone. Raises and exits as
    `running_agent`.
    """
    store = attempt_store(world, timeout=config.start_timeout)
    membership = StaticMembership(cast, store, config, devices)
    with running_agent(
        agent_name(cast.me.name),
        worker_id=cast.names.index(cast.me.name),
        world_size=len(cast.names),
        store=dist.PrefixStore("agents", store),
        config=config,
        device_maps=devices.device_maps,
        permissions=permissions,
        shuts_down_together=membership.shuts_down_together,
    ):
        logger.info("joined %s over %s", ", ".join(cast.names), config.interface)
        yield membership
    membership.leave_store(host=_hosts_store(world))


def attempt_store(world: World, *, timeout: float) -> dist.Store:
    """The store of this torchrun attempt, in a namespace of its own. `timeout` as of `torchrun_store`."""
    if world.master_addr is None:
        return dist.HashStore()
    return dist.PrefixStore(
        f"eagle_rpc/{world.run_id}/{world.restart_count}", torchrun_store(world, timeout=timeout)
    )


def torchrun_store(world: World, *, timeout: float) -> dist.Store:
    """The store of torchrun, with all keys; rank 0 hosts it where torchrun does not.

    `timeout` in seconds is for connecting and for reads that block.
    """
    assert world.master_addr is not None, "torchrun names the place of its store"
    return dist.TCPStore(
        world.master_addr,
        world.master_port,
        is_master=_hosts_store(world),
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
        # Two stores of one process share the server.
        multi_tenant=True,
    )


def _hosts_store(world: World) -> bool:
    return world.rank == 0 and not world.agent_hosts_store

"""Static membership: one torchrun job, all ranks in one TensorPipe world that lives and dies together.

torch's own rendezvous keeps the keys of a killed attempt, so restarts would find each other's leftovers; here every
attempt has a namespace of its own in the store.
"""

import contextlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import torch.distributed as dist

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import WaitTimeout
from eagle_rpc.process import World
from eagle_rpc.rpc.agent import running_agent
from eagle_rpc.rpc.fence import Permissions
from eagle_rpc.rpc.link import Link
from eagle_rpc.rpc.membership import TargetAddress
from eagle_rpc.topology import Cast, DevicePlan

logger = logging.getLogger(__name__)

# How the agents of the job end: the key, and its values.
_END, _TOGETHER, _ALONE = "end", "together", "alone"
_POLL_SECONDS = 0.2
_REPORT_SECONDS = 10.0


class StaticMembership:
    """A joined world: the store that all workers share, and the marks they leave in it."""

    elastic = False

    def __init__(self, cast: Cast, store: dist.Store, config: RpcConfig, devices: DevicePlan) -> None:
        self.cast = cast
        self.store = store
        self._devices = devices
        self._config = config
        self._lost: set[str] = set()

    def targets(self) -> Sequence[TargetAddress]:
        """All of the job but those that were lost: torch never reconnects to a worker of the same id."""
        return [
            TargetAddress(
                name=name, incarnation=name, worker_id=self.cast.names.index(name), url="", device="", host=""
            )
            for name in self.cast.target_names
            if name not in self._lost
        ]

    def connect(self, address: TargetAddress, service: str) -> Link:
        """One connection for everything: the peers of a static world cannot be given a second one."""
        return Link(
            address.name,
            service,
            incarnation=address.incarnation,
            data=address.name,
            control=address.name,
            by_rref=True,
            between_gpus=address.name in self._devices.device_maps,
            timeout=self._config.start_timeout,
        )

    def leave(self, link: Link, *, lost: bool) -> None:
        if lost:
            self._lost.add(link.peer)
        link.release()

    def mark(self, event: str) -> None:
        """Tells everybody that `event` has happened to this worker."""
        self.store.set(f"{self.cast.me.name}/{event}", "1")

    def part(self) -> None:
        """This worker may leave before the others: nobody's end waits for anybody, unless somebody's does already."""
        self._decide_end(_ALONE)

    def ends_together(self) -> bool:
        """Whether this worker's end waits for the others', as from now on every worker's does if nobody has parted."""
        return self._decide_end(_TOGETHER) == _TOGETHER

    def _decide_end(self, wish: str) -> str:
        """The first wish counts for all: ends of two kinds would wait for each other in vain."""
        return self.store.compare_set(_END, "", wish).decode()

    def marked(self, names: tuple[str, ...], event: str) -> bool:
        """Whether all `names` have marked `event`."""
        return self.store.check([f"{name}/{event}" for name in names])

    def wait_for(
        self,
        names: tuple[str, ...],
        event: str,
        *,
        timeout: float | None,
        until: Callable[[], bool] = lambda: False,
    ) -> None:
        """Blocks until all `names` have marked `event` or `until` holds; says every ten seconds whom it waits for.

        Raises `WaitTimeout` after `timeout` seconds; null only with an `until` that is sure to come.
        """
        started = last_report = time.monotonic()
        missing = list(names)
        while missing := [name for name in missing if not self.store.check([f"{name}/{event}"])]:
            now = time.monotonic()
            if until():
                return
            if timeout is not None and now - started > timeout:
                raise WaitTimeout(f"{', '.join(missing)} not {event} within {timeout:.0f} s")
            if timeout is not None and now - last_report > _REPORT_SECONDS:
                logger.info("waiting for %s to be %s (%.0f s)", ", ".join(missing), event, now - started)
                last_report = now
            time.sleep(_POLL_SECONDS)

    def group_store(self, name: str) -> dist.Store:
        """A namespace for a process group among some of the workers."""
        return dist.PrefixStore(name, self.store)


@contextlib.contextmanager
def join_static(
    cast: Cast, world: World, config: RpcConfig, devices: DevicePlan, permissions: Permissions
) -> Iterator[StaticMembership]:
    """Starts this worker's RPC agent, and ends it with the others when the body ends well and nobody has parted.

    After an exception the agent ends alone and at once: peers may be gone. Raises and ends as `running_agent` does.
    """
    store = attempt_store(world, timeout=config.start_timeout)
    with running_agent(
        cast.me.name,
        worker_id=cast.names.index(cast.me.name),
        world_size=len(cast.names),
        store=dist.PrefixStore("agents", store),
        config=config,
        device_maps=devices.device_maps,
        permissions=permissions,
    ) as agent:
        logger.info("joined %s over %s", ", ".join(cast.names), config.interface)
        membership = StaticMembership(cast, store, config, devices)
        yield membership
        agent.graceful = membership.ends_together()


def attempt_store(world: World, *, timeout: float) -> dist.Store:
    """The store that torchrun hosts (or rank 0, where it does not), in this attempt's namespace."""
    if not world.launched:
        return dist.HashStore()
    assert world.master_addr is not None
    tcp = dist.TCPStore(
        world.master_addr,
        world.master_port,
        is_master=world.rank == 0 and not world.agent_hosts_store,
        wait_for_workers=False,
        timeout=timedelta(seconds=timeout),
    )
    return dist.PrefixStore(f"eagle_rpc/{world.run_id}/{world.restart_count}", tcp)

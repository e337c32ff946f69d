"""What the workers of a static job agree on through their store."""

import threading

import pytest
import torch.distributed as dist

from eagle_rpc.config.schema import RpcConfig, TopologyConfig
from eagle_rpc.errors import WaitTimeout
from eagle_rpc.process import World
from eagle_rpc.rpc import StaticMembership
from eagle_rpc.topology import DevicePlan, assign_roles


def memberships() -> list[StaticMembership]:
    """A target's and a trainer's, with one store."""
    store = dist.HashStore()
    casts = [assign_roles(TopologyConfig(), World(rank=rank, size=2)) for rank in range(2)]
    return [StaticMembership(cast, store, RpcConfig(), DevicePlan("cpu", {})) for cast in casts]


def test_agents_shut_down_together_unless_a_worker_leaves_before_the_first_end():
    target, trainer = memberships()
    trainer.announce_leaving()
    assert not target.shuts_down_together() and not trainer.shuts_down_together()
    target, trainer = memberships()
    assert target.shuts_down_together()
    trainer.announce_leaving()
    assert trainer.shuts_down_together()


def test_a_wait_for_workers_names_the_missing_ones_at_its_bound():
    target, trainer = memberships()
    target.mark("ready")
    trainer.wait_for(["target0"], "ready", timeout=60)
    with pytest.raises(WaitTimeout, match=r"waiting for target0, trainer0 to be ready.*missing trainer0"):
        target.wait_for(["target0", "trainer0"], "ready", timeout=0)


def test_a_wait_for_workers_ends_when_the_process_is_told_to_stop():
    target, _ = memberships()
    stop = threading.Event()
    stop.set()
    target.wait_for(["trainer0"], "done", timeout=1000, stop=stop)
    assert not target.marked(["trainer0"], "done")

"""How the trainers of one start find each other in a store that earlier trainers have used."""

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch.distributed as dist
from support.processes import free_port

from eagle_rpc.errors import WaitTimeout
from eagle_rpc.process import World
from eagle_rpc.rpc import gathered_store

SECONDS = 60.0


@pytest.fixture
def server() -> dist.TCPStore:
    """torchrun's store, which outlives the trainers of each start."""
    return dist.TCPStore("127.0.0.1", free_port(), is_master=True, wait_for_workers=False)


def world(server: dist.TCPStore, rank: int, size: int, restarts: int = 0) -> World:
    return World(
        rank=rank,
        size=size,
        restart_count=restarts,
        run_id="run",
        master_addr=server.host,
        master_port=server.port,
        agent_hosts_store=True,
    )


def gather(server: dist.TCPStore, size: int) -> list[dist.Store]:
    """The stores of all trainers of one start, whose agents count restarts differently."""

    def join(rank: int) -> dist.Store:
        # The first trainer comes last.
        number = size - 1 - rank
        return gathered_store(world(server, number, size, number), timeout=SECONDS, stop=threading.Event())

    with ThreadPoolExecutor(size) as threads:
        stores = list(threads.map(join, range(size)))
    return stores[::-1]


def test_trainers_of_one_start_share_a_store_without_the_keys_of_those_before(server: dist.TCPStore):
    for size in (2, 3, 2):
        stores = gather(server, size)
        assert not any(store.check(["inputs"]) for store in stores)
        stores[-1].set("inputs", "good")
        assert [store.get("inputs") for store in stores] == [b"good"] * size


def test_who_has_not_come_is_named_after_the_bound(server: dist.TCPStore):
    gather(server, 3)
    with pytest.raises(
        WaitTimeout, match=r"gave up waiting for the other trainers to start.*trainer1, trainer2"
    ):
        gathered_store(world(server, 0, 3), timeout=0.3, stop=threading.Event())
    with pytest.raises(WaitTimeout, match="gave up waiting for trainer0 to start"):
        gathered_store(world(server, 1, 3), timeout=0.3, stop=threading.Event())


def test_a_stop_ends_the_wait_and_a_sole_trainer_does_not_wait(server: dist.TCPStore):
    stop = threading.Event()
    stop.set()
    with pytest.raises(WaitTimeout, match="stopped while waiting for trainer0"):
        gathered_store(world(server, 1, 2), timeout=SECONDS, stop=stop)
    assert isinstance(gathered_store(World(), timeout=SECONDS, stop=stop), dist.HashStore)

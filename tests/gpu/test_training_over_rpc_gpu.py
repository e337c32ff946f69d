"""RPC with CUDA tensors and NCCL's collectives in one process: neither keeps the other waiting for ever."""

import contextlib
from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from gpu_marks import ON_A_GPU
from support.service_training import service_config, take_part
from support.workers import run_workers
from torch import Tensor

from eagle_rpc.config import Config
from eagle_rpc.config.choices import Sharding
from eagle_rpc.rpc import StaticMembership
from eagle_rpc.train import TrainerGroup, learner
from eagle_rpc.train.sharded_weights import ShardedWeights

pytestmark = [*ON_A_GPU, pytest.mark.rpc]


class LoneTrainer(TrainerGroup):
    """One trainer whose sums pass through NCCL all the same."""

    def sum_(self, tensor: Tensor, what: str) -> Tensor:
        if tensor.is_cuda:
            dist.all_reduce(tensor, group=self._gpu_group)
        return tensor


@contextlib.contextmanager
def lone_trainer(
    config: Config, membership: StaticMembership, device: torch.device
) -> Iterator[TrainerGroup]:
    torch.cuda.set_device(device)
    store = dist.PrefixStore("trainers", membership.store)
    dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=device)
    # The parts of one trainer are all there is, but they are reduced and gathered.
    learner.hold_weights = lambda draft, config, group: ShardedWeights(draft, group)
    try:
        yield LoneTrainer(0, 1, 60.0, dist.group.WORLD)
    finally:
        dist.destroy_process_group()


def test_a_trainer_in_an_nccl_group_of_one_trains_on_what_rpc_brings_to_its_gpu():
    _, trainer = run_workers(take_part, 2, service_config("auto", trainers=1), 200, lone_trainer, timeout=170)
    assert trainer["between_gpus"] == [torch.cuda.device_count() > 1]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
@pytest.mark.parametrize("sharding", list(Sharding), ids=lambda one: one.name)
def test_supervision_arrives_at_trainers_whose_collectives_wait_on_the_targets_gpu(sharding: Sharding):
    config = service_config("auto", trainers=2, sharding=sharding)
    _, first, second = run_workers(take_part, 3, config, 50, timeout=170)
    assert first["digest"] == second["digest"]
    # The second trainer computes on the target's GPU: nothing is sent from GPU to GPU.
    assert first["between_gpus"] == second["between_gpus"] == [False]

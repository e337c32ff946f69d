"""Two trainers with a GPU each: NCCL sums their gradients, and they end as one trainer does that takes both
shares.

Holding all of the weights each, or parts of them.
"""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from gpu_marks import ON_TWO_GPUS
from support.ttt_cases import Case, case_batch, case_draft, on_device

from eagle_rpc.config.choices import Sharding
from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.process import bind_to_interface
from eagle_rpc.train import TrainerGroup, join_trainers
from eagle_rpc.train.learner import Learner

pytestmark = ON_TWO_GPUS

CASE = Case(head_dim=64, hidden_size=256, length=64)


def learner_on(device: str, group: TrainerGroup, **train) -> Learner:
    return Learner(
        case_draft(CASE).to(device), TrainConfig(**train), DraftConfig(ttt_steps=3), group, total_steps=10
    )


def batches_on(device: str, step: int) -> list:
    return [
        on_device(case_batch(Case(head_dim=64, hidden_size=256, length=64, seed=2 * step + part)), device)
        for part in range(2)
    ]


def train_one(rank: int, path: Path, train: dict) -> None:
    bind_to_interface("lo")
    device = f"cuda:{rank}"
    store = dist.FileStore(str(path / "store"), 2)
    with join_trainers(store, rank, 2, timeout=60.0, device=torch.device(device)) as group:
        learner = learner_on(device, group, **train)
        norms = [learner.learn([batches_on(device, step)[rank]]).grad_norm.item() for step in range(3)]
        torch.save(
            {"digest": learner.digest(), "norms": norms, "backend": dist.get_backend(group._gpu_group)},
            path / f"{rank}.pt",
        )


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "reference"])
@pytest.mark.parametrize("sharding", list(Sharding), ids=lambda one: one.name)
def test_two_trainers_train_as_one(tmp_path, sharding, fused):
    train = {"sharding": sharding, "fused": fused}
    mp.spawn(train_one, (tmp_path, train), nprocs=2)
    first, second = (torch.load(tmp_path / f"{rank}.pt") for rank in range(2))
    assert first["backend"] == "nccl"
    assert first["digest"] == second["digest"]
    alone = learner_on("cuda:0", TrainerGroup(), fused=fused)
    norms = [alone.learn(batches_on("cuda:0", step)).grad_norm.item() for step in range(3)]
    assert first["norms"] == pytest.approx(norms, rel=1e-2)

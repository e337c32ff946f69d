"""Several trainers whose small requests run together in one target, over real RPC."""

from pathlib import Path
from typing import Any

import pytest
import torch
from support.elastic import WAIT, Link, Registry, Worker, remote_target, serve_tiny_target
from support.tiny_target import tensors_of, tiny_batch, tiny_mapping, tiny_target_config
from support.waiting import until

from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

pytestmark = pytest.mark.rpc

NUM_TRAINERS, NUM_BATCHES = 3, 20


def stream_all(link: Link, name: str, first_seed: int, address: str, token: bytes) -> None:
    with remote_target(name, address, token, share_forward=True, prefetch=6) as backend:
        backend.open_session(tiny_mapping())
        link.send("ready")
        link.receive()
        seeds = range(first_seed, first_seed + NUM_BATCHES)
        batches = backend.stream(tiny_batch(seed) for seed in seeds)
        # Arrays travel by value; tensors would be fetched from this process, which may have ended.
        link.send([{name: tensor.numpy() for name, tensor in tensors_of(batch).items()} for batch in batches])


def status_of_target(registry: Registry) -> dict[str, Any]:
    """As the newest beat tells it."""
    return next(one.record.status for one in registry.client.records() if one.record.role == "target")


def num_answered(registry: Registry) -> int:
    return status_of_target(registry)["requests"].get("ok", 0)


def test_trainers_that_share_passes_get_their_own_batches_in_order(tmp_path: Path):
    registry = Registry(tmp_path)
    workers = [Worker(serve_tiny_target, "target0", registry.address, registry.token)]
    try:
        workers[0].receive()
        for index in range(NUM_TRAINERS):
            workers.append(
                Worker(stream_all, f"trainer{index}", 100 * index, registry.address, registry.token)
            )
        for trainer in workers[1:]:
            assert trainer.receive() == "ready"
        for trainer in workers[1:]:
            trainer.send("go")
        answers = [trainer.receive() for trainer in workers[1:]]
        until(
            lambda: num_answered(registry) == NUM_TRAINERS * NUM_BATCHES,
            "a beat tells of all answers",
            seconds=WAIT,
        )
        status = status_of_target(registry)
    finally:
        for worker in workers:
            worker.end()
        registry.end()
    assert status["passes"] < NUM_TRAINERS * NUM_BATCHES, "nothing ran together"
    target = HFEagle3TargetModel.load(tiny_target_config(), "cpu", cache_dir="unused", seed=0)
    alone = ColocatedEagle3TargetModel(target, tiny_target_config(), encoding="hidden", rows="position_mask")
    alone.open_session(tiny_mapping())
    for index, batches in enumerate(answers):
        assert len(batches) == NUM_BATCHES
        for seed, got in enumerate(batches, start=100 * index):
            tokens = tiny_batch(seed)
            expected = tensors_of(
                alone.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask)
            )
            for name, tensor in expected.items():
                torch.testing.assert_close(torch.from_numpy(got[name]), tensor, rtol=1e-4, atol=1e-5)

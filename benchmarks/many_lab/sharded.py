"""Part 4: trainers of one large draft on a GPU each, with all of its training state or a share of it (FSDP2).

torchrun --nproc-per-node=CARDS -m many_lab.sharded SHAPE SIZE none|state OUT.json      (started by `many_lab.scripts`)

Whole optimiser steps on random supervision, a micro-batch a trainer. Of a sequence longer than 8192 tokens the
last quarter is supervised, of others 90 %. Tokens per second of all trainers; memory of the one that needs most.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from measuring import GIB, matrix_ceiling, measure, size_of
from trainer import STEPS, flops_per_token, make_batch, make_draft, make_loss_mask

from eagle_rpc.config.choices import Sharding
from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.process import bind_to_interface, read_world
from eagle_rpc.rpc import attempt_store
from eagle_rpc.train import join_trainers
from eagle_rpc.train.learner import Learner

_SECONDS = 120.0
_LONG = 8192


def main() -> None:
    shape, size, sharding, path = sys.argv[1:]
    bind_to_interface("lo")
    world = read_world()
    device = torch.device("cuda", world.local_rank)
    torch.cuda.set_device(device)
    store = attempt_store(world, timeout=_SECONDS)
    with join_trainers(store, world.rank, world.size, timeout=_SECONDS, device=device) as group:
        draft = make_draft(shape)
        rows, length = size_of(size)
        share = 0.25 if length > _LONG else 0.9
        batch = make_batch(draft, make_loss_mask(rows, length, share, 1, None), "hidden")
        config = TrainConfig(sharding=Sharding[sharding])
        learner = Learner(draft, config, DraftConfig(ttt_steps=STEPS), group, total_steps=10**6)
        learner.learn([batch])
        ceiling = matrix_ceiling(device)
        flops = flops_per_token(draft.config, length)
        figures = measure(
            lambda: learner.learn([batch]), rows * length, flops, ceiling, slow=True, device=device
        )
        peaks = torch.tensor([figures["resident_gib"] + figures["peak_gib_over_resident"]])
        if world.size > 1:
            dist.all_reduce(peaks, op=dist.ReduceOp.MAX)
    if world.rank == 0:
        total = {
            "tokens_per_second": world.size * figures["tokens_per_second"],
            "share_of_ceiling": figures["share_of_ceiling"],
            "supervised_share": share,
            "peak_gib": float(peaks),
            "card_gib": torch.cuda.get_device_properties(device).total_memory / GIB,
        }
        path_of_result = Path(path)
        path_of_result.write_text(
            json.dumps({"trainers": world.size, "size": size, "sharding": sharding, **total})
        )


if __name__ == "__main__":
    main()

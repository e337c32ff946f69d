"""What several trainers with a GPU each make of one draft: optimiser steps whose gradients NCCL sums.

    python benchmarks/several_trainers.py --out DIR [--size 4x2048]

One process a GPU. Tokens/s of all, beside one trainer's on the same machine, and whether all end with the same bits, go to
DIR/several_trainers.json.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from trainer import STEPS, environment, make_batch, make_draft, median_seconds

from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.topology import bind_to_interface
from eagle_rpc.train import TrainerGroup, join_trainers
from eagle_rpc.train.learner import Learner


def train(rank: int, size: int, directory: Path, rows: int, length: int) -> None:
    """Times one trainer's optimiser steps and writes down what it saw."""
    bind_to_interface("lo")
    torch.cuda.set_device(rank)
    store = dist.FileStore(str(directory / f"store_{size}"), size)
    with join_trainers(store, rank, size, timeout=120.0, device=torch.device("cuda", rank)) as group:
        figures = time_steps(group, rows, length)
    (directory / f"{size}_{rank}.json").write_text(json.dumps(figures))


def time_steps(group: TrainerGroup, rows: int, length: int) -> dict[str, Any]:
    draft = make_draft("llama")
    batch = make_batch(draft, rows, length, "hidden")
    learner = Learner(draft, TrainConfig(), DraftConfig(ttt_steps=STEPS), group, total_steps=10**6)
    seconds = median_seconds(lambda: learner.learn([batch]), repeats=9, warmups=3)
    return {"milliseconds": 1e3 * seconds, "tokens_per_second": group.size * rows * length / seconds, "digest": learner.digest()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--size", default="4x2048")
    options = parser.parse_args()
    rows, length = map(int, options.size.split("x"))
    content: dict[str, Any] = {**environment(), "size": options.size, "trainers": {}}
    for size in sorted({1, torch.cuda.device_count()}):
        with tempfile.TemporaryDirectory() as name:
            directory = Path(name)
            mp.spawn(train, (size, directory, rows, length), nprocs=size)
            figures = [json.loads((directory / f"{size}_{rank}.json").read_text()) for rank in range(size)]
        digests = {entry.pop("digest") for entry in figures}
        content["trainers"][size] = {"each": figures, "same_bits": len(digests) == 1}
        print(size, content["trainers"][size], flush=True)
        (options.out / "several_trainers.json").write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()

"""The training of a draft: loop, optimiser step, trainers' group, checkpoints, run directory."""

from eagle_rpc.train.checkpoint import (
    Checkpoint,
    best_checkpoint,
    checkpoint_of,
    latest_checkpoint,
    latest_whole_checkpoint,
    load_target_embedding,
    read_checkpoint,
)
from eagle_rpc.train.distributed import TrainerGroup, join_trainers
from eagle_rpc.train.loop import Trainer
from eagle_rpc.train.record import RunRecord, plain

__all__ = [
    "Checkpoint",
    "RunRecord",
    "Trainer",
    "TrainerGroup",
    "best_checkpoint",
    "checkpoint_of",
    "join_trainers",
    "latest_checkpoint",
    "latest_whole_checkpoint",
    "load_target_embedding",
    "plain",
    "read_checkpoint",
]

"""A run of two trainers, killed and continued by three: each sample counts once in each epoch."""

import json
import os
import signal
from collections import Counter
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from training_cases import TableTarget, make_trainer, train_config

from eagle_rpc.data import BatchPlan, ChatDataset, Example
from eagle_rpc.process import bind_to_interface
from eagle_rpc.train.checkpoint import Checkpoint, latest_checkpoint, read_checkpoint
from eagle_rpc.train.distributed import join_trainers

NUM_CHATS, EPOCHS = 30, 2
SETTINGS = train_config(
    max_steps=100,
    max_epochs=EPOCHS,
    batch_size=1,
    accumulation=2,
    autocast=None,
    validate_every=0,
    checkpoint_every=1,
)


def plan(packed_length: int | None, rank: int = 0, num_ranks: int = 1) -> BatchPlan:
    """The first token of a chat is its number; no other token is so low."""

    def chat(number: int) -> Example:
        length = 4 + number % 7
        ids = torch.full((length,), NUM_CHATS + number % 9)
        ids[0] = number
        return Example(ids, torch.arange(length) >= 2)

    chats = ChatDataset([chat(number) for number in range(NUM_CHATS)], max_length=16)
    return BatchPlan(chats, batch_size=1, seed=3, rank=rank, num_ranks=num_ranks, packed_length=packed_length)


class WritingTarget(TableTarget):
    """Writes down the chats of each micro-batch; kills its process at micro-batch `killed_at`."""

    def __init__(self, path: Path, killed_at: int | None) -> None:
        super().__init__()
        self._path, self._killed_at = path, killed_at

    def deliver(self, tokens):
        if self.batches_delivered == self._killed_at:
            os.kill(os.getpid(), signal.SIGKILL)
        ids = tokens.input_ids[tokens.attention_mask.bool()].tolist()
        with self._path.open("a", encoding="ascii") as file:
            file.write(json.dumps([token for token in ids if token < NUM_CHATS]) + "\n")
        return super().deliver(tokens)


def train_one(rank: int, size: int, path: Path, packed_length: int | None, killed_at: int | None) -> None:
    bind_to_interface("lo")
    store = dist.FileStore(str(path / f"store_{size}"), size)
    with join_trainers(store, rank, size, timeout=60.0) as group:
        make_trainer(
            path / "run",
            SETTINGS,
            group=group,
            target=WritingTarget(path / f"chats_{size}_{rank}.txt", killed_at),
            batches=plan(packed_length, rank, size),
            validation=None,
        ).train()


def chats_of_steps(path: Path, size: int, steps: int | None = None) -> list[int]:
    """The chats that `size` trainers trained on, in their first `steps` steps or at all."""
    last = None if steps is None else steps * SETTINGS.accumulation
    return [
        chat
        for rank in range(size)
        for line in (path / f"chats_{size}_{rank}.txt").read_text().splitlines()[:last]
        for chat in json.loads(line)
    ]


def newest(path: Path) -> Checkpoint:
    found = latest_checkpoint(path / "run" / "checkpoints")
    assert found is not None
    return read_checkpoint(found)


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("packed_length", [None, 20])
def test_three_trainers_finish_what_two_began_and_train_on_each_chat_once_an_epoch(tmp_path, packed_length):
    alone = plan(packed_length)
    steps_of_epoch = alone.sequences_per_epoch // (2 * SETTINGS.accumulation)
    with pytest.raises((mp.ProcessExitedException, mp.ProcessRaisedException)):
        killed_at = (steps_of_epoch - 1) * SETTINGS.accumulation + 1
        mp.spawn(train_one, (2, tmp_path, packed_length, killed_at), nprocs=2)
    begun = newest(tmp_path)
    assert 0 < begun.sequences < alone.sequences_per_epoch
    mp.spawn(train_one, (3, tmp_path, packed_length, None), nprocs=3)
    done = newest(tmp_path)
    surplus = done.sequences - EPOCHS * alone.sequences_per_epoch
    assert 0 <= surplus < 3 * SETTINGS.accumulation
    # What the two did after their last checkpoint is lost with them, and done again.
    trained = Counter(chats_of_steps(tmp_path, 2, begun.step) + chats_of_steps(tmp_path, 3))
    # The last step reaches into an epoch after the last one.
    begun_epoch = [alone.sequences(EPOCHS * alone.sequences_per_epoch + number) for number in range(surplus)]
    trained.subtract(chat for (sequence,) in begun_epoch for chat in sequence)
    assert trained == Counter(dict.fromkeys(range(NUM_CHATS), EPOCHS))

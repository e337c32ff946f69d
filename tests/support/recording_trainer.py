"""`python -m eagle_rpc`, whose trainers write down the chats that they train on.

Two trainers wait before their fourth step until they are told to stop, as torchrun does when a third one comes. The
third one waits before its second step. Who waits leaves the file `waiting-N` with the number of trainers.
"""

import json
import os
from pathlib import Path
from typing import Any

from eagle_rpc.__main__ import main
from eagle_rpc.train.learner import Learner
from eagle_rpc.train.loop import Trainer

# Steps of two trainers and then of three; the last of them when they know that they have to stop.
STEPS_OF_TWO, STEPS_OF_THREE = 4, 2
# By the number of trainers: who waits, and the step before which it does.
_WAITS = {2: ((0, 1), STEPS_OF_TWO - 1), 3: ((2,), STEPS_OF_TWO + STEPS_OF_THREE - 1)}
_PATIENCE = 240.0


def record_training() -> None:
    """From now on, a line for each sequence: the number of trainers and the token ids, in `trained-PID.jsonl`."""
    step, learn = Trainer._train_step, Learner._learn_micro_batch
    num_trainers = 0

    def train_step(self: Trainer, *arguments: Any) -> None:
        nonlocal num_trainers
        num_trainers = self._group.size
        ranks, steps = _WAITS[num_trainers]
        if self._group.rank in ranks and self.learner.steps_done == steps:
            Path(f"waiting-{num_trainers}").touch()
            assert self._stop.wait(_PATIENCE), "trainers are told to stop when one comes or goes"
        step(self, *arguments)

    def learn_micro_batch(self: Learner, batch: Any, *arguments: Any) -> Any:
        with Path(f"trained-{os.getpid()}.jsonl").open("a", encoding="ascii") as file:
            for ids in batch.input_ids.tolist():
                file.write(json.dumps([num_trainers, ids]) + "\n")
        return learn(self, batch, *arguments)

    Trainer._train_step, Learner._learn_micro_batch = train_step, learn_micro_batch


if __name__ == "__main__":
    record_training()
    main()

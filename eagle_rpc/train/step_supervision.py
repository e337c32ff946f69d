"""What one optimiser step trains on: counted as a whole, held one micro-batch at a time.

A step's losses are divided by the number of their supervised rows, over all micro-batches and trainers, and each of the S
steps of training-time test has a number of its own. The target's argmax decides which rows count, so the numbers are known
only when the last micro-batch is here. A gradient cannot be corrected afterwards: it mixes all S steps in one backward,
and a buffer for each would cost S times the memory of the gradients. So the first micro-batches wait for the last. What
counting needs is small and stays; what is large may wait in host memory.
"""

from collections import deque
from collections.abc import Iterable

import torch

from eagle_rpc.draft import count_rows
from eagle_rpc.supervision import Eagle3TargetBatch, to_device, to_host


class StepSupervision:
    """The micro-batches of one trainer for one optimiser step, in order; constructing it waits for all of them.

    With `offload` the device holds all of at most one of them at a time, and beside it the one that is arriving: the first
    stays where it is, which is the first to be used. The others' large tensors wait in pinned host memory, from where they
    are copied unchanged. Without `offload`, or on a CPU, all stay.
    """

    def __init__(self, batches: Iterable[Eagle3TargetBatch], ttt_steps: int, *, offload: bool) -> None:
        self._waiting: deque[Eagle3TargetBatch] = deque()
        self._device: torch.device | None = None
        self._offload = offload
        counts = []
        for batch in batches:
            counts.append(count_rows(batch, ttt_steps))
            self._device = batch.aux_hidden_states.device
            self._waiting.append(batch.map_large(to_host) if offload and self._waiting else batch)
            # Not to be held while the next one is waited for.
            del batch
        self.row_counts = torch.stack(counts).sum(dim=0)  # [S] int64, of this trainer

    def __len__(self) -> int:
        """Micro-batches that have not been taken."""
        return len(self._waiting)

    def take(self) -> Eagle3TargetBatch:
        """The next micro-batch, on the device; from now on it is the caller's alone."""
        batch = self._waiting.popleft()
        return batch.map_large(lambda tensor: to_device(tensor, self._device)) if self._offload else batch

"""The supervision of one optimiser step: counted as a whole, on the device one micro-batch at a time.

The losses of step k of training-time test are divided by the number of rows that judge it, over all
micro-batches and trainers. Which rows count depends on the target's argmax, so the S numbers are known only
when the last micro-batch has arrived. Gradients cannot be corrected afterwards: one backward mixes all S
steps, and a buffer for each would cost S times the memory. So the first micro-batches wait for the last one,
their large tensors in host memory if `offload` is on.
"""

import contextlib
from collections import deque
from collections.abc import Generator, Iterable, Iterator

import torch

from eagle_rpc.draft import count_rows
from eagle_rpc.supervision import Eagle3TargetBackend, Eagle3TargetBatch, TokenBatch, to_device, to_host


class StepSupervision:
    """One trainer's micro-batches of one optimiser step, in order; the constructor waits for all of them.

    With `offload` on a GPU, the device holds only the first micro-batch, which is used first, and the one
    that is arriving; the large tensors of the others wait in pinned host memory.
    """

    def __init__(self, batches: Iterable[Eagle3TargetBatch], ttt_steps: int, *, offload: bool) -> None:
        self._waiting: deque[Eagle3TargetBatch] = deque()
        self._device = torch.device("cpu")
        self._offload = offload
        counts = []
        for batch in batches:
            counts.append(count_rows(batch, ttt_steps))
            self._device = batch.aux_hidden_states.device
            self._waiting.append(batch.map_large(to_host) if offload and self._waiting else batch)
            # Frees its tensors before the wait for the next one.
            del batch
        self.row_counts = torch.stack(counts).sum(dim=0)  # [S] int64, of this trainer

    def __len__(self) -> int:
        """Micro-batches that have not been taken."""
        return len(self._waiting)

    def take(self) -> Eagle3TargetBatch:
        """Removes and returns the next micro-batch, on the device."""
        batch = self._waiting.popleft()
        return batch.map_large(lambda tensor: to_device(tensor, self._device)) if self._offload else batch


@contextlib.contextmanager
def supervised(
    backend: Eagle3TargetBackend, batches: Iterable[TokenBatch]
) -> Iterator[Iterator[Eagle3TargetBatch]]:
    """Supervision of the batches; requests that are in flight when the body ends are given up."""
    stream = backend.stream(batches)
    try:
        yield stream
    finally:
        if isinstance(stream, Generator):
            stream.close()

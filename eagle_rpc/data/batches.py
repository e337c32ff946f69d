"""Which chats make up which micro-batch.

Everything follows from the arguments and a number, so the position in the data is the number of micro-batches consumed.

Legend: B batch, T sequence.
"""

import random
from collections.abc import Iterator, Sequence

import torch

from eagle_rpc.data.dataset import ChatDataset, Example
from eagle_rpc.errors import ConfigError, DataError
from eagle_rpc.supervision.tokens import TokenBatch

# Chats are sorted by length within windows of this many global micro-batches: wide enough for little padding, narrow
# enough that what is batched together differs from epoch to epoch.
_WINDOW_BATCHES = 32
_PAD_MULTIPLE = 64


class BatchPlan:
    """An endless sequence of micro-batches for one of `num_ranks` trainers, with random access.

    A global micro-batch is `num_ranks * batch_size` chats of similar length, dealt out so that every rank gets `batch_size`
    chats and about as many tokens. An epoch shows each chat once across the ranks; its last global micro-batch is
    filled up with chats from the beginning of the epoch's shuffled order.
    """

    def __init__(
        self,
        dataset: ChatDataset,
        *,
        batch_size: int,
        seed: int = 0,
        rank: int = 0,
        num_ranks: int = 1,
        bucket_lengths: Sequence[int] = (),
    ) -> None:
        """Raises `DataError` on an empty dataset, `ConfigError` on values that cannot work."""
        self._lengths = [len(example.input_ids) for example in dataset]
        if not self._lengths:
            raise DataError("a dataset must hold at least one chat to make batches of, got none")
        if batch_size <= 0:
            raise ConfigError(f"train.batch_size must be positive, got {batch_size}")
        if not 0 <= rank < num_ranks:
            raise ConfigError(f"rank must lie in [0, {num_ranks}), got {rank}")
        if bucket_lengths and max(bucket_lengths) < max(self._lengths):
            raise ConfigError(
                f"data.bucket_lengths must reach the longest chat of {max(self._lengths)} tokens, got {max(bucket_lengths)}"
            )
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._rank = rank
        self._num_ranks = num_ranks
        self._bucket_lengths = sorted(bucket_lengths)
        self._shuffled: tuple[int, list[list[int]]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of each rank until every chat has been seen."""
        return -(-len(self._lengths) // (self._num_ranks * self._batch_size))

    def batch(self, number: int) -> TokenBatch:
        """Micro-batch `number` (from 0, over all epochs) of this rank: cpu, int64 ids, bool masks, padded on the right."""
        return self._pad([self._dataset[index] for index in self.chats(number)])

    def batches(self, start: int = 0) -> Iterator[TokenBatch]:
        """All micro-batches from `start` on, without end."""
        number = start
        while True:
            yield self.batch(number)
            number += 1

    def chats(self, number: int) -> list[int]:
        """Indices in the dataset of the chats in micro-batch `number` of this rank."""
        epoch, place = divmod(number, self.batches_per_epoch)
        shuffled = self._shuffled
        if shuffled is None or shuffled[0] != epoch:
            shuffled = self._shuffled = (epoch, self._shuffle(epoch))
        by_length = sorted(shuffled[1][place], key=lambda index: (-self._lengths[index], index))
        # Dealt to and fro; the rank that begins, and so gets the longest chat, changes with the number.
        seat = (self._rank + number) % self._num_ranks
        dealt = []
        for start in range(0, len(by_length), self._num_ranks):
            hand = by_length[start : start + self._num_ranks]
            forth = start // self._num_ranks % 2 == 0
            dealt.append(hand[seat] if forth else hand[-1 - seat])
        return dealt

    def _shuffle(self, epoch: int) -> list[list[int]]:
        """The global micro-batches of an epoch, in order."""
        size = self._num_ranks * self._batch_size
        # Seeding by text uses a hash, so neighbouring seeds and epochs are unrelated.
        rng = random.Random(f"{self._seed}/{epoch}")
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        total = self.batches_per_epoch * size
        order = [order[place % len(order)] for place in range(total)]
        batches = []
        for start in range(0, total, _WINDOW_BATCHES * size):
            window = sorted(order[start : start + _WINDOW_BATCHES * size], key=lambda index: self._lengths[index])
            batches += [window[first : first + size] for first in range(0, len(window), size)]
        rng.shuffle(batches)
        return batches

    def _pad(self, examples: list[Example]) -> TokenBatch:
        length = self._padded_length(max(len(example.input_ids) for example in examples))
        shape = (len(examples), length)
        input_ids_BT = torch.zeros(shape, dtype=torch.int64)
        attention_mask_BT = torch.zeros(shape, dtype=torch.bool)
        loss_mask_BT = torch.zeros(shape, dtype=torch.bool)
        for row, example in enumerate(examples):
            real = len(example.input_ids)
            input_ids_BT[row, :real] = example.input_ids
            attention_mask_BT[row, :real] = True
            loss_mask_BT[row, :real] = example.loss_mask
        return TokenBatch(input_ids=input_ids_BT, attention_mask=attention_mask_BT, loss_mask=loss_mask_BT)

    def _padded_length(self, longest: int) -> int:
        if self._bucket_lengths:
            return next(length for length in self._bucket_lengths if length >= longest)
        return min(-(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE, self._dataset.max_length)

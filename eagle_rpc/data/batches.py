"""Which chats form which micro-batch.

A sequence is one line of a batch [B, T]: one chat or, packed, several. The epochs form one endless row of
sequences, which depends on data and seed alone. Micro-batches are cut from it one after the other, so each
epoch has each chat once, whatever the number of trainers, and the position in the data is a number of
sequences.

Legend: C chats, S sequences of an epoch.
"""

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from eagle_rpc.data.collate import collate
from eagle_rpc.data.dataset import ChatDataset
from eagle_rpc.data.packing import Ints, PackedLayout
from eagle_rpc.errors import ConfigError, DataError
from eagle_rpc.supervision.tokens import TokenBatch

# Micro-batches of like length that follow each other, so that the trainers of a step have equal work: as many
# as a host has GPUs.
_GROUP_BATCHES = 8
# Groups whose sequences are sorted by length together, at most, and least number of such windows of an epoch:
# little padding and equal work, but other chats together in each epoch.
_WINDOW_GROUPS, _WINDOWS = 32, 4
_PAD_MULTIPLE = 64


@dataclass(frozen=True, slots=True)
class _Epoch:
    """The sequences of an epoch in their order: sequence s has the chats `first[s]` to `first[s + 1]`."""

    number: int
    chats_C: Ints
    first_S1: Ints  # S + 1 of them

    def sequence(self, index: int) -> tuple[int, ...]:
        return tuple(self.chats_C[self.first_S1[index] : self.first_S1[index + 1]].tolist())


class BatchPlan:
    """The micro-batches of one of `num_ranks` trainers, without end and with random access.

    A sequence holds one chat or, with `packed_length`, several whole chats of at most that many tokens
    together. A global micro-batch is `num_ranks` micro-batches of `batch_size` sequences; each rank gets one
    of them, in turns.
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
        packed_length: int | None = None,
        endless: bool = True,
    ) -> None:
        """Without `endless` the data end with the first epoch, whose last micro-batch may be smaller.

        Raises `DataError` on an empty dataset, `ConfigError` on values that cannot work.
        """
        if not len(dataset):
            raise DataError("a dataset must hold at least one chat to form batches, got none")
        if batch_size <= 0:
            raise ConfigError(f"train.batch_size must be positive, got {batch_size}")
        if not 0 <= rank < num_ranks:
            raise ConfigError(f"rank must lie in [0, {num_ranks}), got {rank}")
        self._lengths_C = dataset.lengths
        longest = int(self._lengths_C.max())
        if packed_length is not None and packed_length < longest:
            raise ConfigError(
                f"data.row_length must reach the longest chat of {longest} tokens, got {packed_length}"
            )
        if bucket_lengths and max(bucket_lengths) < (packed_length or longest):
            raise ConfigError(
                f"data.bucket_lengths must reach the longest sequence of {packed_length or longest} tokens, "
                f"got {max(bucket_lengths)}"
            )
        self._dataset = dataset
        self._batch_size = batch_size
        self._seed = seed
        self._endless = endless
        self._rank = rank
        self._num_ranks = num_ranks
        self._buckets = np.array(sorted(bucket_lengths), dtype=np.int64)
        self._longest = packed_length or dataset.max_length
        self._layout = None
        if packed_length is not None:
            self._layout = PackedLayout(self._lengths_C, capacity=packed_length)
        self._kept: _Epoch | None = None

    @property
    def sequences_per_epoch(self) -> int:
        return len(self._dataset) if self._layout is None else len(self._layout.first) - 1

    @property
    def sequences_per_batch(self) -> int:
        """Sequences of a global micro-batch."""
        return self._num_ranks * self._batch_size

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of each rank that hold an epoch; the last one may reach into the next epoch."""
        return -(-self.sequences_per_epoch // self.sequences_per_batch)

    @property
    def padding_share(self) -> float:
        """Share of padding among the tokens of the first epoch."""
        epoch = self._epoch(0)
        lengths_S = np.add.reduceat(self._lengths_C[epoch.chats_C], epoch.first_S1[:-1])
        starts = np.arange(0, len(lengths_S), self._batch_size)
        sizes = np.diff(np.append(starts, len(lengths_S)))
        padded = (self._padded_lengths(np.maximum.reduceat(lengths_S, starts)) * sizes).sum()
        return float(1 - lengths_S.sum() / padded)

    def batch(self, number: int) -> TokenBatch:
        """Micro-batch `number` (from 0, over all epochs) of this rank, padded on the right, on the CPU.

        Packed batches have segment ids, one for each chat of a sequence.
        """
        return self._collated(self.sequences(number))

    def batches(self, position: int = 0) -> Iterator[TokenBatch]:
        """The micro-batches of this rank without end, after the first `position` sequences of the data."""
        while True:
            yield self._collated(self._sequences_from(position))
            position += self.sequences_per_batch

    def sequences(self, number: int) -> list[tuple[int, ...]]:
        """The chats of each sequence of micro-batch `number` of this rank, as indices into the dataset."""
        return self._sequences_from(number * self.sequences_per_batch)

    def _sequences_from(self, position: int) -> list[tuple[int, ...]]:
        """This rank's part of the global micro-batch that begins at `position`."""
        # The rank that gets the longest sequences changes from batch to batch.
        place = (self._rank + position // self.sequences_per_batch) % self._num_ranks
        start = position + place * self._batch_size
        stop = start + self._batch_size
        if not self._endless:
            stop = min(stop, self.sequences_per_epoch)
        return [self._sequence(number) for number in range(start, stop)]

    def _sequence(self, number: int) -> tuple[int, ...]:
        epoch, index = divmod(number, self.sequences_per_epoch)
        if self._kept is None or self._kept.number != epoch:
            self._kept = self._epoch(epoch)
        return self._kept.sequence(index)

    def _collated(self, sequences: list[tuple[int, ...]]) -> TokenBatch:
        examples = [[self._dataset[chat] for chat in chats] for chats in sequences]
        longest = max(sum(len(example.input_ids) for example in row) for row in examples)
        (length,) = self._padded_lengths(np.array([longest]))
        return collate(examples, int(length), packed=self._layout is not None)

    def _epoch(self, number: int) -> _Epoch:
        # Only the raw numbers of a bit generator are the same in all versions of NumPy.
        seed = hashlib.sha256(f"{self._seed}/{number}".encode()).digest()
        random = np.random.PCG64(int.from_bytes(seed, "little"))
        if self._layout is None:
            chats_C = np.argsort(random.random_raw(len(self._lengths_C)), kind="stable")
            first_S1 = np.arange(len(chats_C) + 1)
        else:
            chats_C = self._layout.assign(random.random_raw(len(self._lengths_C)))
            first_S1 = self._layout.first
        sizes_S = np.diff(first_S1)
        lengths_S = np.add.reduceat(self._lengths_C[chats_C], first_S1[:-1])
        order_S = _order(lengths_S, self._batch_size, number * len(lengths_S), random)
        # The chats of the sequences in their new order.
        new_first = np.concatenate([[0], np.cumsum(sizes_S[order_S])])
        within = np.arange(len(chats_C)) - np.repeat(new_first[:-1], sizes_S[order_S])
        places_C = np.repeat(first_S1[:-1][order_S], sizes_S[order_S]) + within
        return _Epoch(number, chats_C[places_C], new_first)

    def _padded_lengths(self, longest: Ints) -> Ints:
        if len(self._buckets):
            padded: Ints = self._buckets[np.searchsorted(self._buckets, longest)]
            return padded
        return np.minimum(-(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE, self._longest)


def _order(lengths_S: Ints, batch_size: int, start: int, random: np.random.PCG64) -> Ints:
    """An order of sequences in which those of one micro-batch have like lengths, and otherwise a random one.

    The epoch has `start` sequences before it: sequences that complete the micro-batch of the epoch before
    come first, so that the others fill whole micro-batches.
    """
    head, group = -start % batch_size, _GROUP_BATCHES * batch_size
    window = group * max(1, min(_WINDOW_GROUPS, len(lengths_S) // (_WINDOWS * group)))
    order_S = np.argsort(random.random_raw(len(lengths_S)), kind="stable")
    # Position in the epoch -> micro-batch, group and window of groups; those before `head` have a window of
    # their own.
    place_S = np.arange(len(lengths_S)) - head
    batch_S, group_S, window_S = (place_S // size for size in (batch_size, group, window))
    order_S = order_S[np.lexsort((lengths_S[order_S], window_S))]
    group_keys, batch_keys = (_shuffled(ids, random) for ids in (group_S, batch_S))
    # A group that is not full stays at the end, or it would shift the micro-batches after it.
    if (len(lengths_S) - head) % group:
        group_keys[group_S == group_S[-1]] = np.iinfo(np.uint64).max
    group_keys[place_S < 0] = 0
    last_batch = (batch_S == batch_S[-1]) & ((len(lengths_S) - head) % batch_size != 0)
    batch_keys[last_batch] = np.iinfo(np.uint64).max
    order: Ints = order_S[np.lexsort((place_S, batch_keys, group_keys))]
    return order


def _shuffled(ids: Ints, random: np.random.PCG64) -> NDArray[np.uint64]:
    """A random key for each id; equal ids have equal keys."""
    _, inverse = np.unique(ids, return_inverse=True)
    keys: NDArray[np.uint64] = random.random_raw(int(inverse.max()) + 1)[inverse]
    return keys

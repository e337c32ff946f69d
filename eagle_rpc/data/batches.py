"""Which chats form which micro-batch.

A micro-batch is a function of the arguments and its number, so the position in the data is the number of
micro-batches that were consumed. A sequence is one line of a batch [B, T]: one chat or, packed, several.
"""

import random
from collections.abc import Iterator, Sequence

from eagle_rpc.data.collate import collate
from eagle_rpc.data.dataset import ChatDataset
from eagle_rpc.data.packing import ChatIds, PackedLayout
from eagle_rpc.errors import ConfigError, DataError
from eagle_rpc.supervision.tokens import TokenBatch

# Sequences are sorted by length within windows of this many global micro-batches: wide enough for little
# padding, narrow enough that epochs batch different chats together.
_WINDOW_BATCHES = 32
_PAD_MULTIPLE = 64


class BatchPlan:
    """The micro-batches of one of `num_ranks` trainers, without end and with random access.

    A sequence holds one chat or, with `packed_length`, several whole chats of at most that many tokens
    together. A global micro-batch is `num_ranks * batch_size` sequences of similar length; each rank gets
    `batch_size` of them and about as many tokens as the others. An epoch has each chat once across the ranks.
    If the sequences do not fill the last global micro-batch, packed ones are split, and then sequences from
    the beginning of the epoch's order are repeated.
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
    ) -> None:
        """Raises `DataError` on an empty dataset, `ConfigError` on values that cannot work."""
        self._lengths = [len(example.input_ids) for example in dataset]
        if not self._lengths:
            raise DataError("a dataset must hold at least one chat to form batches, got none")
        if batch_size <= 0:
            raise ConfigError(f"train.batch_size must be positive, got {batch_size}")
        if not 0 <= rank < num_ranks:
            raise ConfigError(f"rank must lie in [0, {num_ranks}), got {rank}")
        longest = max(self._lengths)
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
        self._rank = rank
        self._num_ranks = num_ranks
        self._global_size = num_ranks * batch_size
        self._seed = seed
        self._bucket_lengths = sorted(bucket_lengths)
        self._longest = packed_length or dataset.max_length
        self._layout = None
        if packed_length is not None:
            self._layout = PackedLayout(self._lengths, capacity=packed_length, multiple=self._global_size)
        self._epoch_batches: tuple[int, list[list[ChatIds]]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of each rank in an epoch."""
        sequences = len(self._lengths) if self._layout is None else len(self._layout)
        return -(-sequences // self._global_size)

    @property
    def padding_share(self) -> float:
        """Share of padding among the tokens of all ranks in the first epoch."""
        real = padded = 0
        for batch in self._epoch(0):
            for rank in range(self._num_ranks):
                lengths = [self._length(chats) for chats in self._deal(batch, rank)]
                real += sum(lengths)
                padded += len(lengths) * self._padded_length(max(lengths))
        return 1 - real / padded

    def batch(self, number: int) -> TokenBatch:
        """Micro-batch `number` (from 0, over all epochs) of this rank, padded on the right, on the CPU.

        Packed batches have segment ids, one for each chat of a sequence.
        """
        sequences = self.sequences(number)
        length = self._padded_length(max(map(self._length, sequences)))
        examples = [[self._dataset[chat] for chat in chats] for chats in sequences]
        return collate(examples, length, packed=self._layout is not None)

    def batches(self, start: int = 0) -> Iterator[TokenBatch]:
        """The micro-batches from `start` on, without end."""
        number = start
        while True:
            yield self.batch(number)
            number += 1

    def sequences(self, number: int) -> list[ChatIds]:
        """The chats of each sequence of micro-batch `number` of this rank."""
        epoch, index = divmod(number, self.batches_per_epoch)
        kept = self._epoch_batches
        if kept is None or kept[0] != epoch:
            kept = self._epoch_batches = (epoch, self._epoch(epoch))
        return self._deal(kept[1][index], self._rank + number)

    def _deal(self, batch: list[ChatIds], turn: int) -> list[ChatIds]:
        """One rank's sequences of a global micro-batch; `turn` is the rank plus the micro-batch's number.

        Ranks take turns, longest sequence first, and the order of ranks alternates between forward and
        backward. The rank that gets the longest sequence changes with the number.
        """
        by_length = sorted(batch, key=lambda chats: (-self._length(chats), chats))
        place = turn % self._num_ranks
        dealt = []
        for start in range(0, len(by_length), self._num_ranks):
            one_each = by_length[start : start + self._num_ranks]
            forward = start // self._num_ranks % 2 == 0
            dealt.append(one_each[place] if forward else one_each[-1 - place])
        return dealt

    def _epoch(self, number: int) -> list[list[ChatIds]]:
        """The global micro-batches of an epoch, in order."""
        size = self._global_size
        # Seeding by text uses a hash, so neighbouring seeds and epochs are unrelated.
        rng = random.Random(f"{self._seed}/{number}")
        sequences = self._single_chats(rng) if self._layout is None else self._layout.assign(rng)
        total = self.batches_per_epoch * size
        sequences = [sequences[index % len(sequences)] for index in range(total)]
        batches = []
        for start in range(0, total, _WINDOW_BATCHES * size):
            window = sorted(sequences[start : start + _WINDOW_BATCHES * size], key=self._length)
            batches += [window[first : first + size] for first in range(0, len(window), size)]
        rng.shuffle(batches)
        return batches

    def _single_chats(self, rng: random.Random) -> list[ChatIds]:
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        return [(chat,) for chat in order]

    def _length(self, chats: ChatIds) -> int:
        return sum(self._lengths[chat] for chat in chats)

    def _padded_length(self, longest: int) -> int:
        if self._bucket_lengths:
            return next(length for length in self._bucket_lengths if length >= longest)
        return min(-(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE, self._longest)

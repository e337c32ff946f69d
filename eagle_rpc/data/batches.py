"""Which chats make up which micro-batch.

Everything follows from the arguments and a number, so the position in the data is the number of micro-batches consumed.
"""

import random
from collections.abc import Iterator, Sequence

from eagle_rpc.data.collate import collate
from eagle_rpc.data.dataset import ChatDataset
from eagle_rpc.data.packing import Row, RowLayout
from eagle_rpc.errors import ConfigError, DataError
from eagle_rpc.supervision.tokens import TokenBatch

# Rows are sorted by length within windows of this many global micro-batches: wide enough for little padding, narrow
# enough that what is batched together differs from epoch to epoch.
_WINDOW_BATCHES = 32
_PAD_MULTIPLE = 64


class BatchPlan:
    """An endless sequence of micro-batches for one of `num_ranks` trainers, with random access.

    A row holds one chat or, with `packed_length`, as many whole chats as best fit into that many tokens. A global
    micro-batch is `num_ranks * batch_size` rows of similar length, dealt out so that every rank gets `batch_size` rows and
    about as many tokens. An epoch shows each chat once across the ranks. Where rows are short of whole global micro-batches,
    packed rows are split; what is still missing is filled up with rows from the beginning of the epoch's shuffled order.
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
            raise DataError("a dataset must hold at least one chat to make batches of, got none")
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
                f"data.bucket_lengths must reach the longest row of {packed_length or longest} tokens, got {max(bucket_lengths)}"
            )
        self._dataset = dataset
        self._rank = rank
        self._num_ranks = num_ranks
        self._global_rows = num_ranks * batch_size
        self._seed = seed
        self._bucket_lengths = sorted(bucket_lengths)
        self._longest_row = packed_length or dataset.max_length
        self._layout = None
        if packed_length is not None:
            self._layout = RowLayout(self._lengths, capacity=packed_length, multiple=self._global_rows)
        self._shuffled: tuple[int, list[list[Row]]] | None = None

    @property
    def batches_per_epoch(self) -> int:
        """Micro-batches of each rank until every chat has been seen."""
        rows = len(self._lengths) if self._layout is None else len(self._layout)
        return -(-rows // self._global_rows)

    @property
    def padding_share(self) -> float:
        """Share of padding in the tokens that all ranks compute in the first epoch."""
        real = padded = 0
        for batch in self._epoch(0):
            for rank in range(self._num_ranks):
                lengths = [self._length(row) for row in self._deal(batch, rank)]
                real += sum(lengths)
                padded += len(lengths) * self._padded_length(max(lengths))
        return 1 - real / padded

    def batch(self, number: int) -> TokenBatch:
        """Micro-batch `number` (from 0, over all epochs) of this rank: cpu, int64 ids, bool masks, padded on the right.

        Segment ids tell packed chats apart; batches of one chat a row have none.
        """
        rows = self.rows(number)
        length = self._padded_length(max(map(self._length, rows)))
        examples = [[self._dataset[chat] for chat in row] for row in rows]
        return collate(examples, length, packed=self._layout is not None)

    def batches(self, start: int = 0) -> Iterator[TokenBatch]:
        """All micro-batches from `start` on, without end."""
        number = start
        while True:
            yield self.batch(number)
            number += 1

    def rows(self, number: int) -> list[Row]:
        """The chats of micro-batch `number` of this rank, row by row."""
        epoch, place = divmod(number, self.batches_per_epoch)
        shuffled = self._shuffled
        if shuffled is None or shuffled[0] != epoch:
            shuffled = self._shuffled = (epoch, self._epoch(epoch))
        return self._deal(shuffled[1][place], self._rank + number)

    def _deal(self, batch: list[Row], turn: int) -> list[Row]:
        """One rank's rows of a global micro-batch; `turn` is the rank, moved on by the micro-batch's number."""
        by_length = sorted(batch, key=lambda row: (-self._length(row), row))
        # Dealt to and fro; the rank that begins, and so gets the longest row, changes with the number.
        seat = turn % self._num_ranks
        dealt = []
        for start in range(0, len(by_length), self._num_ranks):
            hand = by_length[start : start + self._num_ranks]
            forth = start // self._num_ranks % 2 == 0
            dealt.append(hand[seat] if forth else hand[-1 - seat])
        return dealt

    def _epoch(self, number: int) -> list[list[Row]]:
        """The global micro-batches of an epoch, in order."""
        size = self._global_rows
        # Seeding by text uses a hash, so neighbouring seeds and epochs are unrelated.
        rng = random.Random(f"{self._seed}/{number}")
        rows = self._single_rows(rng) if self._layout is None else self._layout.seat(rng)
        total = self.batches_per_epoch * size
        rows = [rows[place % len(rows)] for place in range(total)]
        batches = []
        for start in range(0, total, _WINDOW_BATCHES * size):
            window = sorted(rows[start : start + _WINDOW_BATCHES * size], key=self._length)
            batches += [window[first : first + size] for first in range(0, len(window), size)]
        rng.shuffle(batches)
        return batches

    def _single_rows(self, rng: random.Random) -> list[Row]:
        order = list(range(len(self._lengths)))
        rng.shuffle(order)
        return [(chat,) for chat in order]

    def _length(self, row: Row) -> int:
        return sum(self._lengths[chat] for chat in row)

    def _padded_length(self, longest: int) -> int:
        if self._bucket_lengths:
            return next(length for length in self._bucket_lengths if length >= longest)
        return min(-(-longest // _PAD_MULTIPLE) * _PAD_MULTIPLE, self._longest_row)

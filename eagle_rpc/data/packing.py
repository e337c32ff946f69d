"""Which chats share a row: best fit, longest first, never cut."""

import random
from collections import defaultdict
from collections.abc import Sequence

Row = tuple[int, ...]  # chats by number in the dataset, from left to right


class RowLayout:
    """Rows of at most `capacity` tokens for chats of the given lengths, a multiple of `multiple` of them if the chats suffice.

    Whatever order equally long chats come in, the lengths in each row are the same: so every epoch has as many rows, and only
    who sits in them changes. Every chat has one seat.
    """

    def __init__(self, lengths: Sequence[int], *, capacity: int, multiple: int = 1) -> None:
        """No length may exceed `capacity`."""
        self._lengths = lengths
        self._rows = _best_fit(sorted(lengths, reverse=True), capacity)
        _split_rows(self._rows, multiple)

    def __len__(self) -> int:
        return len(self._rows)

    def seat(self, rng: random.Random) -> list[Row]:
        """The rows of one epoch in random order: each chat takes a seat of its length."""
        waiting = defaultdict(list)
        for chat in rng.sample(range(len(self._lengths)), len(self._lengths)):
            waiting[self._lengths[chat]].append(chat)
        rows = [tuple(waiting[length].pop() for length in row) for row in self._rows]
        rng.shuffle(rows)
        return rows


def _best_fit(falling_lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Each length goes to the row that it leaves the least room in, or begins one."""
    rows: list[list[int]] = []
    by_room = defaultdict(list)
    # Bit r is set while some row has room for exactly r tokens more: the least that suffices is one shift away.
    rooms = 0
    for length in falling_lengths:
        roomier = rooms >> length
        if roomier:
            room = length + (roomier & -roomier).bit_length() - 1
            row = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, row = capacity, []
            rows.append(row)
        row.append(length)
        by_room[room - length].append(row)
        rooms |= 1 << (room - length)
    return rows


def _split_rows(rows: list[list[int]], multiple: int) -> None:
    """Halves rows until their number divides evenly: the batches that are computed anyway then repeat no chat."""
    while len(rows) % multiple:
        fullest = max(rows, key=len)
        if len(fullest) == 1:
            return
        rows.append(fullest[1::2])
        del fullest[1::2]

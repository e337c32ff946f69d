"""Packing: which chats share a sequence. Best fit, longest chat first; no chat is cut.

A sequence here is one line of a batch [B, T]: one chat or, packed, several.
"""

import random
from collections import defaultdict
from collections.abc import Sequence

ChatIds = tuple[int, ...]  # the chats of one sequence from left to right, as indices into the dataset


class PackedLayout:
    """Sequences of at most `capacity` tokens for chats of the given lengths.

    The layout fixes only the lengths in each sequence, so all epochs have the same number of sequences.
    `assign` puts the chats in their places. If there are enough chats, the number of sequences is a multiple
    of `multiple`.
    """

    def __init__(self, lengths: Sequence[int], *, capacity: int, multiple: int = 1) -> None:
        """No length may exceed `capacity`."""
        self._lengths = lengths
        self._sequences = _best_fit(sorted(lengths, reverse=True), capacity)
        _split_sequences(self._sequences, multiple)

    def __len__(self) -> int:
        return len(self._sequences)

    def assign(self, rng: random.Random) -> list[ChatIds]:
        """The sequences of one epoch in random order; each chat takes a random place of its length."""
        waiting = defaultdict(list)
        for chat in rng.sample(range(len(self._lengths)), len(self._lengths)):
            waiting[self._lengths[chat]].append(chat)
        sequences = [tuple(waiting[length].pop() for length in lengths) for lengths in self._sequences]
        rng.shuffle(sequences)
        return sequences


def _best_fit(falling_lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Adds each length to the sequence where it leaves the least room, or starts a new one."""
    sequences: list[list[int]] = []
    by_room: defaultdict[int, list[list[int]]] = defaultdict(list)
    # Bit r is set while some sequence has room for exactly r more tokens: one shift finds the least room that
    # suffices.
    rooms = 0
    for length in falling_lengths:
        sufficient = rooms >> length
        if sufficient:
            room = length + (sufficient & -sufficient).bit_length() - 1
            lengths = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, lengths = capacity, []
            sequences.append(lengths)
        lengths.append(length)
        by_room[room - length].append(lengths)
        rooms |= 1 << (room - length)
    return sequences


def _split_sequences(sequences: list[list[int]], multiple: int) -> None:
    """Halves sequences until their number is a multiple: the last batch then need not repeat chats."""
    while len(sequences) % multiple:
        fullest = max(sequences, key=len)
        if len(fullest) == 1:
            return
        sequences.append(fullest[1::2])
        del fullest[1::2]

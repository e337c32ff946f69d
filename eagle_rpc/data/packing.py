"""Packing: which chats share a sequence. Best fit, longest chat first; no chat is cut.

A sequence here is one line of a batch [B, T]: one chat or, packed, several.
"""

from array import array
from collections import defaultdict

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


class PackedLayout:
    """Sequences of at most `capacity` tokens for chats of the given lengths, as arrays.

    The layout fixes only the lengths in each sequence, so all epochs have the same number of sequences;
    `assign` puts the chats in their places. Sequence s has the places `first[s]` to `first[s + 1]`.
    """

    def __init__(self, lengths: Ints, *, capacity: int) -> None:
        """No length may exceed `capacity`."""
        self._lengths = lengths
        sequences = _best_fit(np.sort(lengths)[::-1], capacity)
        self._places = np.argsort(sequences, kind="stable")
        self.first = np.concatenate([[0], np.cumsum(np.bincount(sequences))])

    def assign(self, keys: NDArray[np.uint64]) -> Ints:
        """The chat of each place; of the chats of one length, random `keys` decide who gets which place."""
        by_length: Ints = np.lexsort((keys, -self._lengths))
        return by_length[self._places]


def _best_fit(falling_lengths: Ints, capacity: int) -> Ints:
    """The sequence of each length: where it leaves the least room, or a new one."""
    chosen, num_sequences = array("q"), 0
    by_room: defaultdict[int, list[int]] = defaultdict(list)
    # Bit r is set while some sequence has room for exactly r more tokens: one shift finds the least room that
    # suffices.
    rooms = 0
    for length in falling_lengths.tolist():
        sufficient = rooms >> length
        if sufficient:
            room = length + (sufficient & -sufficient).bit_length() - 1
            sequence = by_room[room].pop()
            if not by_room[room]:
                rooms ^= 1 << room
        else:
            room, sequence = capacity, num_sequences
            num_sequences += 1
        chosen.append(sequence)
        by_room[room - length].append(sequence)
        rooms |= 1 << (room - length)
    return np.frombuffer(chosen, dtype=np.int64)

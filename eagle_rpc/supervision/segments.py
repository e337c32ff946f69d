"""Packed rows: where the chats of a row begin, how long they are, and the positions of their tokens.

Legend: B batch, T sequence, C chats of a batch.
"""

from dataclasses import dataclass

import torch
from torch import Tensor


def chat_starts(ids_BT: Tensor) -> Tensor:
    """[B, T] bool, whether a chat begins: at the start of a row and wherever the id changes."""
    starts_BT = torch.ones_like(ids_BT, dtype=torch.bool)
    starts_BT[:, 1:] = ids_BT[:, 1:] != ids_BT[:, :-1]
    return starts_BT


def positions_from(starts_BT: Tensor) -> Tensor:
    """Positions [B, T] int64 that count from 0 at every start."""
    index_1T = torch.arange(starts_BT.shape[1], device=starts_BT.device)[None]
    return index_1T - (index_1T * starts_BT).cummax(dim=1).values


@dataclass(frozen=True, slots=True)
class ChatBoundaries:
    """The chats of all rows, one after the other, as flash attention takes them."""

    places: Tensor  # [C + 1] int32, of `chat_boundaries`
    longest: int  # upper bound of a chat's tokens

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """The arguments of flash attention: boundaries and longest of queries and of keys."""
        return self.places, self.places, self.longest, self.longest


def chat_boundaries(starts_BT: Tensor) -> Tensor:
    """[C + 1] int32: flat places b * T + t of chats' starts, and B * T. Waits for a GPU: C is a shape."""
    end = torch.ones(1, dtype=torch.bool, device=starts_BT.device)
    return torch.cat((starts_BT.flatten(), end)).nonzero().squeeze(1).int()

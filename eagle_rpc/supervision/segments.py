"""Packed rows: where the chats of a row begin, how long they are, and the positions of their tokens.

Legend: B batch, T sequence, C chats of a batch.
"""

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


def chat_boundaries(segment_ids_BT: Tensor) -> Tensor:
    """[C + 1] int64: flat places b * T + t where a chat begins, and B * T. Waits for a GPU: C is a shape."""
    end = torch.ones(1, dtype=torch.bool, device=segment_ids_BT.device)
    return torch.cat((chat_starts(segment_ids_BT).flatten(), end)).nonzero().squeeze(1)


def chat_lengths(segment_ids_BT: Tensor) -> list[list[int]]:
    """Positions of every chat of every row. Padding with an id of its own counts as a chat."""
    return [row.unique_consecutive(return_counts=True)[1].tolist() for row in segment_ids_BT]

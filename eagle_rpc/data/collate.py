"""Rows of chats as padded tensors.

Legend: B batch, T sequence.
"""

from collections.abc import Sequence

import torch

from eagle_rpc.data.dataset import Example
from eagle_rpc.supervision.tokens import TokenBatch


def collate(rows: Sequence[Sequence[Example]], length: int, *, packed: bool) -> TokenBatch:
    """[B, `length`] tokens: the chats of each row one after the other, then padding.

    With `packed` segment ids number the chats of each row from 0, and its padding as one more.
    """
    shape = (len(rows), length)
    input_ids_BT = torch.zeros(shape, dtype=torch.int64)
    attention_mask_BT = torch.zeros(shape, dtype=torch.bool)
    loss_mask_BT = torch.zeros(shape, dtype=torch.bool)
    segment_ids_BT = torch.zeros(shape, dtype=torch.int64)
    for b, row in enumerate(rows):
        start = 0
        for segment, example in enumerate(row):
            chat = slice(start, start + len(example.input_ids))
            input_ids_BT[b, chat] = example.input_ids
            attention_mask_BT[b, chat] = True
            loss_mask_BT[b, chat] = example.loss_mask
            segment_ids_BT[b, chat] = segment
            start = chat.stop
        segment_ids_BT[b, start:] = len(row)
    return TokenBatch(
        input_ids=input_ids_BT,
        attention_mask=attention_mask_BT,
        loss_mask=loss_mask_BT,
        segment_ids=segment_ids_BT if packed else None,
    )

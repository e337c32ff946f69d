"""Sequences of chats as padded tensors.

Legend: B batch, T sequence.
"""

from collections.abc import Sequence

import torch

from eagle_rpc.data.dataset import Example
from eagle_rpc.supervision.tokens import TokenBatch


def collate(sequences: Sequence[Sequence[Example]], length: int, *, packed: bool) -> TokenBatch:
    """A batch [B, `length`]: the chats of each sequence one after the other, then padding.

    With `packed` the segment ids number the chats of a sequence from 0, and its padding as one more.
    """
    shape = (len(sequences), length)
    input_ids_BT = torch.zeros(shape, dtype=torch.int64)
    attention_mask_BT = torch.zeros(shape, dtype=torch.bool)
    loss_mask_BT = torch.zeros(shape, dtype=torch.bool)
    segment_ids_BT = torch.zeros(shape, dtype=torch.int64)
    for b, examples in enumerate(sequences):
        start = 0
        for segment, example in enumerate(examples):
            chat = slice(start, start + len(example.input_ids))
            input_ids_BT[b, chat] = example.input_ids
            attention_mask_BT[b, chat] = True
            loss_mask_BT[b, chat] = example.loss_mask
            segment_ids_BT[b, chat] = segment
            start = chat.stop
        segment_ids_BT[b, start:] = len(examples)
    return TokenBatch(
        input_ids=input_ids_BT,
        attention_mask=attention_mask_BT,
        loss_mask=loss_mask_BT,
        segment_ids=segment_ids_BT if packed else None,
    )

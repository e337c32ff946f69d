"""Attention of packed rows chat by chat, where transformers' own way costs a [B, 1, T, T] mask and scores between chats.

Legend: B batch, T sequence, L tokens of one chat, Q query heads, D head width.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eagle_rpc.errors import UnsupportedTarget

_NAME = "eagle_rpc_by_chat"


@dataclass(frozen=True, slots=True)
class _Chat:
    """Where a chat sits, and what its tokens see of it."""

    row: int
    place: slice
    visible: Tensor | None = None  # [1, 1, L, L] bool; null: all that came before


_chats: ContextVar[list[_Chat]] = ContextVar("_chats")


@contextlib.contextmanager
def attention_by_chat(base: nn.Module, positions_BT: Tensor | None) -> Iterator[None]:
    """In the body an sdpa model on the CPU attends within chats only, which begin where positions are 0.

    The exact layer masks (causal, sliding, chunked) are those of transformers. Other models keep their way: eager and flex
    attention build masks of their own, and on a GPU a loop over chats would be slow. Without positions nothing is packed.
    """
    if positions_BT is None or positions_BT.is_cuda or base.config._attn_implementation != "sdpa":
        yield
        return
    token = _chats.set(_chats_of(positions_BT))
    base.config._attn_implementation = _NAME
    try:
        yield
    finally:
        base.config._attn_implementation = "sdpa"
        _chats.reset(token)


def _chats_of(positions_BT: Tensor) -> list[_Chat]:
    length = positions_BT.shape[1]
    chats = []
    for row, begins_T in enumerate(positions_BT == 0):
        bounds = [*begins_T.nonzero().flatten().tolist(), length]
        chats += [_Chat(row, slice(*pair)) for pair in itertools.pairwise(bounds)]
    return chats


def _mask_by_chat(*, mask_function: Callable[..., Tensor], use_vmap: bool = False, **_: Any) -> list[_Chat]:
    """Stands in for the mask that transformers would build from `mask_function`: its blocks on the diagonal."""
    if use_vmap:
        raise UnsupportedTarget("packed chats need masks that are made of indices alone; use target.attention=eager")
    return [_Chat(chat.row, chat.place, _block(mask_function, chat)) for chat in _chats.get()]


def _block(mask_function: Callable[..., Tensor], chat: _Chat) -> Tensor | None:
    index_L = torch.arange(chat.place.start, chat.place.stop)
    row, head = torch.tensor(chat.row), torch.tensor(0)
    visible_LL = mask_function(row, head, index_L[:, None], index_L[None, :])
    causal_LL = torch.ones(len(index_L), len(index_L), dtype=torch.bool).tril()
    return None if torch.equal(visible_LL, causal_LL) else visible_LL[None, None]


def _attend_by_chat(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: list[_Chat], **settings: Any
) -> tuple[Tensor, None]:
    """As transformers' attention functions: heads [B, Q, T, D] in, [B, T, Q, D] out."""
    out_BTQD = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for chat in attention_mask:
        heads = (tensor[chat.row, None, :, chat.place] for tensor in (query, key, value))
        out_BTQD[chat.row, chat.place] = sdpa_attention_forward(module, *heads, chat.visible, **settings)[0][0]
    return out_BTQD, None


AttentionInterface.register(_NAME, _attend_by_chat)
AttentionMaskInterface.register(_NAME, _mask_by_chat)

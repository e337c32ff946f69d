"""Attention of packed rows chat by chat, where transformers' own way costs a [B, 1, T, T] mask and scores between chats.

Legend: B batch, T sequence, N tokens of a batch, L tokens of one chat, Q query heads, D head width.
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
from eagle_rpc.supervision import to_device
from eagle_rpc.target.capture import run_base

# Each loops over the chats, or is one kernel for all of them.
_LOOP, _VARLEN = "eagle_rpc_by_chat", "eagle_rpc_varlen"
_FLASH_DTYPES = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, slots=True)
class _Chat:
    """Where a chat sits, and what its tokens see of it."""

    row: int
    place: slice
    visible: Tensor | None = None  # [1, 1, L, L] bool; null: all that came before


@dataclass(frozen=True, slots=True)
class _Boundaries:
    """The chats of all rows, one after the other."""

    starts: Tensor  # [number of chats + 1] int32, on the GPU: where each begins, and N
    longest: int


_chats: ContextVar[list[_Chat]] = ContextVar("_chats")
_boundaries: ContextVar[_Boundaries] = ContextVar("_boundaries")


def run_chats(base: nn.Module, input_ids: Tensor, positions_BT: Tensor | None, *, compiled: bool) -> Tensor:
    """`run_base` on [B, T] ids; `positions_BT`, on the CPU, restart where a chat begins, which tells chats apart.

    An sdpa model attends within chats only: on the CPU unless `compiled`, on a GPU where flash attention takes the model.
    Others keep their way: eager and flex attention build masks of their own.
    """
    if positions_BT is None or are_plain(positions_BT):
        return run_base(base, input_ids)
    positions_on_device = to_device(positions_BT, input_ids.device)
    if base.config._attn_implementation != "sdpa":
        return run_base(base, input_ids, positions_on_device)
    if input_ids.is_cuda and _flash_takes(base):
        with _attending(base, _VARLEN, _boundaries, _boundaries_of(positions_BT, input_ids.device)):
            # A mask of four dimensions is handed to the layers as it is, and nobody reads this one.
            return run_base(base, input_ids, positions_on_device, mask=input_ids.new_zeros(1, 1, 1, 1))
    if not input_ids.is_cuda and not compiled:
        with _attending(base, _LOOP, _chats, _chats_of(positions_BT)):
            return run_base(base, input_ids, positions_on_device)
    return run_base(base, input_ids, positions_on_device)


def are_plain(positions_BT: Tensor) -> bool:
    """Whether every row is one chat; to transformers those are no packed ones either."""
    return bool((positions_BT == torch.arange(positions_BT.shape[1], device=positions_BT.device)).all())


@contextlib.contextmanager
def _attending(base: nn.Module, name: str, variable: ContextVar, chats: Any) -> Iterator[None]:
    token = variable.set(chats)
    base.config._attn_implementation = name
    try:
        yield
    finally:
        base.config._attn_implementation = "sdpa"
        variable.reset(token)


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


def _attend_in_loop(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: list[_Chat], **settings: Any
) -> tuple[Tensor, None]:
    """As transformers' attention functions: heads [B, Q, T, D] in, [B, T, Q, D] out."""
    out_BTQD = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for chat in attention_mask:
        heads = (tensor[chat.row, None, :, chat.place] for tensor in (query, key, value))
        out_BTQD[chat.row, chat.place] = sdpa_attention_forward(module, *heads, chat.visible, **settings)[0][0]
    return out_BTQD, None


def _flash_takes(base: nn.Module) -> bool:
    """Chunked attention is not in flash attention, nor are keys that are wider than values."""
    config = base.config.get_text_config()
    others = ("attention_chunk_size", "kv_lora_rank")
    return base.dtype in _FLASH_DTYPES and all(getattr(config, name, None) is None for name in others)


def _boundaries_of(positions_BT: Tensor, device: torch.device) -> _Boundaries:
    begins_N = torch.cat(((positions_BT == 0).flatten(), torch.ones(1, dtype=torch.bool)))
    starts = begins_N.nonzero().squeeze(1)
    return _Boundaries(to_device(starts.int(), device), int(starts.diff().max()))


@torch.library.custom_op("eagle_rpc::attend_within_chats", mutates_args=())
def _attend_within_chats(query_NQD: Tensor, key_NJD: Tensor, value_NJD: Tensor, scale: float, window: int) -> Tensor:
    """[N, Q, D]; `window`: tokens that a token sees, itself included, 0 for all before it.

    Where chats begin is no argument: a layer would be compiled again for each number of them.
    """
    chats = _boundaries.get()
    places = (chats.starts, chats.starts, chats.longest, chats.longest)
    windows = {"window_size_left": window - 1, "window_size_right": 0} if window else {}
    heads = (query_NQD, key_NJD, value_NJD)
    return torch.ops.aten._flash_attention_forward(*heads, *places, 0.0, True, False, scale=scale, **windows)[0]


@_attend_within_chats.register_fake
def _(query_NQD: Tensor, key_NJD: Tensor, value_NJD: Tensor, scale: float, window: int) -> Tensor:
    return torch.empty_like(query_NQD)


def _attend_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: heads [B, Q, T, D] in, [B, T, Q, D] out."""
    if not (softcap is position_bias is s_aux is None):
        raise UnsupportedTarget(
            f"{type(module).__name__} needs more than flash attention for packed chats; use target.attention=eager"
        )
    batch, heads, length, width = query.shape
    rows = (tensor.transpose(1, 2).reshape(batch * length, tensor.shape[1], width) for tensor in (query, key, value))
    out_NQD = _attend_within_chats(*rows, width**-0.5 if scaling is None else scaling, sliding_window or 0)
    return out_NQD.view(batch, length, heads, width), None


AttentionInterface.register(_LOOP, _attend_in_loop)
AttentionMaskInterface.register(_LOOP, _mask_by_chat)
AttentionInterface.register(_VARLEN, _attend_varlen)

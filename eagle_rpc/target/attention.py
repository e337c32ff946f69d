"""Attention within chats, where transformers' own way costs a [B, 1, T, T] mask, scores between chats, and a look at the GPU.

Legend: B batch, T sequence, N tokens of a batch, L tokens of one chat, Q query heads, J key heads, D head width.
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

from eagle_rpc.supervision import to_device
from eagle_rpc.supervision.segments import chat_starts, positions_from
from eagle_rpc.target.capture import run_base
from eagle_rpc.target.probes import packing_fault

# Names under which transformers finds them: one chat a row and no mask; a loop over chats; one kernel for all chats.
_WHOLE, _LOOP, _VARLEN = "eagle_rpc_whole", "eagle_rpc_by_chat", "eagle_rpc_varlen"
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
# Ends of the names of config fields that bound what a layer sees, as `sliding_window`; some models have them in their masks only.
_NARROW = ("window", "window_size", "chunk_size")
# What a model's own code may raise when it meets a name or a kernel that it does not know.
_FAILURES = (
    AssertionError,
    AttributeError,
    LookupError,
    NotImplementedError,
    RuntimeError,
    TypeError,
    ValueError,
)


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


class ChatAttention:
    """How one model attends to rows of one chat and of several.

    An sdpa model is spared transformers' masks, which for packed rows are large and make the CPU wait for the GPU, where a probe shows
    that it gives the same without: on a GPU if its layers see all that came before. Others keep their way: eager and flex attention
    build masks of their own.
    """

    def __init__(self, base: nn.Module, probe_ids: Tensor) -> None:
        """`probe_ids`: [1, T] on the base's device."""
        self._base = base
        if base.config._attn_implementation != "sdpa":
            self._spares_mask = self._flash = self._loops = False
            return
        sees_all, on_gpu, rows = _sees_all(base), probe_ids.is_cuda, probe_ids.view(2, -1)
        self._spares_mask = sees_all and self._gives_the_same(probe_ids)
        self._flash = (
            sees_all and on_gpu and base.dtype in _FLASH_DTYPES and self._keeps_apart(rows, self._run_varlen)
        )
        self._loops = not on_gpu and self._keeps_apart(rows, self._run_in_loop)

    def run(self, input_ids: Tensor, positions_BT: Tensor | None, *, compiled: bool) -> Tensor:
        """`run_base` on [B, T] ids; `positions_BT`, on the CPU, restart where a chat begins. `compiled`: without loops over data."""
        if positions_BT is None or are_plain(positions_BT):
            return self._run_whole(input_ids) if self._spares_mask else run_base(self._base, input_ids)
        if self._flash:
            return self._run_varlen(input_ids, positions_BT)
        if self._loops and not compiled:
            return self._run_in_loop(input_ids, positions_BT)
        return run_base(self._base, input_ids, to_device(positions_BT, input_ids.device))

    def _run_whole(self, input_ids: Tensor) -> Tensor:
        with self._attending(_WHOLE, _chats, []):
            return run_base(self._base, input_ids)

    def _run_varlen(self, input_ids: Tensor, positions_BT: Tensor) -> Tensor:
        with self._attending(_VARLEN, _boundaries, _boundaries_of(positions_BT, input_ids.device)):
            return run_base(self._base, input_ids, to_device(positions_BT, input_ids.device))

    def _run_in_loop(self, input_ids: Tensor, positions_BT: Tensor) -> Tensor:
        with self._attending(_LOOP, _chats, _chats_of(positions_BT)):
            return run_base(self._base, input_ids, positions_BT)

    @contextlib.contextmanager
    def _attending(self, name: str, variable: ContextVar, chats: Any) -> Iterator[None]:
        token = variable.set(chats)
        self._base.config._attn_implementation = name
        try:
            yield
        finally:
            self._base.config._attn_implementation = "sdpa"
            variable.reset(token)

    def _gives_the_same(self, ids_BT: Tensor) -> bool:
        with contextlib.suppress(*_FAILURES):
            return torch.equal(self._run_whole(ids_BT), run_base(self._base, ids_BT))
        return False

    def _keeps_apart(self, ids_BT: Tensor, run_packed: Callable[[Tensor, Tensor], Tensor]) -> bool:
        """Whether the model takes this way to attend to packed rows."""

        def run(ids_BT: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
            if segment_ids_BT is None:
                return run_base(self._base, ids_BT)
            return run_packed(
                ids_BT, positions_within_chats(torch.ones_like(ids_BT).bool(), segment_ids_BT).cpu()
            )

        with contextlib.suppress(*_FAILURES):
            return packing_fault(run, ids_BT) is None
        return False


def _sees_all(base: nn.Module) -> bool:
    """Whether every layer attends to all that came before, as far as the config tells."""
    config = base.config.get_text_config()
    narrow = any(value and name.endswith(_NARROW) for name, value in config.to_dict().items())
    return not narrow and all(kind == "full_attention" for kind in getattr(config, "layer_types", None) or ())


def positions_within_chats(real_BT: Tensor, segment_ids_BT: Tensor) -> Tensor:
    """Positions [B, T] that restart at each segment, and at the padding after the last one."""
    return positions_from(chat_starts(segment_ids_BT) | chat_starts(real_BT))


def are_plain(positions_BT: Tensor) -> bool:
    """Whether every row is one chat; to transformers those are no packed ones either."""
    return bool((positions_BT == torch.arange(positions_BT.shape[1], device=positions_BT.device)).all())


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
        raise NotImplementedError("the mask is not made of indices alone")
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
        out_BTQD[chat.row, chat.place] = sdpa_attention_forward(module, *heads, chat.visible, **settings)[0][
            0
        ]
    return out_BTQD, None


def _boundaries_of(positions_BT: Tensor, device: torch.device) -> _Boundaries:
    begins_N = torch.cat(((positions_BT == 0).flatten(), torch.ones(1, dtype=torch.bool)))
    starts = begins_N.nonzero().squeeze(1)
    return _Boundaries(to_device(starts.int(), device), int(starts.diff().max()))


@torch.library.custom_op("eagle_rpc::attend_within_chats", mutates_args=())
def _attend_within_chats(query_NQD: Tensor, key_NJD: Tensor, value_NJD: Tensor, scale: float) -> Tensor:
    """[N, Q, D]. Where chats begin is no argument: a layer would be compiled again for each number of them."""
    chats = _boundaries.get()
    places = (chats.starts, chats.starts, chats.longest, chats.longest)
    heads = (query_NQD, key_NJD, value_NJD)
    return torch.ops.aten._flash_attention_forward(*heads, *places, 0.0, True, False, scale=scale)[0]


@_attend_within_chats.register_fake
def _(query_NQD: Tensor, key_NJD: Tensor, value_NJD: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query_NQD)


def _attend_varlen(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: None,
    scaling: float | None = None,
    softcap: float | None = None,
    position_bias: Tensor | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As transformers' attention functions: heads [B, Q, T, D] in, [B, T, Q, D] out."""
    if not (softcap is position_bias is s_aux is None):
        raise NotImplementedError(f"{type(module).__name__} needs more than flash attention for packed chats")
    batch, heads, length, width = query.shape
    rows = (
        tensor.transpose(1, 2).reshape(batch * length, tensor.shape[1], width)
        for tensor in (query, key, value)
    )
    out_NQD = _attend_within_chats(*rows, width**-0.5 if scaling is None else scaling)
    return out_NQD.view(batch, length, heads, width), None


# For names without a function for masks transformers makes none.
AttentionInterface.register(_WHOLE, sdpa_attention_forward)
AttentionInterface.register(_LOOP, _attend_in_loop)
AttentionMaskInterface.register(_LOOP, _mask_by_chat)
AttentionInterface.register(_VARLEN, _attend_varlen)

"""Attention that keeps the chats of a row apart, and needs no mask for rows of one chat.

transformers builds a [B, 1, T, T] mask for packed rows, computes scores between chats, and makes the CPU wait
for the GPU. Legend: B batch, T sequence, N tokens of a batch, L tokens of one chat, Q query heads, J key
heads, D head width.
"""

import contextlib
import itertools
from collections.abc import Callable, Collection, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PretrainedConfig, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from eagle_rpc.supervision import to_device
from eagle_rpc.supervision.segments import ChatBoundaries, chat_boundaries, chat_starts, positions_from
from eagle_rpc.target.capture import run_base
from eagle_rpc.target.probes import FAILURES, packing_fault

# Names in transformers' registry: one chat a row without a mask; a loop over chats; one kernel for all chats.
WITHOUT_MASK, _LOOP, _VARLEN = "eagle_rpc_whole", "eagle_rpc_by_chat", "eagle_rpc_varlen"
_FLASH_DTYPES = (torch.bfloat16, torch.float16)
# Ends of config fields that limit what a layer sees (`sliding_window`); some models apply them in masks only.
_LIMITS = ("window", "window_size", "chunk_size")

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Chat:
    """Where a chat is in the batch, and which of its tokens each of them sees."""

    row: int
    columns: slice
    visible: Tensor | None = None  # [1, 1, L, L] bool; null: every earlier token


_chats: ContextVar[list[_Chat]] = ContextVar("_chats")
_boundaries: ContextVar[dict[torch.device, ChatBoundaries]] = ContextVar("_boundaries")


class ChatAttention:
    """How one model attends to rows of one chat and to packed rows.

    Only sdpa models are treated specially, each way after a probe has shown equal results: without a mask if
    layers see all earlier tokens; packed rows through one kernel on a GPU, in a loop over chats on a CPU.
    Other models (eager, flex attention) keep transformers' masks.
    """

    def __init__(
        self,
        base: PreTrainedModel,
        decoder: PreTrainedModel,
        probe_ids: Tensor,
        devices: Collection[torch.device],
    ) -> None:
        """`decoder`: the text model, `base` itself or inside it; `probe_ids`: [1, T] on their device.

        `devices`: those of the layers.
        """
        self._base, self._config = base, decoder.config
        self._devices = frozenset(devices)
        self._skips_mask = self._flash = self._loops = False
        if self._config._attn_implementation != "sdpa":
            return
        sees_all, on_gpu, rows = _sees_all(self._config), probe_ids.is_cuda, probe_ids.view(2, -1)
        flash = sees_all and on_gpu and base.dtype in _FLASH_DTYPES
        self._skips_mask = sees_all and self._equals_masked(probe_ids)
        self._flash = flash and self._keeps_apart(rows, self._run_varlen)
        self._loops = not on_gpu and self._keeps_apart(rows, self._run_in_loop)

    def run(self, input_ids: Tensor, positions_BT: Tensor | None, *, compiled: bool) -> Tensor:
        """`run_base` on [B, T] ids. `positions_BT`, on the CPU, restart where a chat begins.

        `compiled` excludes the loop over chats, whose number depends on the data.
        """
        if positions_BT is None or are_plain(positions_BT):
            return self._run_whole(input_ids) if self._skips_mask else run_base(self._base, input_ids)
        if self._flash:
            return self._run_varlen(input_ids, positions_BT)
        if self._loops and not compiled:
            return self._run_in_loop(input_ids, positions_BT)
        return run_base(self._base, input_ids, to_device(positions_BT, input_ids.device))

    def _run_whole(self, input_ids: Tensor) -> Tensor:
        with self._attending(WITHOUT_MASK, _chats, []):
            return run_base(self._base, input_ids)

    def _run_varlen(self, input_ids: Tensor, positions_BT: Tensor) -> Tensor:
        with self._attending(_VARLEN, _boundaries, _boundaries_of(positions_BT, self._devices)):
            return run_base(self._base, input_ids, to_device(positions_BT, input_ids.device))

    def _run_in_loop(self, input_ids: Tensor, positions_BT: Tensor) -> Tensor:
        with self._attending(_LOOP, _chats, _chats_of(positions_BT)):
            return run_base(self._base, input_ids, positions_BT)

    @contextlib.contextmanager
    def _attending(self, name: str, variable: ContextVar[T], chats: T) -> Iterator[None]:
        token = variable.set(chats)
        self._config._attn_implementation = name
        try:
            yield
        finally:
            self._config._attn_implementation = "sdpa"
            variable.reset(token)

    def _equals_masked(self, ids_BT: Tensor) -> bool:
        with contextlib.suppress(*FAILURES):
            return torch.equal(self._run_whole(ids_BT), run_base(self._base, ids_BT))
        return False

    def _keeps_apart(self, ids_BT: Tensor, run_packed: Callable[[Tensor, Tensor], Tensor]) -> bool:
        """Whether `run_packed` of ids and positions works on this model and gives what chats give alone."""

        def run(ids_BT: Tensor, segment_ids_BT: Tensor | None) -> Tensor:
            if segment_ids_BT is None:
                return run_base(self._base, ids_BT)
            real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
            return run_packed(ids_BT, positions_within_chats(real_BT, segment_ids_BT).cpu())

        with contextlib.suppress(*FAILURES):
            return packing_fault(run, ids_BT) is None
        return False


def _sees_all(config: PretrainedConfig) -> bool:
    """Whether every layer attends to all earlier tokens, according to the decoder's config."""
    limited = any(value and name.endswith(_LIMITS) for name, value in config.to_dict().items())
    return not limited and all(
        kind == "full_attention" for kind in getattr(config, "layer_types", None) or ()
    )


def positions_within_chats(real_BT: Tensor, segment_ids_BT: Tensor) -> Tensor:
    """Positions [B, T] that restart at each segment, and at the padding after the last one."""
    return positions_from(chat_starts(segment_ids_BT) | chat_starts(real_BT))


def are_plain(positions_BT: Tensor) -> bool:
    """Whether every row is one chat. transformers treats such positions as unpacked, too."""
    return bool((positions_BT == torch.arange(positions_BT.shape[1], device=positions_BT.device)).all())


def _chats_of(positions_BT: Tensor) -> list[_Chat]:
    chats = []
    for row, begins_T in enumerate(positions_BT == 0):
        bounds = [*begins_T.nonzero().flatten().tolist(), positions_BT.shape[1]]
        chats += [_Chat(row, slice(*pair)) for pair in itertools.pairwise(bounds)]
    return chats


def _mask_by_chat(*, mask_function: Callable[..., Tensor], use_vmap: bool = False, **_: Any) -> list[_Chat]:
    """In place of the mask that transformers would build from `mask_function`: its blocks on the diagonal."""
    if use_vmap:
        raise ValueError("the mask must depend on indices alone to be cut into chats")
    return [_Chat(chat.row, chat.columns, _block(mask_function, chat)) for chat in _chats.get()]


def _block(mask_function: Callable[..., Tensor], chat: _Chat) -> Tensor | None:
    index_L = torch.arange(chat.columns.start, chat.columns.stop)
    row, head = torch.tensor(chat.row), torch.tensor(0)
    visible_LL = mask_function(row, head, index_L[:, None], index_L[None, :])
    causal_LL = torch.ones(len(index_L), len(index_L), dtype=torch.bool).tril()
    return None if torch.equal(visible_LL, causal_LL) else visible_LL[None, None]


def _attend_in_loop(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: list[_Chat], **settings: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: heads [B, Q, T, D] in, [B, T, Q, D] out."""
    out_BTQD = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])
    for chat in attention_mask:
        q, k, v = (tensor[chat.row, None, :, chat.columns] for tensor in (query, key, value))
        out_1LQD, _ = sdpa_attention_forward(module, q, k, v, chat.visible, **settings)
        out_BTQD[chat.row, chat.columns] = out_1LQD[0]
    return out_BTQD, None


def _boundaries_of(
    positions_BT: Tensor, devices: Collection[torch.device]
) -> dict[torch.device, ChatBoundaries]:
    places = chat_boundaries(positions_BT == 0)
    longest = int(places.diff().max())
    return {device: ChatBoundaries(to_device(places, device), longest) for device in devices}


@torch.library.custom_op("eagle_rpc::attend_within_chats", mutates_args=())
def _attend_within_chats(query_NQD: Tensor, key_NJD: Tensor, value_NJD: Tensor, scale: float) -> Tensor:
    """[N, Q, D]. Boundaries are no argument, or a layer would be compiled again for each number of chats."""
    heads, chats = (query_NQD, key_NJD, value_NJD), _boundaries.get()[query_NQD.device]
    return torch.ops.aten._flash_attention_forward(*heads, *chats.arguments, 0.0, True, False, scale=scale)[0]


@_attend_within_chats.register_fake
def _(query_NQD: Tensor, key_NJD: Tensor, value_NJD: Tensor, scale: float) -> Tensor:
    return torch.empty_like(query_NQD)


def _attend_varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: None, **settings: Any
) -> tuple[Tensor, None]:
    """An attention function of transformers: heads [B, Q, T, D] in, [B, T, Q, D] out."""
    if not (settings.get("softcap") is settings.get("position_bias") is settings.get("s_aux") is None):
        raise ValueError(f"{type(module).__name__} must attend to packed chats as flash attention does")
    batch, num_heads, length, width = query.shape
    heads = (tensor.transpose(1, 2).flatten(0, 1) for tensor in (query, key, value))
    scaling = settings.get("scaling")
    out_NQD = _attend_within_chats(*heads, width**-0.5 if scaling is None else scaling)
    return out_NQD.view(batch, length, num_heads, width), None


# For a name without a mask function transformers makes no mask.
AttentionInterface.register(WITHOUT_MASK, sdpa_attention_forward)
AttentionInterface.register(_LOOP, _attend_in_loop)
AttentionMaskInterface.register(_LOOP, _mask_by_chat)
AttentionInterface.register(_VARLEN, _attend_varlen)

"""Keys and values of many sequences that are decoded together, and the attention that reads them.

transformers' own cache concatenates keys and values of every layer at every token, and wants all sequences
equally long. Here each sequence has a row, column t of the row belongs to token t, and a forward writes where
the caller says. The causal mask is `column <= position`, row by row, so leftovers in later columns (padding,
an earlier sequence) are never seen: rows start, end and are replaced independently.

Legend: R rows, N rows of one forward, T their new tokens, L columns in use, A attention heads, G key/value
heads, D head width, which of values may be another.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from eagle_rpc.errors import UnsupportedTarget

_ATTENTION_NAME = "eagle_rpc_batch"
# Columns in use are rounded up: a new shape prepares kernels. Capacity as well: growing copies everything.
_COLUMN_STEP, _CAPACITY_STEP = 16, 128


class BatchCache(Cache):
    """R rows for any decoder whose layers attend. `aim` says where the next forward writes and reads."""

    def __init__(self, num_rows: int, num_layers: int) -> None:
        self._batch_layers = [_BatchCacheLayer(num_rows) for _ in range(num_layers)]
        super().__init__(layers=list(self._batch_layers))

    def aim(self, first_row: int, positions_NT: Tensor) -> None:
        """The next forward has N rows from `first_row` on, with new tokens at `positions_NT` (int64)."""
        columns = _rounded_up(int(positions_NT.max()) + 1, _COLUMN_STEP)
        for layer in self._batch_layers:
            layer.aim(first_row, positions_NT, columns)

    def share(self, columns: int) -> None:
        """Copies the first columns of row 0 to all rows."""
        for states in self._states():
            states[1:, :, :columns] = states[:1, :, :columns]

    def move(self, sources: list[int], destinations: list[int]) -> None:
        """Copies whole rows; no row is both source and destination."""
        for states in self._states():
            states[destinations] = states[sources]

    def get_query_offset(self, layer_idx: int = 0) -> Tensor:  # type: ignore[override]
        """Positions [N, T] of the new tokens; transformers passes them to `_batch_mask` unread."""
        return self._batch_layers[layer_idx].positions_NT

    def _states(self) -> Iterator[Tensor]:
        """Of all layers but those that read the keys of another."""
        for layer in self._batch_layers:
            if layer.is_initialized:
                yield layer.keys
                yield layer.values


class _BatchCacheLayer(CacheLayerMixin):
    """Keys and values [R, G, capacity, D] of one layer."""

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, num_rows: int) -> None:
        super().__init__()
        self.num_rows = num_rows

    def aim(self, first_row: int, positions_NT: Tensor, columns: int) -> None:
        self.rows = slice(first_row, first_row + len(positions_NT))
        self.positions_NT = positions_NT
        self.columns = columns

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.keys = key_states.new_empty(self.num_rows, key_states.shape[1], 0, key_states.shape[3])
        self.values = value_states.new_empty(self.num_rows, value_states.shape[1], 0, value_states.shape[3])
        self.is_initialized = True

    def _widen(self) -> None:
        """Makes room for the columns in use."""
        capacity = _rounded_up(self.columns, _CAPACITY_STEP)
        rows, groups, held, width = self.keys.shape
        # Keys are stored as [R, G, D, capacity], the layout that the product with the queries reads;
        # otherwise every product would copy them. Zeros, because a masked column has weight 0, and 0 times
        # NaN is NaN.
        keys = self.keys.new_zeros(rows, groups, width, capacity).transpose(2, 3)
        values = self.values.new_zeros(rows, groups, capacity, self.values.shape[3])
        keys[:, :, :held], values[:, :, :held] = self.keys, self.values
        self.keys, self.values = keys, values

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Writes [N, G, T, D] where `aim` said and returns [N, G, L, D] of the same rows."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        if self.columns > self.get_max_length():
            self._widen()
        rows_N1 = torch.arange(len(key_states), device=key_states.device)[:, None]
        keys, values = self.keys[self.rows], self.values[self.rows]
        keys[rows_N1, :, self.positions_NT] = key_states.transpose(1, 2)
        values[rows_N1, :, self.positions_NT] = value_states.transpose(1, 2)
        return keys[:, :, : self.columns], values[:, :, : self.columns]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.columns, 0

    def get_seq_length(self) -> int:
        return self.columns

    def get_max_length(self) -> int:
        return self.keys.shape[2]


def _rounded_up(number: int, step: int) -> int:
    return number + -number % step


def _batch_mask(
    *, q_offset: Tensor, kv_length: int, mask_function: Callable[..., Tensor], dtype: torch.dtype, **_: Any
) -> Tensor:
    """An additive mask [N, 1, T, L]: the model's rule (causal, sliding, chunked) at each row's positions."""
    positions_NT, device = q_offset, q_offset.device
    rows = torch.arange(len(positions_NT), device=device)[:, None, None, None]
    columns = torch.arange(kv_length, device=device)
    visible_N1TL = mask_function(rows, torch.zeros_like(rows), positions_NT[:, None, :, None], columns)
    mask_N1TL = torch.zeros(visible_N1TL.shape, dtype=dtype, device=device)
    return mask_N1TL.masked_fill_(~visible_N1TL, torch.finfo(dtype).min)


def _batch_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor,
    scaling: float | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **settings: Any,
) -> tuple[Tensor, None]:
    """Attention of [N, A, T, D] queries over [N, G, L, D] keys, which are not copied for each of A/G queries.

    `s_aux` [A]: sinks, the scores of one more column, which has no value. With one new token a row, each key
    is read once. torch's fused kernel needs copies or is slower on CPUs.
    """
    if settings.get("position_bias") is not None:
        raise UnsupportedTarget(f"to decode in batches, {type(module).__name__} must have no position bias")
    rows, heads, length, width = query.shape
    groups = key.shape[1]
    scaling = width**-0.5 if scaling is None else scaling
    grouped = (query * scaling).reshape(rows, groups, heads // groups * length, width)
    scores = (grouped @ key.transpose(2, 3)).view(rows, groups, heads // groups, length, -1)
    if softcap is not None:
        scores = (scores / softcap).tanh() * softcap
    scores = scores + attention_mask[:, :, None]
    if s_aux is not None:
        sinks = s_aux.to(scores.dtype).view(1, groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
        scores = torch.cat((scores, sinks), dim=-1)
    weights = scores.softmax(dim=-1)[..., : key.shape[2]]
    mixed = weights.view(rows, groups, heads // groups * length, -1) @ value
    return mixed.view(rows, heads, length, value.shape[3]).transpose(1, 2).contiguous(), None


AttentionInterface.register(_ATTENTION_NAME, _batch_attention)
AttentionMaskInterface.register(_ATTENTION_NAME, _batch_mask)


@contextmanager
def batch_attention(model: PreTrainedModel) -> Iterator[None]:
    """Inside the block, `model` runs on a `BatchCache`."""
    usual = model.config._attn_implementation
    model.set_attn_implementation(_ATTENTION_NAME)
    if model.config._attn_implementation != _ATTENTION_NAME:
        raise UnsupportedTarget(
            f"attention must go through transformers' AttentionInterface, {type(model).__name__} has its own"
        )
    try:
        yield
    finally:
        model.set_attn_implementation(usual)

"""Causal flash attention with its log-sum (log of the softmax's sum), and a backward for any of both.

These are torch's private operators: the public ones have no backward for a merged softmax.
Legend: B batch, T queries of a sequence, M keys of it (as many unless there are blocks), C blocks, Q query
heads, J key heads, D head width.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from eagle_rpc.supervision import to_device

MAX_HEAD_DIM = 256
Heads = tuple[Tensor, Tensor, Tensor]  # queries [B, T, Q, D], keys and values [B, M, J, D]
aten = torch.ops.aten


@dataclass(frozen=True, kw_only=True, slots=True)
class QueryBlocks:
    """C blocks of queries, one after the other, and the keys of each: its last query attends to all of them."""

    queries: Tensor  # [C + 1] int32, where each block begins, and T
    keys: Tensor  # [C + 1] int32, where its keys begin, and M
    longest: tuple[int, int]  # queries and keys of a block, at most

    @classmethod
    def of(cls, queries: Tensor, keys: Tensor) -> "QueryBlocks":
        """From the boundaries [C + 1] on the CPU."""
        # With no more than one query flash attention would take its form for decoding.
        longest = (max(2, int(queries.diff().max())), int(keys.diff().max()))
        return cls(queries=queries.int(), keys=keys.int(), longest=longest)

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """The arguments of flash attention."""
        return self.queries, self.keys, *self.longest

    @property
    def pairs(self) -> int:
        """Pairs of a query and a key that it attends to."""
        queries, keys = self.queries.diff().long(), self.keys.diff().long()
        return int((queries * keys - queries * (queries - 1) // 2).sum())

    def to(self, device: torch.device) -> "QueryBlocks":
        return replace(self, queries=to_device(self.queries, device), keys=to_device(self.keys, device))


def causal_attention(
    inputs: Heads, scale: float, blocks: QueryBlocks | None, window_left: int | None = None
) -> tuple[Tensor, Tensor]:
    """Attended values [B, T, Q, D] and log-sums [B, Q, T] of the `inputs`; with `blocks` B is 1.

    `window_left`: keys before its own that a query attends to; null: all of them.
    """
    if not inputs[0].is_cuda:
        return _causal_on_cpu(inputs, scale, blocks, window_left)
    window = _window(window_left)
    # With fewer queries than keys, flash attention aligns the last query with the last key.
    if blocks is not None:
        out, log_sums, *_ = aten._flash_attention_forward(
            *(tensor[0] for tensor in inputs), *blocks.arguments, 0.0, True, False, **window, scale=scale
        )
        return out[None], log_sums[None]
    length = inputs[0].shape[1]
    if window_left is None and _cudnn_runs(inputs[0]):
        heads_first = (tensor.transpose(1, 2) for tensor in inputs)
        out, log_sums, *_ = aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, True, 0.0, True, False, scale=scale
        )
        return out.transpose(1, 2), log_sums.squeeze(-1)
    out, log_sums, *_ = aten._flash_attention_forward(
        *inputs, None, None, length, length, 0.0, True, False, **window, scale=scale
    )
    return out, log_sums


def causal_attention_backward(
    out_grads_BTQD: Tensor,
    inputs: Heads,
    out_BTQD: Tensor,
    log_sums_BQT: Tensor,
    scale: float,
    blocks: QueryBlocks | None,
    window_left: int | None = None,
) -> Heads:
    """Gradients of the `inputs` through the causal keys.

    `out` and `log_sums` are those of the whole softmax. On a GPU sums over queries have no fixed order.
    """
    tensors = (out_grads_BTQD, *inputs, out_BTQD)
    if not out_BTQD.is_cuda:
        return _causal_backward_on_cpu(tensors, log_sums_BQT, scale, blocks, window_left)
    window = _window(window_left)
    # The state of dropout, which is not used.
    unused = torch.empty(0, dtype=torch.int64, device=out_BTQD.device)
    if blocks is not None:
        packed = (*(tensor[0] for tensor in tensors), log_sums_BQT[0])
        query_grads, key_grads, value_grads = aten._flash_attention_backward(
            *packed, *blocks.arguments, 0.0, True, unused, unused, **window, scale=scale
        )
        return query_grads[None], key_grads[None], value_grads[None]
    length = out_BTQD.shape[1]
    if window_left is None and _cudnn_runs(out_BTQD):
        heads_first = (tensor.transpose(1, 2) for tensor in tensors)
        no_bias_and_no_boundaries = (None, None, None)
        sizes = (*no_bias_and_no_boundaries, length, length)
        query_grads, key_grads, value_grads = aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first, log_sums_BQT.unsqueeze(-1), unused, unused, *sizes, 0.0, True, scale=scale
        )
        return query_grads.transpose(1, 2), key_grads.transpose(1, 2), value_grads.transpose(1, 2)
    return aten._flash_attention_backward(
        *tensors, log_sums_BQT, None, None, length, length, 0.0, True, unused, unused, **window, scale=scale
    )


def _window(window_left: int | None) -> dict[str, int]:
    """The arguments of flash attention."""
    return {} if window_left is None else {"window_size_left": window_left, "window_size_right": 0}


def _cudnn_runs(heads_BTQD: Tensor) -> bool:
    """Whether cuDNN's kernels run: 1.6 times as fast as torch's on Hopper, for heads up to 128, unpacked."""
    hopper = torch.cuda.get_device_capability(heads_BTQD.device) >= (9, 0)
    return hopper and torch.backends.cudnn.is_available() and heads_BTQD.shape[-1] <= 128


def _causal_on_cpu(
    inputs: Heads, scale: float, blocks: QueryBlocks | None, window_left: int | None
) -> tuple[Tensor, Tensor]:
    outs, log_sums = [], []
    for queries, keys in _slices(blocks):
        heads = _heads_first(inputs, (queries, keys, keys))
        out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(
            *heads, 0.0, False, attn_mask=_causal_mask(heads, window_left), scale=scale
        )
        outs.append(out)
        log_sums.append(log_sum)
    return torch.cat(outs, dim=2).transpose(1, 2), torch.cat(log_sums, dim=2)


def _causal_backward_on_cpu(
    tensors: tuple[Tensor, ...],
    log_sums_BQT: Tensor,
    scale: float,
    blocks: QueryBlocks | None,
    window_left: int | None,
) -> Heads:
    pieces = []
    for queries, keys in _slices(blocks):
        out_grads, *heads, out = _heads_first(tensors, (queries, queries, keys, keys, queries))
        options = {"attn_mask": _causal_mask(heads, window_left), "scale": scale}
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            out_grads, *heads, out, log_sums_BQT[:, :, queries], 0.0, False, **options
        )
        pieces.append([grad.transpose(1, 2) for grad in grads])
    query_grads, key_grads, value_grads = (torch.cat(grads, dim=1) for grads in zip(*pieces, strict=True))
    return query_grads, key_grads, value_grads


def _slices(blocks: QueryBlocks | None) -> list[tuple[slice, slice]]:
    """Queries and keys of each block."""
    if blocks is None:
        return [(slice(None), slice(None))]
    bounds = (itertools.pairwise(places.tolist()) for places in (blocks.queries, blocks.keys))
    return [(slice(*queries), slice(*keys)) for queries, keys in zip(*bounds, strict=True)]


def _heads_first(tensors: Sequence[Tensor], parts: Sequence[slice]) -> list[Tensor]:
    """A part in T of each, as [B, heads, T, D]."""
    return [tensor[:, part].transpose(1, 2) for tensor, part in zip(tensors, parts, strict=True)]


def _causal_mask(heads: Sequence[Tensor], window_left: int | None) -> Tensor:
    """[T, M]: 0 where a query may attend, -inf elsewhere; the last query attends to the last key."""
    queries, keys = heads[0].shape[2], heads[1].shape[2]
    hidden = heads[0].new_full((queries, keys), float("-inf"))
    later = hidden.triu(keys - queries + 1)
    return later if window_left is None else later + hidden.tril(keys - queries - window_left - 1)

"""Causal flash attention with the log of its softmax's sum, and the backward that takes any output and log-sum.

torch's own operators, called below autograd because its public functions give no backward for a merged softmax.
Legend: B batch, T sequence, N slots, Q query heads, J key heads, D head width.
"""

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_rpc.supervision.segments import chat_boundaries

MAX_HEAD_DIM = 256
aten = torch.ops.aten


@dataclass(frozen=True, slots=True)
class Segments:
    """Packed chats: N slots, cut into chats that do not see each other."""

    boundaries: Tensor  # [number of chats + 1] int32, slots where a chat starts, and N
    longest: int  # upper bound of a chat's slots

    @classmethod
    def of(cls, segment_ids_BT: Tensor) -> "Segments":
        """Waits for the device once: the number of chats is a shape."""
        return cls(chat_boundaries(segment_ids_BT).int(), segment_ids_BT.shape[1])

    @property
    def arguments(self) -> tuple[Tensor, Tensor, int, int]:
        """As flash attention takes them: for queries and for keys."""
        return self.boundaries, self.boundaries, self.longest, self.longest


def causal_attention(
    queries_BTQD: Tensor, keys_BTJD: Tensor, values_BTJD: Tensor, scale: float, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    """Attended values [B, T, Q, D] and log-sums [B, Q, T]; with segments B is 1 and T is N."""
    inputs = (queries_BTQD, keys_BTJD, values_BTJD)
    if not queries_BTQD.is_cuda:
        return _causal_on_cpu(inputs, scale, segments)
    if segments is not None:
        out, log_sums, *_ = aten._flash_attention_forward(
            *(tensor[0] for tensor in inputs), *segments.arguments, 0.0, True, False, scale=scale
        )
        return out[None], log_sums[None]
    length = queries_BTQD.shape[1]
    if _cudnn_runs(queries_BTQD):
        heads_first = (tensor.transpose(1, 2) for tensor in inputs)
        out, log_sums, *_ = aten._scaled_dot_product_cudnn_attention(
            *heads_first, None, True, 0.0, True, False, scale=scale
        )
        return out.transpose(1, 2), log_sums.squeeze(-1)
    out, log_sums, *_ = aten._flash_attention_forward(
        *inputs, None, None, length, length, 0.0, True, False, scale=scale
    )
    return out, log_sums


def causal_attention_backward(
    out_grads_BTQD: Tensor,
    inputs: tuple[Tensor, Tensor, Tensor],
    out_BTQD: Tensor,
    log_sums_BQT: Tensor,
    scale: float,
    segments: Segments | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of queries, keys and values, the `inputs`, through the part of the softmax that is causal attention.

    `out` and `log_sums` are those of the whole softmax. Sums over queries have no fixed order on a GPU.
    """
    tensors = (out_grads_BTQD, *inputs, out_BTQD)
    if not out_BTQD.is_cuda:
        return _causal_backward_on_cpu(tensors, log_sums_BQT, scale, segments)
    # The state of dropout, which there is none of.
    unused = torch.empty(0, dtype=torch.int64, device=out_BTQD.device)
    if segments is not None:
        rows = (*(tensor[0] for tensor in tensors), log_sums_BQT[0])
        grads = aten._flash_attention_backward(
            *rows, *segments.arguments, 0.0, True, unused, unused, scale=scale
        )
        return tuple(grad[None] for grad in grads)
    length = out_BTQD.shape[1]
    if _cudnn_runs(out_BTQD):
        heads_first = (tensor.transpose(1, 2) for tensor in tensors)
        grads = aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first,
            log_sums_BQT.unsqueeze(-1),
            unused,
            unused,
            None,
            None,
            None,
            length,
            length,
            0.0,
            True,
            scale=scale,
        )
        return tuple(grad.transpose(1, 2) for grad in grads)
    return aten._flash_attention_backward(
        *tensors, log_sums_BQT, None, None, length, length, 0.0, True, unused, unused, scale=scale
    )


def _cudnn_runs(heads_BTQD: Tensor) -> bool:
    """On Hopper cuDNN's kernels are 1.6 times as fast as torch's flash attention; they take no packed chats and no wide heads."""
    newest = torch.cuda.get_device_capability(heads_BTQD.device) >= (9, 0)
    return newest and torch.backends.cudnn.is_available() and heads_BTQD.shape[-1] <= 128


def _causal_on_cpu(
    inputs: tuple[Tensor, Tensor, Tensor], scale: float, segments: Segments | None
) -> tuple[Tensor, Tensor]:
    outs, log_sums = zip(
        *(
            aten._scaled_dot_product_flash_attention_for_cpu(
                *(tensor[:, chat].transpose(1, 2) for tensor in inputs), 0.0, True, scale=scale
            )
            for chat in _chats(segments)
        ),
        strict=True,
    )
    return torch.cat(outs, dim=2).transpose(1, 2), torch.cat(log_sums, dim=2)


def _causal_backward_on_cpu(
    tensors: tuple[Tensor, ...], log_sums_BQT: Tensor, scale: float, segments: Segments | None
) -> tuple[Tensor, Tensor, Tensor]:
    pieces = []
    for chat in _chats(segments):
        heads = (tensor[:, chat].transpose(1, 2) for tensor in tensors)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads, log_sums_BQT[:, :, chat], 0.0, True, scale=scale
        )
        pieces.append([grad.transpose(1, 2) for grad in grads])
    query_grads, key_grads, value_grads = (torch.cat(grads, dim=1) for grads in zip(*pieces, strict=True))
    return query_grads, key_grads, value_grads


def _chats(segments: Segments | None) -> list[slice]:
    if segments is None:
        return [slice(None)]
    boundaries = segments.boundaries.tolist()
    return [slice(*pair) for pair in itertools.pairwise(boundaries)]

"""Causal flash attention with its log-sum (log of the softmax's sum), and a backward for any of both.

These are torch's private operators: the public ones have no backward for a merged softmax.
Legend: B batch, T sequence, N slots, Q query heads, J key heads, D head width.
"""

import itertools

import torch
from torch import Tensor

from eagle_rpc.supervision.segments import ChatBoundaries

MAX_HEAD_DIM = 256
Heads = tuple[Tensor, Tensor, Tensor]  # queries [B, T, Q, D], keys and values [B, T, J, D]
aten = torch.ops.aten


def causal_attention(inputs: Heads, scale: float, chats: ChatBoundaries | None) -> tuple[Tensor, Tensor]:
    """Attended values [B, T, Q, D] and log-sums [B, Q, T] of the `inputs`; with `chats` B is 1 and T is N."""
    if not inputs[0].is_cuda:
        return _causal_on_cpu(inputs, scale, chats)
    if chats is not None:
        out, log_sums, *_ = aten._flash_attention_forward(
            *(tensor[0] for tensor in inputs), *chats.arguments, 0.0, True, False, scale=scale
        )
        return out[None], log_sums[None]
    length = inputs[0].shape[1]
    if _cudnn_runs(inputs[0]):
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
    inputs: Heads,
    out_BTQD: Tensor,
    log_sums_BQT: Tensor,
    scale: float,
    chats: ChatBoundaries | None,
) -> Heads:
    """Gradients of the `inputs` through the causal keys.

    `out` and `log_sums` are those of the whole softmax. On a GPU sums over queries have no fixed order.
    """
    tensors = (out_grads_BTQD, *inputs, out_BTQD)
    if not out_BTQD.is_cuda:
        return _causal_backward_on_cpu(tensors, log_sums_BQT, scale, chats)
    # The state of dropout, which is not used.
    unused = torch.empty(0, dtype=torch.int64, device=out_BTQD.device)
    if chats is not None:
        packed = (*(tensor[0] for tensor in tensors), log_sums_BQT[0])
        query_grads, key_grads, value_grads = aten._flash_attention_backward(
            *packed, *chats.arguments, 0.0, True, unused, unused, scale=scale
        )
        return query_grads[None], key_grads[None], value_grads[None]
    length = out_BTQD.shape[1]
    if _cudnn_runs(out_BTQD):
        heads_first = (tensor.transpose(1, 2) for tensor in tensors)
        no_bias_and_no_boundaries = (None, None, None)
        sizes = (*no_bias_and_no_boundaries, length, length)
        query_grads, key_grads, value_grads = aten._scaled_dot_product_cudnn_attention_backward(
            *heads_first, log_sums_BQT.unsqueeze(-1), unused, unused, *sizes, 0.0, True, scale=scale
        )
        return query_grads.transpose(1, 2), key_grads.transpose(1, 2), value_grads.transpose(1, 2)
    return aten._flash_attention_backward(
        *tensors, log_sums_BQT, None, None, length, length, 0.0, True, unused, unused, scale=scale
    )


def _cudnn_runs(heads_BTQD: Tensor) -> bool:
    """Whether cuDNN's kernels run: 1.6 times as fast as torch's on Hopper, for heads up to 128, unpacked."""
    hopper = torch.cuda.get_device_capability(heads_BTQD.device) >= (9, 0)
    return hopper and torch.backends.cudnn.is_available() and heads_BTQD.shape[-1] <= 128


def _causal_on_cpu(inputs: Heads, scale: float, chats: ChatBoundaries | None) -> tuple[Tensor, Tensor]:
    outs, log_sums = [], []
    for chat in _slices(chats):
        heads = (tensor[:, chat].transpose(1, 2) for tensor in inputs)
        out, log_sum = aten._scaled_dot_product_flash_attention_for_cpu(*heads, 0.0, True, scale=scale)
        outs.append(out)
        log_sums.append(log_sum)
    return torch.cat(outs, dim=2).transpose(1, 2), torch.cat(log_sums, dim=2)


def _causal_backward_on_cpu(
    tensors: tuple[Tensor, ...], log_sums_BQT: Tensor, scale: float, chats: ChatBoundaries | None
) -> Heads:
    pieces = []
    for chat in _slices(chats):
        heads = (tensor[:, chat].transpose(1, 2) for tensor in tensors)
        grads = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *heads, log_sums_BQT[:, :, chat], 0.0, True, scale=scale
        )
        pieces.append([grad.transpose(1, 2) for grad in grads])
    query_grads, key_grads, value_grads = (torch.cat(grads, dim=1) for grads in zip(*pieces, strict=True))
    return query_grads, key_grads, value_grads


def _slices(chats: ChatBoundaries | None) -> list[slice]:
    """The slots of each chat."""
    if chats is None:
        return [slice(None)]
    return [slice(*pair) for pair in itertools.pairwise(chats.places.tolist())]

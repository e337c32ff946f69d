"""The operations between the matrix products of the fused unroll.

The CPU runs the formulas as written here, a GPU the Triton kernel of the same name in `triton_formulas`. Both
compute in fp32 (fp64 for fp64 inputs) and round on storing. Tensors are contiguous unless the docstring says
otherwise.
Legend: N slots, H hidden, I feed-forward width, B batch, T sequence, E tokens, S steps, Q width of all
queries, J of all keys, P = Q + 2 J of queries, keys and values side by side, D head width, n rows, K draft
vocab.
"""

import functools
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.draft.losses import row_losses
from eagle_rpc.draft.rope import RopeTables, rotate

Parameters = ParamSpec("Parameters")
Result = TypeVar("Result")


def widened(x: Tensor) -> Tensor:
    """`x` in fp32, or in fp64 if it is fp64."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def with_kernel(formula: Callable[Parameters, Result]) -> Callable[Parameters, Result]:
    """Replaces the formula by the kernel of the same name where the first argument is on a GPU."""

    @functools.wraps(formula)
    def run(*arguments: Any) -> Any:
        if not arguments[0].is_cuda:
            return formula(*arguments)  # type: ignore[call-arg]
        # Only torch for CUDA comes with Triton.
        from eagle_rpc.draft.fused import triton_formulas

        return getattr(triton_formulas, formula.__name__)(*arguments)

    return cast("Callable[Parameters, Result]", run)


@with_kernel
def rms_norm(x_NH: Tensor, weight_H: Tensor, eps: float) -> Tensor:
    """`weight * x / rms(x)` in the dtype of `x`."""
    wide_NH = widened(x_NH)
    return (weight_H * wide_NH * torch.rsqrt(wide_NH.square().mean(-1, keepdim=True) + eps)).to(x_NH.dtype)


@with_kernel
def rms_norm_backward(
    normed_grad_NH: Tensor,
    x_NH: Tensor,
    norm: tuple[Tensor, float],
    weight_grad_H: Tensor,
    passed_NH: Tensor | None,
    out_NH: Tensor,
) -> None:
    """Backward of `rms_norm` (`norm` are its weight and eps) and of the residual connection around it.

    Adds to `weight_grad_H`. Stores the gradient of `x`, plus `passed_NH` if given, in `out_NH`, which may be
    one of the two gradients given. Replaces `x_NH` by `rms_norm(x_NH)`, the input of the product whose weight
    gradient comes next.
    """
    weight_H, eps = norm
    grad_NH, wide_NH = widened(normed_grad_NH), widened(x_NH)
    inverse_rms_N1 = torch.rsqrt(wide_NH.square().mean(-1, keepdim=True) + eps)
    scaled_NH = wide_NH * inverse_rms_N1
    weighted_NH = grad_NH * weight_H
    x_grad_NH = inverse_rms_N1 * (weighted_NH - scaled_NH * (weighted_NH * scaled_NH).mean(-1, keepdim=True))
    weight_grad_H.add_((grad_NH * scaled_NH).sum(dim=0))
    out_NH.copy_(x_grad_NH if passed_NH is None else x_grad_NH + passed_NH)
    x_NH.copy_(weight_H * scaled_NH)


@with_kernel
def swiglu(gate_up_NI2: Tensor) -> Tensor:
    """`silu(gate) * up`, [N, I]."""
    gate_NI, up_NI = widened(gate_up_NI2).chunk(2, dim=-1)
    return (F.silu(gate_NI) * up_NI).to(gate_up_NI2.dtype)


@with_kernel
def swiglu_backward(gated_grad_NI: Tensor, gate_up_NI2: Tensor, gated_out_NI: Tensor) -> None:
    """Replaces gate and up by their gradients and stores `swiglu(gate_up)` in `gated_out_NI`."""
    gate_NI, up_NI = widened(gate_up_NI2).chunk(2, dim=-1)
    grad_NI = widened(gated_grad_NI)
    sigmoid_NI = torch.sigmoid(gate_NI)
    silu_NI = gate_NI * sigmoid_NI
    gated_out_NI.copy_(silu_NI * up_NI)
    gate_grad_NI = grad_NI * up_NI * (sigmoid_NI + silu_NI * (1 - sigmoid_NI))
    gate_up_NI2.copy_(torch.cat((gate_grad_NI, grad_NI * silu_NI), dim=-1))


@with_kernel
def add_and_rotate(
    hidden_part_BTP: Tensor, embed_part_BTP: Tensor, tables: RopeTables, value_width: int, out_BTP: Tensor
) -> None:
    """Adds both parts of the projection and rotates all columns but the last `value_width`, head by head.

    `embed_part` may be a slice in T.
    """
    sum_BTP = widened(hidden_part_BTP) + widened(embed_part_BTP)
    rotated, values = sum_BTP.split((sum_BTP.shape[-1] - value_width, value_width), dim=-1)
    out_BTP.copy_(torch.cat((_rotate(rotated, tables), values), dim=-1))


@with_kernel
def rotate_back(
    query_grad_BTQ: Tensor, key_value_grad_BTJ2: Tensor, tables: RopeTables, out_BTP: Tensor
) -> None:
    """Backward of `add_and_rotate` for either part: the gradients side by side, rotated back."""
    key_grad, value_grad = widened(key_value_grad_BTJ2).chunk(2, dim=-1)
    rotated = torch.cat((widened(query_grad_BTQ), key_grad), dim=-1)
    cos, sin = tables
    out_BTP.copy_(torch.cat((_rotate(rotated, (cos, -sin)), value_grad), dim=-1))


def _rotate(x_BTP: Tensor, tables: RopeTables) -> Tensor:
    """`rotate` for heads side by side in the last dimension."""
    heads_first = x_BTP.unflatten(-1, (-1, 2 * tables[0].shape[-1])).transpose(1, 2)
    return rotate(heads_first, tables).transpose(1, 2).flatten(-2)


@with_kernel
def sum_readers(steps_SNP: Tensor, readers_SE: Tensor) -> Tensor:
    """[E, P]: the sum over all steps of the slot that reads a token at that step; -1: none does."""
    # The row of zeros behind the slots is what -1 names.
    padded_SNP = F.pad(widened(steps_SNP), (0, 0, 0, 1))
    of_steps = (padded_NP[readers_E] for padded_NP, readers_E in zip(padded_SNP, readers_SE, strict=True))
    return functools.reduce(torch.add, of_steps).to(steps_SNP.dtype)


@with_kernel
def to_fp8(x_NW: Tensor, dtype: torch.dtype, turned: bool) -> tuple[Tensor, Tensor]:
    """`x` rounded to the float8 `dtype` with one scale, and the scale: the largest value / that of the dtype.

    [N, W]; `turned`: transposed, with zeros behind the N columns up to a multiple of 16. `x` may be a slice in
    W. A value that is not finite makes all products of the result NaN.
    """
    wide_NW = widened(x_NW)
    largest = wide_NW.abs().amax()
    scale = torch.where(largest == 0, 1.0, largest / torch.finfo(dtype).max)
    rounded_NW = (wide_NW / scale).float().to(dtype)
    if not turned:
        return rounded_NW, scale
    turned_WN = rounded_NW.new_zeros(x_NW.shape[1], len(x_NW) + -len(x_NW) % 16)
    turned_WN[:, : len(x_NW)] = rounded_NW.t()
    return turned_WN, scale


@with_kernel
def judge_rows_(
    logits_nSK: Tensor,
    target_logits_nK: Tensor,
    log_normalizer_n: Tensor,
    coefficients_nS: Tensor,
    loss: str,
    kl_share: float,
) -> tuple[Tensor, Tensor]:
    """Losses and most likely ids, [n, S] each; logits become the gradients of coefficient times loss."""
    wide_nSK = widened(logits_nSK)
    wide_targets_nK = widened(target_logits_nK)
    losses_nS, gradient_nSK = row_losses(loss, wide_nSK, wide_targets_nK, log_normalizer_n, kl_share)
    predicted_nS = wide_nSK.argmax(dim=-1)
    logits_nSK.copy_(gradient_nSK * coefficients_nS.unsqueeze(-1))
    return losses_nS, predicted_nS

"""The draft's head and a loss over chunks of rows, on any device: the reference of `FusedStep._judge`.

Gradients are computed in the forward pass, so the logits of only one chunk exist at a time.
Legend: N rows, n rows of a chunk, S steps, H hidden, K draft vocab.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from eagle_rpc.draft.losses import cross_entropy_from_probs, row_losses
from eagle_rpc.supervision import DraftTargets

# fp32 logits of a chunk in bytes: they fit a CPU's caches, and matrix products are still efficient.
_CHUNK_BYTES = 16 * 2**20


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedRows:
    """N rows of a batch: the target's side, the loss, and its weight at each step."""

    targets: DraftTargets
    log_normalizer: Tensor  # [N] fp32
    loss: str  # one of `losses.LOSSES`
    coefficients: Tensor  # [N, S] fp32 or fp64
    kl_share: float = 0.0  # of a loss that mixes


def head_loss(hidden_NSH: Tensor, head_KH: Tensor, rows: JudgedRows) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of coefficient times loss over N rows, each judged at S steps.

    `hidden_NSH` is the head's input. The draft's logits are `hidden_NSH @ head_KH.T`; that product runs in
    autocast's dtype where autocast is on, all else in fp32 (fp64 for fp64 weights). Returns the sum (scalar)
    and, without gradient, the losses [N, S] and the draft's most likely draft ids [N, S] int64.
    """
    device_type = hidden_NSH.device.type
    autocast = torch.is_autocast_enabled(device_type)
    matmul_dtype = torch.get_autocast_dtype(device_type) if autocast else head_KH.dtype
    with torch.autocast(device_type, enabled=False):
        accurate = torch.promote_types(matmul_dtype, torch.float32)
        rows = replace(rows, coefficients=rows.coefficients.to(accurate))
        return _HeadLoss.apply(hidden_NSH, head_KH, rows, matmul_dtype, torch.is_grad_enabled())


def row_chunks(rows: int, bytes_per_row: int, chunk_bytes: int) -> Iterator[slice]:
    """Slices of at most `chunk_bytes`, and of at least one row, that cover `rows` rows."""
    size = max(1, chunk_bytes // bytes_per_row)
    for start in range(0, rows, size):
        yield slice(start, start + size)


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NSH: Tensor,
        head_KH: Tensor,
        rows: JudgedRows,
        matmul_dtype: torch.dtype,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """As `head_loss`; `with_gradients` saves those of `hidden_NSH` and `head_KH` for `backward`."""
        inputs_NSH, weight_KH = hidden_NSH.to(matmul_dtype), head_KH.to(matmul_dtype)
        losses_NS = torch.empty_like(rows.coefficients)
        predicted_NS = torch.empty_like(rows.coefficients, dtype=torch.int64)
        if with_gradients:
            hidden_grad_NSH = torch.empty_like(inputs_NSH)
            head_grad_KH = torch.zeros_like(head_KH, dtype=rows.coefficients.dtype)
        logits_per_row = hidden_NSH.shape[1] * head_KH.shape[0]
        for chunk in row_chunks(len(hidden_NSH), 4 * logits_per_row, _CHUNK_BYTES):
            logits_nSK = F.linear(inputs_NSH[chunk], weight_KH).to(rows.coefficients.dtype)
            losses_NS[chunk], predicted_NS[chunk], gradient_nSK = _judge(logits_nSK, rows, chunk)
            if with_gradients:
                logits_grad_nSK = gradient_nSK.mul_(rows.coefficients[chunk].unsqueeze(-1)).to(matmul_dtype)
                hidden_grad_NSH[chunk] = logits_grad_nSK @ weight_KH
                head_grad_KH += logits_grad_nSK.flatten(0, 1).t() @ inputs_NSH[chunk].flatten(0, 1)
        if with_gradients:
            ctx.save_for_backward(hidden_grad_NSH.to(hidden_NSH.dtype), head_grad_KH.to(head_KH.dtype))
        ctx.mark_non_differentiable(losses_NS, predicted_NS)
        return (losses_NS * rows.coefficients).sum(), losses_NS, predicted_NS

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, loss_grad: Tensor, *_: Tensor) -> tuple[Tensor | None, ...]:
        hidden_grad_NSH, head_grad_KH = ctx.saved_tensors
        return hidden_grad_NSH * loss_grad, head_grad_KH * loss_grad, None, None, None


def _judge(logits_nSK: Tensor, rows: JudgedRows, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [n, S], most likely ids [n, S] and the gradients of the losses by the logits [n, S, K]."""
    if rows.loss == "soft_cross_entropy":
        return cross_entropy_from_probs(logits_nSK, rows.targets.probs(chunk).to(logits_nSK.dtype))
    target_logits_nK = rows.targets.logits(chunk).to(logits_nSK.dtype)
    losses_nS, gradient_nSK = row_losses(
        rows.loss, logits_nSK, target_logits_nK, rows.log_normalizer[chunk], rows.kl_share
    )
    return losses_nS, logits_nSK.argmax(dim=-1), gradient_nSK

"""The loss of the draft against the target, head included, over chunks of supervised rows: the clear reference.

Gradients are formed beside the loss, so that logits of one chunk at a time exist. On a GPU `fused.head` does this work.
Legend: N supervised rows, n rows of a chunk, S steps, H hidden, K draft vocab.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from eagle_rpc.draft.losses import row_losses
from eagle_rpc.supervision import DraftTargets

# Logits of a chunk in fp32, bytes: few enough to stay in a CPU's caches, enough rows for efficient matrix products.
_CHUNK_BYTES = 16 * 2**20


def soft_cross_entropy(
    hidden_NSH: Tensor, head_KH: Tensor, targets: DraftTargets, coefficients_NS: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`head_loss` for -sum_j p_j log q_j, which needs no log-normaliser."""
    unread_N = coefficients_NS.new_empty(len(coefficients_NS))
    return head_loss(hidden_NSH, head_KH, targets, coefficients_NS, "soft_cross_entropy", unread_N)


def head_loss(
    hidden_NSH: Tensor,
    head_KH: Tensor,
    targets: DraftTargets,
    coefficients_NS: Tensor,
    loss: str,
    log_normalizer_N: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """The weighted sum of a loss (one of `losses.LOSSES`) over N rows, each judged at S steps.

    `hidden_NSH` is what the head reads; p comes from `targets` and q from `hidden_NSH @ head_KH.T`, both fp32 (matrix
    products in autocast's dtype where that is on). Returns the sum of coefficient times loss (scalar), and without
    gradient the losses [N, S] fp32 and the draft's most likely draft ids [N, S] int64.
    """
    device_type = hidden_NSH.device.type
    autocast = torch.is_autocast_enabled(device_type)
    matmul_dtype = torch.get_autocast_dtype(device_type) if autocast else head_KH.dtype
    with torch.autocast(device_type, enabled=False):
        coefficients_NS = coefficients_NS.to(torch.promote_types(matmul_dtype, torch.float32))
        rows = _Rows(targets, coefficients_NS, loss, log_normalizer_N)
        return _HeadLoss.apply(hidden_NSH, head_KH, rows, matmul_dtype, torch.is_grad_enabled())


@dataclass(frozen=True, slots=True)
class _Rows:
    """What the rows are judged by."""

    targets: DraftTargets
    coefficients: Tensor  # [N, S] fp32 or fp64
    loss: str
    log_normalizer: Tensor  # [N] fp32


class _HeadLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden_NSH: Tensor,
        head_KH: Tensor,
        rows: _Rows,
        matmul_dtype: torch.dtype,
        with_gradients: bool,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The weighted sum of losses, scalar, with the losses [N, S] and the most likely draft ids [N, S], which carry no gradients.

        `hidden_NSH` and `head_KH` are multiplied in `matmul_dtype`; their gradients are formed here, `with_gradients`, chunk by chunk.
        """
        inputs_NSH, weight_KH = hidden_NSH.to(matmul_dtype), head_KH.to(matmul_dtype)
        losses_NS = torch.empty_like(rows.coefficients)
        predicted_NS = torch.empty_like(rows.coefficients, dtype=torch.int64)
        if with_gradients:
            hidden_grad_NSH = torch.empty_like(inputs_NSH)
            head_grad_KH = torch.zeros_like(head_KH, dtype=rows.coefficients.dtype)
        for chunk in _row_chunks(hidden_NSH.shape[0], hidden_NSH.shape[1] * head_KH.shape[0]):
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


def _judge(logits_nSK: Tensor, rows: _Rows, chunk: slice) -> tuple[Tensor, Tensor, Tensor]:
    """Losses [n, S], most likely ids [n, S] and the losses' gradients by the logits [n, S, K]."""
    if rows.loss == "soft_cross_entropy":
        return _judge_by_cross_entropy(logits_nSK, rows.targets.probs(chunk).to(logits_nSK.dtype))
    target_logits_nK = rows.targets.logits(chunk).to(logits_nSK.dtype)
    losses_nS, gradient_nSK = row_losses(rows.loss, logits_nSK, target_logits_nK, rows.log_normalizer[chunk])
    return losses_nS, logits_nSK.argmax(dim=-1), gradient_nSK


def _judge_by_cross_entropy(logits_nSK: Tensor, probs_nK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`row_losses` for the default, arranged for a CPU."""
    draft_probs_nSK = logits_nSK.softmax(dim=-1)
    predicted_nS1 = logits_nSK.argmax(dim=-1, keepdim=True)
    # One exact log a row instead of K: the largest probability never underflows.
    log_normalizer_nS1 = (
        logits_nSK.gather(-1, predicted_nS1) - draft_probs_nSK.gather(-1, predicted_nS1).log()
    )
    expected_logit_nS1 = logits_nSK @ probs_nK.unsqueeze(-1)
    losses_nS1 = log_normalizer_nS1 * probs_nK.sum(-1)[:, None, None] - expected_logit_nS1
    return losses_nS1.squeeze(-1), predicted_nS1.squeeze(-1), draft_probs_nSK.sub_(probs_nK.unsqueeze(1))


def _row_chunks(rows: int, logits_per_row: int) -> Iterator[slice]:
    size = max(1, _CHUNK_BYTES // (4 * logits_per_row))
    for start in range(0, rows, size):
        yield slice(start, start + size)

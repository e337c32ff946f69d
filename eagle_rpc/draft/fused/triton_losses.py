"""Triton kernel of `formulas.judge_rows_`: the losses of `draft/losses.py` and their gradients.

It reads a row's logits twice, and three times with ACCEPTANCE or another divergence than KL. One program
takes one row at one step.
Legend: n rows, S steps, K draft vocab and block of it.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from eagle_rpc.draft.losses import LAMBDA_DECAY, LOSSES, LOWEST_LOG_PROBABILITY

# Of `_judge_kernel`: subtract the target's entropy, read the acceptance, blend both by `lk_lambda`'s weight; add
# another divergence in the share that KL leaves.
FLAGS = ("KL", "ACCEPTANCE", "HYBRID", "REVERSE", "VARIATION", "SHANNON")
_LOG_2 = tl.constexpr(0.6931471805599453)
_BLOCK, _NUM_WARPS = 4096, 8
# Replaces minus infinity, whose differences would be NaN.
_LOWEST = tl.constexpr(-1.0e30)


@triton.jit
def _terms_and_slopes(log_draft_K, log_target_K, lowest, REVERSE: tl.constexpr, VARIATION: tl.constexpr):
    """The terms f(q_j) of a divergence, their slopes f'(q_j), and q_j."""
    draft_K, target_K = tl.exp(log_draft_K), tl.exp(log_target_K)
    log_target_K = tl.maximum(log_target_K, lowest)
    if REVERSE:
        slopes_K = log_draft_K - log_target_K
        terms_K = draft_K * slopes_K
    elif VARIATION:
        slopes_K = tl.where(draft_K > target_K, 0.5, tl.where(draft_K < target_K, -0.5, 0.0))
        terms_K = 0.5 * tl.abs(draft_K - target_K)
    else:
        larger_K, smaller_K = tl.maximum(log_draft_K, log_target_K), tl.minimum(log_draft_K, log_target_K)
        log_mean_K = larger_K + tl.log(1.0 + tl.exp(smaller_K - larger_K)) - _LOG_2
        slopes_K = 0.5 * (log_draft_K - log_mean_K)
        terms_K = draft_K * slopes_K + 0.5 * target_K * (log_target_K - log_mean_K)
    return terms_K, slopes_K, draft_K


@triton.jit
def _load(logits, targets, start, columns_K, vocab):
    """A block of a row from column `start`, and the columns of it that the vocabulary has."""
    mask_K = start + columns_K < vocab
    logits_K = tl.load(logits + start + columns_K, mask_K, other=_LOWEST).to(tl.float32)
    targets_K = tl.load(targets + start + columns_K, mask_K, other=_LOWEST).to(tl.float32)
    return mask_K, logits_K, targets_K


@triton.jit
def _cross_entropy(logits, targets, vocab, KL: tl.constexpr, BLOCK: tl.constexpr):
    """The cross entropy, less the target's entropy if KL; the draft's argmax; both log-sums."""
    columns_K = tl.arange(0, BLOCK)
    largest, largest_target, best = _LOWEST, _LOWEST, 0
    sums_K, target_sums_K = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    cross_K, entropy_K = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        mask_K, logits_K, targets_K = _load(logits, targets, start, columns_K, vocab)
        targets_K = tl.maximum(targets_K, _LOWEST)
        block_largest = tl.max(logits_K)
        if block_largest > largest:
            best = start + tl.argmax(logits_K, axis=0)
        new_largest = tl.maximum(largest, block_largest)
        new_largest_target = tl.maximum(largest_target, tl.max(targets_K))
        target_scale = tl.exp(largest_target - new_largest_target)
        target_weights_K = tl.where(mask_K, tl.exp(targets_K - new_largest_target), 0.0)
        weights_K = tl.where(mask_K, tl.exp(logits_K - new_largest), 0.0)
        sums_K = sums_K * tl.exp(largest - new_largest) + weights_K
        target_sums_K = target_sums_K * target_scale + target_weights_K
        cross_K = cross_K * target_scale + target_weights_K * logits_K
        if KL:
            entropy_K = entropy_K * target_scale + target_weights_K * targets_K
        largest, largest_target = new_largest, new_largest_target
    log_sum = largest + tl.log(tl.sum(sums_K))
    target_sum = tl.sum(target_sums_K)
    target_log_sum = largest_target + tl.log(target_sum)
    loss = log_sum - tl.sum(cross_K) / target_sum
    if KL:
        loss += tl.sum(entropy_K) / target_sum - target_log_sum
    return loss, best, log_sum, target_log_sum


@triton.jit
def _acceptance(logits, targets, vocab, log_sum, log_normalizer, BLOCK: tl.constexpr):
    """The probability of acceptance, and the draft's probability of the tokens that the target finds likelier."""
    columns_K = tl.arange(0, BLOCK)
    accepted_K, short_K = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        _, logits_K, targets_K = _load(logits, targets, start, columns_K, vocab)
        draft_K, true_K = tl.exp(logits_K - log_sum), tl.exp(targets_K - log_normalizer)
        accepted_K += tl.minimum(draft_K, true_K)
        short_K += tl.where(draft_K < true_K, draft_K, 0.0)
    return tl.sum(accepted_K), tl.sum(short_K)


@triton.jit
def _divergence(
    logits, targets, vocab, log_sum, target_log_sum, lowest,
    REVERSE: tl.constexpr, VARIATION: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """The divergence, and the draft's mean of its slopes."""
    columns_K = tl.arange(0, BLOCK)
    sum_K, slope_sum_K = tl.zeros((BLOCK,), tl.float32), tl.zeros((BLOCK,), tl.float32)
    for start in range(0, vocab, BLOCK):
        _, logits_K, targets_K = _load(logits, targets, start, columns_K, vocab)
        terms_K, slopes_K, draft_K = _terms_and_slopes(
            logits_K - log_sum, targets_K - target_log_sum, lowest, REVERSE, VARIATION
        )
        # Columns beyond the vocabulary add 0: both probabilities are 0 there, and all logs finite.
        sum_K += terms_K
        slope_sum_K += draft_K * slopes_K
    return tl.sum(sum_K), tl.sum(slope_sum_K)


@triton.jit
def _judge_kernel(
    logits, targets, log_normalizers, coefficients, losses, predicted, steps, vocab, decay, kl_share, lowest,
    KL: tl.constexpr, ACCEPTANCE: tl.constexpr, HYBRID: tl.constexpr, REVERSE: tl.constexpr,
    VARIATION: tl.constexpr, SHANNON: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    pair = tl.program_id(0).to(tl.int64)
    row = pair // steps
    logits += pair * vocab
    targets += row * vocab
    loss, best, log_sum, target_log_sum = _cross_entropy(logits, targets, vocab, KL, BLOCK)

    divergence_weight, acceptance_weight, short, log_normalizer = 1.0, 0.0, 0.0, 0.0
    if ACCEPTANCE:
        log_normalizer = tl.load(log_normalizers + row)
        acceptance, short = _acceptance(logits, targets, vocab, log_sum, log_normalizer, BLOCK)
        if HYBRID:
            divergence_weight = tl.exp(-decay * acceptance)
            acceptance_weight = 1.0 - divergence_weight
            loss = divergence_weight * loss + acceptance_weight * (1.0 - acceptance)
        else:
            divergence_weight, acceptance_weight = 0.0, 1.0 / acceptance
            loss = -tl.log(acceptance)
    mean_slope = 0.0
    if REVERSE or VARIATION or SHANNON:
        divergence, mean_slope = _divergence(
            logits, targets, vocab, log_sum, target_log_sum, lowest, REVERSE, VARIATION, BLOCK
        )
        divergence_weight = kl_share
        loss = kl_share * loss + (1.0 - kl_share) * divergence
    tl.store(losses + pair, loss)
    tl.store(predicted + pair, best.to(tl.int64))

    coefficient = tl.load(coefficients + pair)
    columns_K = tl.arange(0, BLOCK)
    for start in range(0, vocab, BLOCK):
        mask_K, logits_K, targets_K = _load(logits, targets, start, columns_K, vocab)
        draft_K = tl.exp(logits_K - log_sum)
        gradient_K = divergence_weight * (draft_K - tl.exp(targets_K - target_log_sum))
        if ACCEPTANCE:
            short_K = tl.where(draft_K < tl.exp(targets_K - log_normalizer), draft_K, 0.0)
            gradient_K -= acceptance_weight * (short_K - draft_K * short)
        if REVERSE or VARIATION or SHANNON:
            _, slopes_K, _ = _terms_and_slopes(
                logits_K - log_sum, targets_K - target_log_sum, lowest, REVERSE, VARIATION
            )
            gradient_K += (1.0 - kl_share) * draft_K * (slopes_K - mean_slope)
        tl.store(logits + start + columns_K, (coefficient * gradient_K).to(logits.dtype.element_ty), mask_K)


def judge_rows_(
    logits_nSK: Tensor,
    target_logits_nK: Tensor,
    log_normalizer_n: Tensor,
    coefficients_nS: Tensor,
    loss: str,
    kl_share: float,
) -> tuple[Tensor, Tensor]:
    """`formulas.judge_rows_` as one kernel."""
    assert logits_nSK.is_contiguous() and target_logits_nK.is_contiguous() and coefficients_nS.is_contiguous()
    rows, steps, vocab = logits_nSK.shape
    losses_nS = torch.empty_like(coefficients_nS)
    predicted_nS = torch.empty(rows, steps, dtype=torch.int64, device=logits_nSK.device)
    tensors = (logits_nSK, target_logits_nK, log_normalizer_n, coefficients_nS, losses_nS, predicted_nS)
    flags = {flag: flag in LOSSES[loss].kernel_flags for flag in FLAGS}
    _judge_kernel[(rows * steps,)](
        *tensors,
        steps,
        vocab,
        LAMBDA_DECAY,
        kl_share,
        LOWEST_LOG_PROBABILITY,
        **flags,
        BLOCK=_BLOCK,
        num_warps=_NUM_WARPS,
    )
    return losses_nS, predicted_nS

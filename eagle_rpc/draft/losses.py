"""The registry of losses: the cost of one row of draft logits against the target's, and its gradient.

Notation, per row and over the draft vocabulary: p the target's distribution; P its probabilities over the
full vocabulary, which sum to less than 1 here; q the draft's distribution; a = sum_j min(P_j, q_j) the
probability that rejection sampling accepts the draft's token.

A new loss takes four steps; tests compare 1 with the definition and 3 with 1:

1. here, a function such as `_kl` and its entry in `LOSSES`;
2. `config/choices.py`: its name in `DraftLoss`, from which `draft.loss` is chosen; `_broken_in_draft` of
   `config/checks.py`, if it may be blended with KL or reads P;
3. `fused/triton_losses.py`: the same formula for GPUs, under a flag that the entry names;
4. `tests/unit/draft/test_losses.py`: the definition, in `by_hand`.

Legend: n rows, S steps, K draft vocab.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

# How fast `lk_lambda` turns from KL to acceptance as acceptance grows.
LAMBDA_DECAY = 3.0
# Of a token that the target rules out: near the log of the smallest fp32 number. It bounds the cost of guessing
# such a token, which would be infinite.
LOWEST_LOG_PROBABILITY = -87.0

LossAndGradient = tuple[Tensor, Tensor]  # [n, S, 1] and, by the logits, [n, S, K]


class _Distributions:
    """Draft and target at n rows and S steps, with the terms that losses share."""

    def __init__(self, logits_nSK: Tensor, target_logits_nK: Tensor, log_normalizer_n: Tensor) -> None:
        log_sums_nS1 = logits_nSK.logsumexp(dim=-1, keepdim=True)
        self.draft_nSK = (logits_nSK - log_sums_nS1).exp()  # q
        self.target_n1K = target_logits_nK.softmax(dim=-1).unsqueeze(1)  # p
        self.cross_entropy_nS1 = log_sums_nS1 - (self.target_n1K * logits_nSK).sum(dim=-1, keepdim=True)
        self.cross_entropy_gradient_nSK = self.draft_nSK - self.target_n1K
        self._logits_nSK, self._log_sums_nS1 = logits_nSK, log_sums_nS1
        self._target_logits_nK, self._log_normalizer_n = target_logits_nK, log_normalizer_n

    def log_probabilities(self) -> tuple[Tensor, Tensor]:
        """log q [n, S, K], and log p [n, 1, K] of at least `LOWEST_LOG_PROBABILITY`."""
        log_draft_nSK = self._logits_nSK - self._log_sums_nS1
        log_target_n1K = self._target_logits_nK.log_softmax(dim=-1).unsqueeze(1)
        return log_draft_nSK, log_target_n1K.clamp(min=LOWEST_LOG_PROBABILITY)

    def total(self, terms_nSK: Tensor, slopes_nSK: Tensor) -> LossAndGradient:
        """The sum over tokens of terms f(q_j) with slopes f'(q_j), and its gradient q_j (f'_j - sum_i q_i f'_i)."""
        mean_slope_nS1 = (self.draft_nSK * slopes_nSK).sum(dim=-1, keepdim=True)
        return terms_nSK.sum(dim=-1, keepdim=True), self.draft_nSK * (slopes_nSK - mean_slope_nS1)

    def acceptance(self) -> LossAndGradient:
        """a and its gradient. Only tokens with q < P gain acceptance when q grows."""
        true_n1K = (self._target_logits_nK - self._log_normalizer_n.unsqueeze(-1)).exp().unsqueeze(1)  # P
        acceptance_nS1 = torch.minimum(true_n1K, self.draft_nSK).sum(dim=-1, keepdim=True)
        short_nSK = self.draft_nSK * (self.draft_nSK < true_n1K)
        return acceptance_nS1, short_nSK - self.draft_nSK * short_nSK.sum(dim=-1, keepdim=True)


def _soft_cross_entropy(rows: _Distributions) -> LossAndGradient:
    """-sum_j p_j log q_j, the classification loss of EAGLE (arXiv 2401.15077)."""
    return rows.cross_entropy_nS1, rows.cross_entropy_gradient_nSK


def _kl(rows: _Distributions) -> LossAndGradient:
    """sum_j p_j log(p_j / q_j): the gradient of the soft cross entropy, and 0 where q = p."""
    target_entropy_n11 = torch.special.entr(rows.target_n1K).sum(dim=-1, keepdim=True)
    return rows.cross_entropy_nS1 - target_entropy_n11, rows.cross_entropy_gradient_nSK


def _lk_alpha(rows: _Distributions) -> LossAndGradient:
    """-log a: the likelihood form of "LK Losses" (arXiv 2602.23881)."""
    acceptance_nS1, gradient_nSK = rows.acceptance()
    return -acceptance_nS1.log(), -gradient_nSK / acceptance_nS1


def _lk_lambda(rows: _Distributions) -> LossAndGradient:
    """w KL + (1 - w) (1 - a) with a constant w = exp(-3 a): the hybrid form of "LK Losses"."""
    divergence_nS1, divergence_gradient_nSK = _kl(rows)
    acceptance_nS1, acceptance_gradient_nSK = rows.acceptance()
    weight_nS1 = (-LAMBDA_DECAY * acceptance_nS1).exp()
    losses_nS1 = weight_nS1 * divergence_nS1 + (1 - weight_nS1) * (1 - acceptance_nS1)
    return losses_nS1, weight_nS1 * divergence_gradient_nSK - (1 - weight_nS1) * acceptance_gradient_nSK


def _reverse_kl(rows: _Distributions) -> LossAndGradient:
    """sum_j q_j log(q_j / p_j) (MiniLLM, arXiv 2306.08543): the draft avoids what the target would not say."""
    log_draft_nSK, log_target_n1K = rows.log_probabilities()
    # Without the + 1 of the slope, which the gradient cancels.
    slopes_nSK = log_draft_nSK - log_target_n1K
    return rows.total(rows.draft_nSK * slopes_nSK, slopes_nSK)


def _total_variation(rows: _Distributions) -> LossAndGradient:
    """sum_j |p_j - q_j| / 2: the rejected share if p were P (DistillSpec, arXiv 2310.08461)."""
    difference_nSK = rows.draft_nSK - rows.target_n1K
    return rows.total(difference_nSK.abs() / 2, difference_nSK.sign() / 2)


def _jensen_shannon(rows: _Distributions) -> LossAndGradient:
    """(KL(p, m) + KL(q, m)) / 2 with m = (p + q) / 2 (DistillSpec, arXiv 2310.08461)."""
    log_draft_nSK, log_target_n1K = rows.log_probabilities()
    log_mean_nSK = torch.logaddexp(log_draft_nSK, log_target_n1K) - math.log(2)
    slopes_nSK = (log_draft_nSK - log_mean_nSK) / 2
    of_target_nSK = rows.target_n1K * (log_target_n1K - log_mean_nSK) / 2
    return rows.total(rows.draft_nSK * slopes_nSK + of_target_nSK, slopes_nSK)


@dataclass(frozen=True, slots=True)
class Loss:
    """One loss: the reference and the flags of the Triton kernel that compute it.

    A loss with the flag ACCEPTANCE reads P, so it needs logits and log-normaliser of the target; the encoding
    `probs` has none. Only a loss that `mixes` may be blended with KL.
    """

    reference: Callable[[_Distributions], LossAndGradient]
    kernel_flags: tuple[str, ...] = ()  # of `fused.triton_losses.FLAGS`
    mixes: bool = False


LOSSES = {
    "soft_cross_entropy": Loss(_soft_cross_entropy),
    "kl": Loss(_kl, ("KL",)),
    "lk_alpha": Loss(_lk_alpha, ("ACCEPTANCE",)),
    "lk_lambda": Loss(_lk_lambda, ("KL", "ACCEPTANCE", "HYBRID")),
    "reverse_kl": Loss(_reverse_kl, ("KL", "REVERSE"), mixes=True),
    "total_variation": Loss(_total_variation, ("KL", "VARIATION"), mixes=True),
    "jensen_shannon": Loss(_jensen_shannon, ("KL", "SHANNON"), mixes=True),
}


def row_losses(
    loss: str,
    logits_nSK: Tensor,
    target_logits_nK: Tensor,
    log_normalizer_n: Tensor,
    kl_share: float = 0.0,
) -> tuple[Tensor, Tensor]:
    """Losses [n, S] and their gradients by the logits [n, S, K], in the logits' dtype (fp32 or fp64).

    `log_normalizer` is the target's over the full vocabulary. Of a loss that mixes, `kl_share` is KL.
    """
    rows = _Distributions(logits_nSK, target_logits_nK, log_normalizer_n)
    losses_nS1, gradient_nSK = LOSSES[loss].reference(rows)
    if kl_share:
        divergence_nS1, divergence_gradient_nSK = _kl(rows)
        losses_nS1 = kl_share * divergence_nS1 + (1 - kl_share) * losses_nS1
        gradient_nSK = kl_share * divergence_gradient_nSK + (1 - kl_share) * gradient_nSK
    return losses_nS1.squeeze(-1), gradient_nSK


def cross_entropy_from_probs(logits_nSK: Tensor, probs_nK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """`soft_cross_entropy` arranged for a CPU: losses [n, S], most likely ids [n, S], gradients [n, S, K]."""
    draft_probs_nSK = logits_nSK.softmax(dim=-1)
    predicted_nS1 = logits_nSK.argmax(dim=-1, keepdim=True)
    # One exact log a row instead of K: the largest probability never underflows.
    largest_nS1 = logits_nSK.gather(-1, predicted_nS1)
    log_sums_nS1 = largest_nS1 - draft_probs_nSK.gather(-1, predicted_nS1).log()
    expected_logit_nS1 = logits_nSK @ probs_nK.unsqueeze(-1)
    losses_nS1 = log_sums_nS1 * probs_nK.sum(-1)[:, None, None] - expected_logit_nS1
    return losses_nS1.squeeze(-1), predicted_nS1.squeeze(-1), draft_probs_nSK.sub_(probs_nK.unsqueeze(1))

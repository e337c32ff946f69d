"""The loss family: what one row of draft logits costs, and the gradient of that.

With p the target's distribution over the draft vocabulary, P its true probabilities (over the full vocabulary, so they sum to
less than 1 here), q the draft's and a = sum_j min(P_j, q_j) the chance that rejection sampling accepts the draft's token:

* `soft_cross_entropy`: -sum_j p_j log q_j.
* `kl`: sum_j p_j log(p_j / q_j); the same gradient, zero when the draft is right.
* `lk_alpha`: -log a, and `lk_lambda`: w KL + (1 - w) (1 - a) with w = exp(-3 a) of the row, taken as constant: the likelihood
  and the hybrid form of "LK Losses" (arXiv 2602.23881), which aim at acceptance itself.

Legend: n rows, S steps, K draft vocab.
"""

import torch
from torch import Tensor

LOSSES = ("soft_cross_entropy", "kl", "lk_alpha", "lk_lambda")
# Those that read the true probabilities, hence need the target's logits and log-normaliser.
ACCEPTANCE_LOSSES = ("lk_alpha", "lk_lambda")
# How fast `lk_lambda` turns from KL to acceptance as acceptance grows.
LAMBDA_DECAY = 3.0


def row_losses(
    loss: str, logits_nSK: Tensor, target_logits_nK: Tensor, log_normalizer_n: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses [n, S] and their gradients by the logits [n, S, K], in the logits' dtype (fp32 or wider).

    `log_normalizer` is the target's over the full vocabulary; acceptance losses alone read it.
    """
    log_sums_nS1 = logits_nSK.logsumexp(dim=-1, keepdim=True)
    draft_nSK = (logits_nSK - log_sums_nS1).exp()
    target_n1K = target_logits_nK.softmax(dim=-1).unsqueeze(1)
    losses_nS1 = log_sums_nS1 - (target_n1K * logits_nSK).sum(dim=-1, keepdim=True)
    gradient_nSK = draft_nSK - target_n1K
    if loss == "soft_cross_entropy":
        return losses_nS1.squeeze(-1), gradient_nSK
    losses_nS1 = losses_nS1 - torch.special.entr(target_n1K).sum(dim=-1, keepdim=True)
    if loss == "kl":
        return losses_nS1.squeeze(-1), gradient_nSK
    true_n1K = (target_logits_nK - log_normalizer_n.unsqueeze(-1)).exp().unsqueeze(1)
    acceptance_nS1 = torch.minimum(true_n1K, draft_nSK).sum(dim=-1, keepdim=True)
    # More of q is accepted where q is the smaller of the two.
    short_nSK = draft_nSK * (draft_nSK < true_n1K)
    acceptance_gradient_nSK = short_nSK - draft_nSK * short_nSK.sum(dim=-1, keepdim=True)
    if loss == "lk_alpha":
        return -acceptance_nS1.log().squeeze(-1), -acceptance_gradient_nSK / acceptance_nS1
    assert loss == "lk_lambda", f"loss must be one of {LOSSES}, got {loss}"
    weight_nS1 = (-LAMBDA_DECAY * acceptance_nS1).exp()
    losses_nS1 = weight_nS1 * losses_nS1 + (1 - weight_nS1) * (1 - acceptance_nS1)
    return losses_nS1.squeeze(-1), weight_nS1 * gradient_nSK - (1 - weight_nS1) * acceptance_gradient_nSK

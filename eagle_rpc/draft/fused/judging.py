"""The draft's last norm, its head and the loss, with their gradients, over chunks of rows.

Only the logits of one chunk exist, in the compute dtype; their gradients replace them.
Legend: N rows, n rows of a chunk, S steps, M = n S pairs of a chunk's row and a step, H hidden, K draft
vocab.
"""

import torch
from torch import Tensor

from eagle_rpc.draft.chunked_loss import JudgedRows, row_chunks
from eagle_rpc.draft.fused import formulas
from eagle_rpc.draft.fused.weights import FusedWeights, add_weight_gradient
from eagle_rpc.draft.model import Eagle3Draft

# Logits of a chunk in bytes: large matrix products, and little memory compared with that of the unroll.
_CHUNK_BYTES = 2**30


def judge(
    draft: Eagle3Draft,
    weights: FusedWeights,
    rows: JudgedRows,
    places_NS: Tensor,
    hidden_SNH: Tensor,
    hidden_grads_SNH: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Losses [N, S] and most likely draft ids [N, S].

    `places` are indices into the flat hidden states, equal only where coefficients are 0. If `hidden_grads`
    (zeros in the shape of `hidden`) is given, it receives the gradients of the sum of
    coefficient times loss, and those of norm and head are added to theirs.
    """
    hidden_MH = hidden_SNH.flatten(0, 1)
    losses_NS, predicted_NS = torch.empty_like(rows.coefficients), torch.empty_like(places_NS)
    norm = (weights.last_norm, draft.config.rms_norm_eps)
    steps, vocab = places_NS.shape[1], len(weights.head)
    for chunk in row_chunks(len(places_NS), weights.head.element_size() * vocab * steps, _CHUNK_BYTES):
        places_M = places_NS[chunk].flatten()
        judged_MH = hidden_MH[places_M]
        normed_MH = formulas.rms_norm(judged_MH, *norm)
        logits_nSK = (normed_MH @ weights.head.t()).view(*places_NS[chunk].shape, -1)
        losses_NS[chunk], predicted_NS[chunk] = formulas.judge_rows_(
            logits_nSK,
            rows.targets.logits(chunk),
            rows.log_normalizer[chunk],
            rows.coefficients[chunk],
            rows.loss,
        )
        if hidden_grads_SNH is not None:
            logit_grads_MK = logits_nSK.flatten(0, 1)
            add_weight_gradient(weights.gradient_of(draft.lm_head.weight), logit_grads_MK, normed_MH)
            grads_MH = logit_grads_MK @ weights.head
            norm_grad = weights.gradient_of(draft.norm.weight)
            formulas.rms_norm_backward(grads_MH, judged_MH, norm, norm_grad, None, grads_MH)
            hidden_grads_SNH.flatten(0, 1).index_copy_(0, places_M, grads_MH)
    return losses_NS, predicted_NS

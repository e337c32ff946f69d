"""The draft's last norm, its head and the loss, over chunks of supervised rows, with gradients formed beside the loss.

Logits of one chunk exist at a time, in the compute dtype; their gradients take their place. The target's probabilities
are derived where they are read.
Legend: N supervised rows, n rows of a chunk, S steps, M rows and steps, H hidden, K draft vocab.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_rpc.draft.fused import formulas
from eagle_rpc.draft.fused.weights import FusedWeights, add_weight_gradient
from eagle_rpc.draft.model import Eagle3Draft
from eagle_rpc.supervision import DraftTargets

# Bytes of a chunk's logits: long matrix products, and little memory beside the unroll's.
_CHUNK_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, slots=True)
class JudgedRows:
    """Supervised rows of a batch: where the draft's hidden states stand that they judge, and with what weight."""

    places: Tensor  # [N, S] int64, rows of the flat hidden states; shared only where coefficients are zero
    coefficients: Tensor  # [N, S] fp32 (fp64 for fp64 weights), factors of the losses
    targets: DraftTargets
    log_normalizer: Tensor  # [N] fp32


def judge(
    draft: Eagle3Draft,
    weights: FusedWeights,
    loss: str,
    rows: JudgedRows,
    hidden_SNH: Tensor,
    hidden_grads_SNH: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Losses [N, S] and most likely draft ids [N, S].

    With `hidden_grads` (zeros, shaped like `hidden`) stores there the gradient of the sum of coefficient times loss, and
    adds to those of norm and head.
    """
    hidden_MH = hidden_SNH.flatten(0, 1)
    losses_NS, predicted_NS = torch.empty_like(rows.coefficients), torch.empty_like(rows.places)
    norm = (weights.last_norm, draft.config.rms_norm_eps)
    for chunk in _row_chunks(rows.places, weights.head):
        places_M = rows.places[chunk].flatten()
        judged_MH = hidden_MH[places_M]
        normed_MH = formulas.rms_norm(judged_MH, *norm)
        logits_nSK = (normed_MH @ weights.head.t()).view(*rows.places[chunk].shape, -1)
        losses_NS[chunk], predicted_NS[chunk] = formulas.judge_rows_(
            logits_nSK, rows.targets.logits(chunk), rows.log_normalizer[chunk], rows.coefficients[chunk], loss
        )
        if hidden_grads_SNH is not None:
            logit_grads_MK = logits_nSK.flatten(0, 1)
            add_weight_gradient(weights.gradient_of(draft.lm_head.weight), logit_grads_MK, normed_MH)
            grads_MH = logit_grads_MK @ weights.head
            formulas.rms_norm_backward(
                grads_MH, judged_MH, norm, weights.gradient_of(draft.norm.weight), None, grads_MH
            )
            hidden_grads_SNH.flatten(0, 1).index_copy_(0, places_M, grads_MH)
    return losses_NS, predicted_NS


def _row_chunks(places_NS: Tensor, head_KH: Tensor) -> Iterator[slice]:
    rows, steps = places_NS.shape
    size = max(1, _CHUNK_BYTES // (head_KH.element_size() * len(head_KH) * steps))
    for start in range(0, rows, size):
        yield slice(start, start + size)

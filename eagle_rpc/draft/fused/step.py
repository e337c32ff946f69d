"""One micro-batch through the fused TTT step: the loss, and its gradients added to those of the parameters.

Legend: B batch, T sequence, N rows (in `_unroll` slots B T), n rows of a chunk, L live slots, S steps, M = n S
pairs of a chunk's row and a step, H hidden, W width of all captured states, K draft vocab.
"""

import logging
from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor

from eagle_rpc.draft.chunked_loss import JudgedRows, row_chunks
from eagle_rpc.draft.fused import formulas
from eagle_rpc.draft.fused.causal_attention import MAX_HEAD_DIM
from eagle_rpc.draft.fused.slot_plan import SlotPlan
from eagle_rpc.draft.fused.unroll import FusedUnroll
from eagle_rpc.draft.fused.weights import FusedWeights
from eagle_rpc.draft.live_slots import index_among
from eagle_rpc.draft.model import Eagle3Draft
from eagle_rpc.draft.ttt import Objective, TTTResult, judged_slots, positions_of, result_of
from eagle_rpc.errors import ConfigError
from eagle_rpc.supervision import Eagle3TargetBatch

logger = logging.getLogger(__name__)

# Logits of a chunk in bytes: large matrix products, and little memory compared with that of the unroll.
_CHUNK_BYTES = 2**30


class FusedStep:
    """`ReferenceStep` for a GPU: no autograd graph, no [T, T] matrix, no [B, T, K] tensor.

    Matrix products run in `dtype` on copies of the weights, with `fp8` the large ones as in `Fp8Products`;
    gradients are summed in the dtype of the parameters. `recompute_mlp` needs a third less memory for a batch
    and a tenth more time. `gradients` are the tensors, by parameter name, to which gradients are added; None:
    the parameters' own. If the draft's parameters are DTensors, all trainers have to construct and refresh
    together.
    """

    reads_draft = False

    def __init__(
        self,
        draft: Eagle3Draft,
        objective: Objective,
        *,
        dtype: torch.dtype,
        recompute_mlp: bool,
        fp8: bool = False,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        window = draft.config.sliding_window
        if draft.config.num_layers > 1 or (window is not None and window < objective.steps):
            raise ConfigError(
                "the fused step must have a draft of one layer, with a sliding window of at least "
                f"draft.ttt_steps {objective.steps} tokens or none, got {draft.config.num_layers} and {window}"
            )
        self._draft, self._objective, self._recompute_mlp = draft, objective, recompute_mlp
        self._weights = FusedWeights(draft, dtype, gradients, fp8=fp8)

    @staticmethod
    def supports(draft: Eagle3Draft, dtype: torch.dtype) -> bool:
        """Whether this draft runs so on its device in `dtype`; what alone keeps it from a GPU is logged."""
        if not (draft.fc.weight.is_cuda and dtype is torch.bfloat16):
            return False
        head_dim, num_layers = draft.config.head_dim, draft.config.num_layers
        attends = head_dim % 8 == 0 and head_dim <= MAX_HEAD_DIM
        if num_layers > 1 or not attends:
            logger.warning(
                "this draft trains by the reference step, which is slower: the fused one takes one layer, this "
                "draft has %d, and heads of a multiple of 8 up to %d, it has %d",
                num_layers,
                MAX_HEAD_DIM,
                head_dim,
            )
        return num_layers == 1 and attends

    def refresh_weights(self) -> None:
        self._weights.refresh()

    def add_gradients(self, batch: Eagle3TargetBatch, denominators_S: Tensor) -> TTTResult:
        return self._run(batch, denominators_S, with_gradients=True)

    def judge(self, batch: Eagle3TargetBatch, denominators_S: Tensor) -> TTTResult:
        return self._run(batch, denominators_S, with_gradients=False)

    @torch.no_grad()
    def _run(self, batch: Eagle3TargetBatch, denominators_S: Tensor, with_gradients: bool) -> TTTResult:
        slots_NS, valid_NS = judged_slots(batch, self._objective.steps)
        rows = self._objective.rows_of(batch, valid_NS, denominators_S)
        accurate = torch.promote_types(self._weights.head.dtype, torch.float32)
        rows = replace(rows, coefficients=rows.coefficients.to(accurate))
        plan = SlotPlan.of(batch.tokens, self._objective.steps, slots_NS.device)
        places_NS = _places(index_among(plan.live, slots_NS), valid_NS, len(plan.live))
        # Triton launches on the current device, not on that of its tensors.
        with torch.cuda.device_of(self._weights.head):
            unroll = self._unroll(batch, plan, with_gradients)
            hidden_grads_SLH = torch.zeros_like(unroll.hidden_SLH) if with_gradients else None
            losses_NS, predicted_NS = self._judge(rows, places_NS, unroll.hidden_SLH, hidden_grads_SLH)
            if hidden_grads_SLH is not None:
                unroll.backward(hidden_grads_SLH)
        loss = (losses_NS * rows.coefficients).sum()
        return result_of(batch, loss, losses_NS, predicted_NS, slots_NS, valid_NS)

    def _unroll(self, batch: Eagle3TargetBatch, plan: SlotPlan, with_gradients: bool) -> FusedUnroll:
        """The forward pass of all steps."""
        # Only the backward pass reads gate and up again.
        recompute_mlp = self._recompute_mlp or not with_gradients
        unroll = FusedUnroll(self._draft, self._weights, plan, self._objective.steps, recompute_mlp)
        aux_NW = batch.aux_hidden_states.flatten(0, 1).to(unroll.hidden_SLH.dtype)
        positions_N = positions_of(batch).expand_as(batch.input_ids).flatten()
        unroll.forward(aux_NW, batch.input_ids, positions_N)
        return unroll

    def _judge(
        self, rows: JudgedRows, places_NS: Tensor, hidden_SLH: Tensor, hidden_grads_SLH: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Losses [N, S] and most likely draft ids [N, S], by last norm, head and loss over chunks of rows.

        `places` are indices into the flat hidden states, equal only where coefficients are 0. If
        `hidden_grads` (zeros in the shape of `hidden`) is given, it receives the gradients of the sum of
        coefficient times loss, and those of norm and head are added to theirs. Only the logits of one chunk
        exist, in the compute dtype; their gradients replace them.
        """
        draft, weights, hidden_MH = self._draft, self._weights, hidden_SLH.flatten(0, 1)
        losses_NS, predicted_NS = torch.empty_like(rows.coefficients), torch.empty_like(places_NS)
        norm = (weights.last_norm, draft.config.rms_norm_eps)
        steps, vocab = places_NS.shape[1], len(weights.head)
        for chunk in row_chunks(len(places_NS), weights.head.element_size() * vocab * steps, _CHUNK_BYTES):
            places_M = places_NS[chunk].flatten()
            judged_MH = hidden_MH[places_M]
            normed_MH = formulas.rms_norm(judged_MH, *norm)
            logits_MK = weights.products.forward(normed_MH, weights.head)
            logits_nSK = logits_MK.view(*places_NS[chunk].shape, -1)
            losses_NS[chunk], predicted_NS[chunk] = formulas.judge_rows_(
                logits_nSK,
                rows.targets.logits(chunk),
                rows.log_normalizer[chunk],
                rows.coefficients[chunk],
                rows.loss,
                rows.kl_share,
            )
            if hidden_grads_SLH is not None:
                head_grad = weights.gradient_of(draft.lm_head.weight)
                weights.products.add_weight_gradients([(head_grad, logits_MK)], normed_MH)
                grads_MH = weights.products.input_gradient(logits_MK, weights.head)
                norm_grad = weights.gradient_of(draft.norm.weight)
                formulas.rms_norm_backward(grads_MH, judged_MH, norm, norm_grad, None, grads_MH)
                hidden_grads_SLH.flatten(0, 1).index_copy_(0, places_M, grads_MH)
        return losses_NS, predicted_NS


def _places(live_NS: Tensor, valid_NS: Tensor, num_live: int) -> Tensor:
    """Index into [(S + 1) L] of the state that each row judges at each step; step k is entry k + 1.

    `live` are indices of live slots. Pairs without a slot get index 0, which no loss reads.
    """
    steps_1S = torch.arange(1, live_NS.shape[1] + 1, device=live_NS.device)[None]
    return (steps_1S * num_live + live_NS) * valid_NS

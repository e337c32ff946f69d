"""One micro-batch through the fused TTT step: the loss, and gradients added where parameters keep them.

Legend: B batch, T sequence, U = T + S - 1, N supervised rows, S steps, H hidden.
"""

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.draft.fused.causal import MAX_HEAD_DIM, Segments
from eagle_rpc.draft.fused.head import JudgedRows, judge
from eagle_rpc.draft.fused.unroll import FusedUnroll
from eagle_rpc.draft.fused.weights import FusedWeights
from eagle_rpc.draft.model import Eagle3Draft
from eagle_rpc.draft.ttt import Objective, TTTResult, judged_slots, positions_of, result_of
from eagle_rpc.supervision import Eagle3TargetBatch


class FusedStep:
    """`ttt_loss` and its backward in one, for a GPU: no autograd graph, no [T, T] matrix, no [B, T, K] tensor.

    Matrix products run in `dtype` on copies of the weights, gradients are summed in the parameters' dtype. `recompute_mlp`
    saves a third of the memory of a batch for a tenth more time. `gradients` are whole ones by parameter name that are
    added to; null: those of the parameters. The draft's parameters may be DTensors: then all trainers have to construct
    and refresh at the same time.
    """

    reads_draft = False

    def __init__(
        self,
        draft: Eagle3Draft,
        objective: Objective,
        *,
        dtype: torch.dtype,
        recompute_mlp: bool,
        gradients: Mapping[str, Tensor] | None = None,
    ) -> None:
        self._draft, self._objective, self._recompute_mlp = draft, objective, recompute_mlp
        self._weights = FusedWeights(draft, dtype, gradients)

    @staticmethod
    def supports(draft: Eagle3Draft, dtype: torch.dtype) -> bool:
        """Whether flash attention runs this draft where it is, in this format."""
        head_dim = draft.config.head_dim
        return (
            draft.fc.weight.is_cuda
            and dtype is torch.bfloat16
            and head_dim % 8 == 0
            and head_dim <= MAX_HEAD_DIM
        )

    def refresh_weights(self) -> None:
        """To be called when the draft has changed."""
        self._weights.refresh()

    def add_gradients(self, batch: Eagle3TargetBatch, denominators_S: Tensor) -> TTTResult:
        """`ttt_loss` without graph; its gradients are added to the `gradients`."""
        with self._on_device():
            return self._run(batch, denominators_S, with_gradients=True)

    def judge(self, batch: Eagle3TargetBatch, denominators_S: Tensor) -> TTTResult:
        """`ttt_loss` alone."""
        with self._on_device():
            return self._run(batch, denominators_S, with_gradients=False)

    def _on_device(self) -> torch.cuda.device_of:
        """Triton launches on the current device, wherever its tensors are."""
        return torch.cuda.device_of(self._weights.head)

    @torch.no_grad()
    def _run(self, batch: Eagle3TargetBatch, denominators_S: Tensor, with_gradients: bool) -> TTTResult:
        steps = self._objective.steps
        unroll = self._unroll(batch, with_gradients)
        slots_NS, valid_NS = judged_slots(batch, steps)
        accurate = torch.promote_types(self._weights.head.dtype, torch.float32)
        coefficients_NS = (valid_NS * self._objective.scales(denominators_S)).to(accurate)
        hidden_grads_SNH = torch.zeros_like(unroll.hidden_SNH) if with_gradients else None
        rows = JudgedRows(
            places=_places(slots_NS, valid_NS, batch),
            coefficients=coefficients_NS,
            targets=batch.targets,
            log_normalizer=batch.log_normalizer,
        )
        losses_NS, predicted_NS = judge(
            self._draft, self._weights, self._objective.loss, rows, unroll.hidden_SNH, hidden_grads_SNH
        )
        if hidden_grads_SNH is not None:
            unroll.backward(hidden_grads_SNH)
        return result_of(
            batch, (losses_NS * coefficients_NS).sum(), losses_NS, predicted_NS, slots_NS, valid_NS
        )

    def _unroll(self, batch: Eagle3TargetBatch, with_gradients: bool) -> FusedUnroll:
        """All steps, run forward."""
        steps = self._objective.steps
        segment_ids = batch.tokens.segment_ids
        segments = None if segment_ids is None else Segments.of(segment_ids)
        # Without a backward there is nothing to keep gate and up for.
        recompute_mlp = self._recompute_mlp or not with_gradients
        unroll = FusedUnroll(self._draft, self._weights, batch.tokens.shape, steps, segments, recompute_mlp)
        positions_BT = positions_of(batch)
        unroll.forward(
            batch.aux_hidden_states.flatten(0, 1).to(unroll.hidden_SNH.dtype),
            F.pad(batch.input_ids, (0, steps - 1)),
            [self._draft.rotary.tables(positions_BT + step) for step in range(steps)],
        )
        return unroll


def _places(slots_NS: Tensor, valid_NS: Tensor, batch: Eagle3TargetBatch) -> Tensor:
    """Where the hidden state of each row and step stands in [(S + 1) B T]: step k's output is entry k + 1.

    Pairs that are not judged go to place 0, which no loss reads.
    """
    steps_1S = torch.arange(1, slots_NS.shape[1] + 1, device=slots_NS.device)[None]
    return (steps_1S * batch.input_ids.numel() + slots_NS) * valid_NS

"""Attention of the TTT steps without a [T, T] matrix: flash attention over step 0, merged with own slots.

The backward of flash attention rebuilds the softmax from its output and log-sum. Given those of the merged
softmax, it yields the gradients through the causal keys; the gradients through own slots are elementwise.
Legend: B batch, T sequence, S steps, L live slots, I idle slots, M keys of attention, Q query heads, J key
heads, D head width.
"""

import torch
from torch import Tensor

from eagle_rpc.draft.fused.causal_attention import causal_attention, causal_attention_backward
from eagle_rpc.draft.fused.formulas import widened
from eagle_rpc.draft.fused.own_slots import StepHeads, merge, merge_backward
from eagle_rpc.draft.fused.slot_plan import SlotPlan


class StepAttention:
    """Attention of all steps over the slots of one batch.

    The caller fills keys and values, side by side, of live slots step by step, and of idle slots before step
    0. `backward` takes the steps in reverse.
    """

    def __init__(self, plan: SlotPlan, live_SLJ2D: Tensor, idle_IJ2D: Tensor, window: int | None) -> None:
        """`window`: at least as many tokens as steps, so that a query attends to all later keys of its slot."""
        self._plan, self._window = plan, window
        self._live, self._idle = live_SLJ2D, idle_IJ2D
        self._scale = live_SLJ2D.shape[-1] ** -0.5
        self._heads: list[StepHeads] = []
        self._step_0_grads_MJ2D: Tensor | None = None

    def forward(self, queries_LQD: Tensor, out_LQD: Tensor) -> None:
        """Stores the attended values of the next step in `out_LQD`."""
        if not self._heads:
            self._step_0_MJ2D = self._live[0]
            if not self._plan.all_live:
                self._step_0_MJ2D = torch.cat((self._live[0], self._idle))[self._plan.key_sources]
        causal_BTQD, log_sums_BQT = causal_attention(
            self._inputs(queries_LQD), self._scale, self._plan.blocks, self._window_left(len(self._heads))
        )
        out_LQD.copy_(self._collect(causal_BTQD))
        keys_SLJD, values_SLJD = self._live.chunk(2, dim=2)
        heads = StepHeads(
            step=len(self._heads),
            scale=self._scale,
            queries=queries_LQD,
            keys=keys_SLJD,
            values=values_SLJD,
            out=out_LQD,
            log_sums=self._collect(log_sums_BQT.transpose(1, 2)).t().contiguous()[None],
        )
        merge(heads)
        self._heads.append(heads)

    def backward(self, out_grads_LQD: Tensor, key_value_grads_SLJ2D: Tensor) -> Tensor:
        """Gradient of the last remaining step's queries; adds to those of keys and values of later steps."""
        heads = self._heads.pop()
        if self._step_0_grads_MJ2D is None:
            self._step_0_grads_MJ2D = torch.zeros_like(self._step_0_MJ2D)
        log_sums_BQT = self._spread(heads.log_sums[0].t()).transpose(1, 2).contiguous()
        grads = causal_attention_backward(
            self._spread(out_grads_LQD),
            self._inputs(heads.queries),
            self._spread(heads.out),
            log_sums_BQT,
            self._scale,
            self._plan.blocks,
            self._window_left(heads.step),
        )
        query_grads_LQD = self._collect(grads[0])
        for total_MJD, grad_BMJD in zip(self._step_0_grads_MJ2D.chunk(2, dim=1), grads[1:], strict=True):
            total_MJD += grad_BMJD.flatten(0, 1)
        key_grads_SLJD, value_grads_SLJD = key_value_grads_SLJ2D.chunk(2, dim=2)
        merge_backward(heads, out_grads_LQD, query_grads_LQD, (key_grads_SLJD, value_grads_SLJD))
        return query_grads_LQD

    def _window_left(self, step: int) -> int | None:
        """Keys of step 0 before a slot that its query of this step attends to."""
        return None if self._window is None else self._window - 1 - step

    def step_0_grads(self) -> tuple[Tensor, Tensor]:
        """Gradients of step 0's keys and values, after its backward: of live slots, and of idle ones."""
        sizes, grads = (len(self._plan.live), len(self._idle)), self._step_0_grads_MJ2D
        assert grads is not None, "backward comes first"
        if not self._plan.all_live:
            # Several blocks may have copies of one key.
            wide = widened(grads)
            sums = wide.new_zeros(sum(sizes), *wide.shape[1:])
            grads = sums.index_add_(0, self._plan.key_sources, wide).to(grads.dtype)
        live_grads, idle_grads = grads.split(sizes)
        return live_grads, idle_grads

    def _inputs(self, queries_LQD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and the keys and values of step 0, in sequences."""
        sequences = (1, -1) if self._plan.blocks is not None else self._plan.shape
        keys, values = self._step_0_MJ2D.unflatten(0, sequences).chunk(2, dim=2)
        return self._spread(queries_LQD), keys, values

    def _spread(self, x_LQD: Tensor) -> Tensor:
        """[B, T, Q, D] as attention takes it: in whole sequences, zeros at slots that are not live."""
        if self._plan.blocks is not None:
            return x_LQD[None]
        if not self._plan.all_live:
            shape, slots = self._plan.shape, self._plan.live
            x_LQD = x_LQD.new_zeros(shape[0] * shape[1], *x_LQD.shape[1:]).index_copy_(0, slots, x_LQD)
        return x_LQD.unflatten(0, self._plan.shape)

    def _collect(self, x_BTQD: Tensor) -> Tensor:
        """Live slots [L, Q, D] of what `_spread` has made."""
        x_NQD = x_BTQD.flatten(0, 1)
        spread = self._plan.blocks is None and not self._plan.all_live
        return x_NQD.index_select(0, self._plan.live) if spread else x_NQD

"""Attention of the TTT steps without a [T, T] matrix: flash attention over step 0, merged with later steps' own slots.

Flash attention's backward only needs the softmax's output and the log of its sum to rebuild any part of it. So it gets the
merged ones and yields the causal part's gradients; those of the own slots are elementwise.
Legend: B batch, T sequence, N = B T slots, Q query heads, J key heads, D head width, S steps.
"""

from torch import Tensor

from eagle_rpc.draft.fused.causal import Segments, causal_attention, causal_attention_backward
from eagle_rpc.draft.fused.own_slots import StepHeads, merge, merge_backward


class StepAttention:
    """Attention of all steps over the slots [B, T] of one batch.

    Keys and values [S, N, J, D] fill up as the steps run; so do their gradients in `backward`, which takes the steps in
    reverse.
    """

    def __init__(
        self, shape: tuple[int, int], segments: Segments | None, keys_SNJD: Tensor, values_SNJD: Tensor
    ) -> None:
        self._rows = shape if segments is None else (1, shape[0] * shape[1])
        self._segments = segments
        self._keys, self._values = keys_SNJD, values_SNJD
        self._scale = keys_SNJD.shape[-1] ** -0.5
        self._heads: list[StepHeads] = []

    def forward(self, queries_NQD: Tensor, out_NQD: Tensor) -> None:
        """Stores the next step's attended values in `out_NQD`."""
        causal_BTQD, log_sums_BQT = causal_attention(
            *self._in_rows(queries_NQD, *self._step_0()), self._scale, self._segments
        )
        out_NQD.copy_(causal_BTQD.flatten(0, 1))
        heads = StepHeads(
            step=len(self._heads),
            scale=self._scale,
            queries=queries_NQD,
            keys=self._keys,
            values=self._values,
            out=out_NQD,
            log_sums=log_sums_BQT,
        )
        merge(heads)
        self._heads.append(heads)

    def backward(self, out_grads_NQD: Tensor, key_value_grads: tuple[Tensor, Tensor]) -> Tensor:
        """Gradient of the last remaining step's queries [N, Q, D]; adds to those of keys and values [S, N, J, D]."""
        heads = self._heads.pop()
        out_grads_BTQD, out_BTQD = self._in_rows(out_grads_NQD, heads.out)
        inputs = self._in_rows(heads.queries, *self._step_0())
        grads = causal_attention_backward(
            out_grads_BTQD, inputs, out_BTQD, heads.log_sums, self._scale, self._segments
        )
        query_grads_NQD, *of_step_0 = (grad.flatten(0, 1) for grad in grads)
        for total_SNJD, grad_NJD in zip(key_value_grads, of_step_0, strict=True):
            total_SNJD[0] += grad_NJD
        merge_backward(heads, out_grads_NQD, query_grads_NQD, key_value_grads)
        return query_grads_NQD

    def _step_0(self) -> tuple[Tensor, Tensor]:
        return self._keys[0], self._values[0]

    def _in_rows(self, *heads_NQD: Tensor) -> tuple[Tensor, ...]:
        return tuple(heads.unflatten(0, self._rows) for heads in heads_NQD)

"""Attention of the TTT steps without a [T, T] matrix: flash attention over step 0, merged with own slots.

The backward of flash attention rebuilds the softmax from its output and log-sum. Given those of the merged
softmax, it yields the gradients through the causal keys; the gradients through own slots are elementwise.
Legend: B batch, T sequence, N = B T slots, Q query heads, J key heads, D head width, S steps.
"""

from torch import Tensor

from eagle_rpc.draft.fused.causal_attention import causal_attention, causal_attention_backward
from eagle_rpc.draft.fused.own_slots import StepHeads, merge, merge_backward
from eagle_rpc.supervision.segments import ChatBoundaries


class StepAttention:
    """Attention of all steps over the slots [B, T] of one batch.

    The caller fills keys and values [S, N, J, D] step by step. `backward` takes the steps in reverse.
    """

    def __init__(
        self, shape: tuple[int, int], chats: ChatBoundaries | None, keys_SNJD: Tensor, values_SNJD: Tensor
    ) -> None:
        # Packed chats are one sequence to flash attention, with boundaries in it.
        self._sequences = shape if chats is None else (1, shape[0] * shape[1])
        self._chats = chats
        self._keys, self._values = keys_SNJD, values_SNJD
        self._scale = keys_SNJD.shape[-1] ** -0.5
        self._heads: list[StepHeads] = []

    def forward(self, queries_NQD: Tensor, out_NQD: Tensor) -> None:
        """Stores the attended values of the next step in `out_NQD`."""
        causal_BTQD, log_sums_BQT = causal_attention(self._inputs(queries_NQD), self._scale, self._chats)
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
        """Gradient of the last remaining step's queries; adds to those of keys and values [S, N, J, D]."""
        heads = self._heads.pop()
        out_grads_BTQD, out_BTQD = self._in_sequences(out_grads_NQD), self._in_sequences(heads.out)
        inputs = self._inputs(heads.queries)
        grads = causal_attention_backward(
            out_grads_BTQD, inputs, out_BTQD, heads.log_sums, self._scale, self._chats
        )
        query_grads_NQD, *of_step_0 = (grad.flatten(0, 1) for grad in grads)
        for total_SNJD, grad_NJD in zip(key_value_grads, of_step_0, strict=True):
            total_SNJD[0] += grad_NJD
        merge_backward(heads, out_grads_NQD, query_grads_NQD, key_value_grads)
        return query_grads_NQD

    def _inputs(self, queries_NQD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, and the keys and values of step 0, in sequences."""
        keys, values = self._in_sequences(self._keys[0]), self._in_sequences(self._values[0])
        return self._in_sequences(queries_NQD), keys, values

    def _in_sequences(self, heads_NQD: Tensor) -> Tensor:
        return heads_NQD.unflatten(0, self._sequences)

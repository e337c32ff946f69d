"""The draft layer over all TTT steps, forward and backward; each kept tensor has one buffer for all steps.

It equals autograd over `Eagle3Draft.advance` to rounding. Three differences make it fast:

* Step k embeds the tokens of step 0, shifted by k. So embeddings are normed and projected to queries, keys,
  and values once, and each step adds its slice to the projection of its hidden states.
* A weight gradient is one product over the slots of several steps, added to the gradient inside the product.
* Backward overwrites each kept tensor after its last use: gate and up, and queries, keys and values, by their
  gradients, hidden states by their norms.

Legend: B batch, T sequence, N = B T slots, S steps, H hidden, Q width of all queries, J of all keys, P = Q +
2 J, I feed-forward width, D head width, U = T + S - 1, M = B U.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.draft.fused import formulas
from eagle_rpc.draft.fused.step_attention import StepAttention
from eagle_rpc.draft.fused.weights import FusedWeights, add_weight_gradient
from eagle_rpc.draft.model import Eagle3Draft
from eagle_rpc.draft.rope import RopeTables
from eagle_rpc.supervision.segments import ChatBoundaries

# Slots that keep a GPU busy in one product. If a step has fewer, the weight gradients of several steps are
# one product.
_SLOTS_OF_A_PRODUCT = 32768


class FusedUnroll:
    """One batch through all steps: `forward`, then `backward` once.

    `hidden_SNH` [S + 1, N, H] holds the fused input and the output of each step until `backward` begins. With
    `recompute_mlp` the backward computes gate and up again instead of keeping those of all steps.
    """

    def __init__(
        self,
        draft: Eagle3Draft,
        weights: FusedWeights,
        shape: tuple[int, int],
        steps: int,
        chats: ChatBoundaries | None,
        recompute_mlp: bool,
    ) -> None:
        self._draft, self._weights = draft, weights
        self._layer, self._eps = draft.midlayer, draft.config.rms_norm_eps
        self._gradient_of = weights.gradient_of
        self._shape, self._steps = shape, steps
        self._slots = shape[0] * shape[1]
        # Steps whose weight gradients are computed in one product.
        self._together = 1 if recompute_mlp else min(steps, -(-_SLOTS_OF_A_PRODUCT // self._slots))
        self._recompute_mlp = recompute_mlp
        hidden_size, query_width = weights.output.shape
        self._query_width, self._key_width = query_width, (len(weights.qkv_of_hidden) - query_width) // 2
        self.hidden_SNH = self._empty(steps + 1, hidden_size)
        self._qkv = self._empty(steps, len(weights.qkv_of_hidden))
        self._attended = self._empty(steps, query_width)
        self._middle = self._empty(steps, hidden_size)  # between attention and feed-forward
        self._gate_up = self._empty(1 if recompute_mlp else steps, len(weights.gate_up))
        keys, values = self._in_heads(self._qkv[..., query_width:]).chunk(2, dim=2)
        self._attention = StepAttention(shape, chats, keys, values)

    def forward(self, aux_NH3: Tensor, ids_BU: Tensor, tables: list[RopeTables]) -> None:
        """Runs all steps. `ids` [B, T + S - 1] start with those of step 0; `tables` has one entry a step."""
        self._aux, self._ids, self._tables = aux_NH3, ids_BU, tables
        torch.mm(aux_NH3, self._weights.fuse.t(), out=self.hidden_SNH[0])
        embeds_MH = formulas.rms_norm(self._embeds(), self._weights.embeds_norm, self._eps)
        embed_part_BUP = (embeds_MH @ self._weights.qkv_of_embeds.t()).view(*ids_BU.shape, -1)
        for step in range(self._steps):
            self._forward_step(step, embed_part_BUP[:, step : step + self._shape[1]])

    def _forward_step(self, step: int, embed_part_BTP: Tensor) -> None:
        layer, weights = self._layer, self._weights
        hidden_NH, middle_NH = self.hidden_SNH[step], self._middle[step]
        normed_NH = formulas.rms_norm(hidden_NH, weights.hidden_norm, self._eps)
        hidden_part_BTP = (normed_NH @ weights.qkv_of_hidden.t()).view(*self._shape, -1)
        tables, qkv_BTP = self._tables[step], self._qkv_of(step)
        formulas.add_and_rotate(hidden_part_BTP, embed_part_BTP, tables, self._key_width, qkv_BTP)
        self._attention.forward(self._queries_of(step), self._in_heads(self._attended[step]))
        residual_NH = normed_NH if layer.norm_before_residual else hidden_NH
        torch.addmm(residual_NH, self._attended[step], weights.output.t(), out=middle_NH)
        normed_NH = formulas.rms_norm(middle_NH, weights.middle_norm, self._eps)
        gate_up_NI2 = self._gate_up[step % len(self._gate_up)]
        torch.mm(normed_NH, weights.gate_up.t(), out=gate_up_NI2)
        torch.addmm(middle_NH, formulas.swiglu(gate_up_NI2), weights.down.t(), out=self.hidden_SNH[step + 1])

    def backward(self, hidden_grads_SNH: Tensor) -> None:
        """Adds to the gradients of all parameters that come before the last norm.

        `hidden_grads_SNH` [S + 1, N, H] are the gradients of the loss by `hidden_SNH`; they are overwritten.
        """
        self._hidden_grads = hidden_grads_SNH
        self._middle_grads = self._empty(self._together, self.hidden_SNH.shape[-1])
        self._gated = self._empty(self._together, self._weights.down.shape[1])
        self._key_value_grads = torch.zeros_like(self._qkv[..., self._query_width :])
        for step in reversed(range(self._steps)):
            self._backward_mlp(step)
            self._backward_attention(step)
            if step % self._together == 0:
                self._add_weight_gradients(step)
        self._backward_inputs()

    def _backward_mlp(self, step: int) -> None:
        layer, weights = self._layer, self._weights
        middle_NH, gate_up_NI2 = self._middle[step], self._gate_up[step % len(self._gate_up)]
        if self._recompute_mlp:
            normed_NH = formulas.rms_norm(middle_NH, weights.middle_norm, self._eps)
            torch.mm(normed_NH, weights.gate_up.t(), out=gate_up_NI2)
        out_grads_NH = self._hidden_grads[step + 1]
        formulas.swiglu_backward(out_grads_NH @ weights.down, gate_up_NI2, self._gated[step % self._together])
        formulas.rms_norm_backward(
            gate_up_NI2 @ weights.gate_up,
            middle_NH,
            (weights.middle_norm, self._eps),
            self._gradient_of(layer.post_attention_layernorm.weight),
            out_grads_NH,
            self._middle_grads[step % self._together],
        )

    def _backward_attention(self, step: int) -> None:
        layer, weights = self._layer, self._weights
        middle_grads_NH = self._middle_grads[step % self._together]
        attended_grads_NQD = self._in_heads(middle_grads_NH @ weights.output)
        key_grads, value_grads = self._in_heads(self._key_value_grads).chunk(2, dim=2)
        query_grads_NQD = self._attention.backward(attended_grads_NQD, (key_grads, value_grads))
        key_value_grads_BTJ2 = self._key_value_grads[step].view(*self._shape, -1)
        query_grads_BTQ = query_grads_NQD.reshape(*self._shape, -1)
        formulas.rotate_back(query_grads_BTQ, key_value_grads_BTJ2, self._tables[step], self._qkv_of(step))
        normed_grads_NH = self._qkv[step] @ weights.qkv_of_hidden
        passed_NH = self._hidden_grads[step]
        if layer.norm_before_residual:
            normed_grads_NH += middle_grads_NH
        else:
            passed_NH += middle_grads_NH
        norm, norm_grad = (weights.hidden_norm, self._eps), self._gradient_of(layer.hidden_norm.weight)
        hidden_NH = self.hidden_SNH[step]
        formulas.rms_norm_backward(normed_grads_NH, hidden_NH, norm, norm_grad, passed_NH, passed_NH)

    def _add_weight_gradients(self, first: int) -> None:
        """For the steps from `first` on; their kept hidden states are normed by now."""
        steps = slice(first, min(first + self._together, self._steps))
        waiting = slice(0, steps.stop - first)
        attention, mlp = self._layer.self_attn, self._layer.mlp
        normed_NH = self.hidden_SNH[steps].flatten(0, 1)
        qkv_grads = self._split_qkv(self._qkv[steps].flatten(0, 1))
        for layer, grads in zip(self._weights.projections, qkv_grads, strict=True):
            gradient = self._gradient_of(layer.weight)[:, self._weights.hidden_size :]
            add_weight_gradient(gradient, grads, normed_NH)
        middle_grads_NH = self._middle_grads[waiting].flatten(0, 1)
        attended_NQ = self._attended[steps].flatten(0, 1)
        add_weight_gradient(self._gradient_of(attention.o_proj.weight), middle_grads_NH, attended_NQ)
        normed_NH = self._middle[steps].flatten(0, 1)
        gate_up_NI2 = self._gate_up[waiting if self._recompute_mlp else steps].flatten(0, 1)
        for layer, grads in zip((mlp.gate_proj, mlp.up_proj), gate_up_NI2.chunk(2, dim=-1), strict=True):
            add_weight_gradient(self._gradient_of(layer.weight), grads, normed_NH)
        out_grads_NH, gated_NI = (
            self._hidden_grads[1:][steps].flatten(0, 1),
            self._gated[waiting].flatten(0, 1),
        )
        add_weight_gradient(self._gradient_of(mlp.down_proj.weight), out_grads_NH, gated_NI)

    def _backward_inputs(self) -> None:
        """The inputs that all steps share: the fused hidden states and the embeddings."""
        add_weight_gradient(self._gradient_of(self._draft.fc.weight), self._hidden_grads[0], self._aux)
        grads_MP = formulas.sum_shifted(self._qkv.unflatten(1, self._shape)).flatten(0, 1)
        embeds_MH, embed_grads_MH = self._embeds(), grads_MP @ self._weights.qkv_of_embeds
        norm = (self._weights.embeds_norm, self._eps)
        norm_grad = self._gradient_of(self._layer.input_layernorm.weight)
        formulas.rms_norm_backward(embed_grads_MH, embeds_MH, norm, norm_grad, None, embed_grads_MH)
        for layer, grads in zip(self._weights.projections, self._split_qkv(grads_MP), strict=True):
            gradient = self._gradient_of(layer.weight)[:, : self._weights.hidden_size]
            add_weight_gradient(gradient, grads, embeds_MH)

    def _embeds(self) -> Tensor:
        """[B U, H], a new tensor, which the caller may overwrite."""
        return F.embedding(self._ids.flatten(), self._draft.embed_tokens.weight).to(self.hidden_SNH.dtype)

    def _empty(self, steps: int, width: int) -> Tensor:
        return self._weights.fuse.new_empty(steps, self._slots, width)

    def _qkv_of(self, step: int) -> Tensor:
        return self._qkv[step].view(*self._shape, -1)

    def _queries_of(self, step: int) -> Tensor:
        return self._in_heads(self._qkv[step, :, : self._query_width])

    def _split_qkv(self, qkv_NP: Tensor) -> tuple[Tensor, ...]:
        return qkv_NP.split((self._query_width, self._key_width, self._key_width), dim=-1)

    def _in_heads(self, wide: Tensor) -> Tensor:
        return wide.unflatten(-1, (-1, self._draft.config.head_dim))

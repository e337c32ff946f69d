"""The draft layer over all TTT steps, forward and backward; each kept tensor has one buffer for all steps.

It equals autograd over `Eagle3Draft.advance` to rounding. Three differences make it fast:

* Step k embeds the tokens of step 0, shifted by k. So embeddings are normed and projected to queries, keys,
  and values once, and each step adds its rows to the projection of its hidden states.
* A weight gradient is one product over the slots of several steps, added to the gradient inside the product.
* Backward overwrites each kept tensor after its last use: gate and up, and queries, keys and values, by their
  gradients, hidden states by their norms.

Legend: B batch, T sequence, N = B T slots, L live slots, S steps, H hidden, W width of all captured states, Q of
all queries, J of all keys, P = Q + 2 J, I feed-forward width, D head width, E embedded tokens.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.draft.fused import formulas
from eagle_rpc.draft.fused.aux_fusion import AuxFusion
from eagle_rpc.draft.fused.idle_slots import IdleSlots
from eagle_rpc.draft.fused.slot_plan import SlotPlan
from eagle_rpc.draft.fused.step_attention import StepAttention
from eagle_rpc.draft.fused.weights import FusedWeights
from eagle_rpc.draft.model import Eagle3Draft

# Slots that keep a GPU busy in one product. If a step has fewer, the weight gradients of several steps are
# one product.
_SLOTS_OF_A_PRODUCT = 32768


class FusedUnroll:
    """One batch through all steps: `forward`, then `backward` once.

    `hidden_SLH` [S + 1, L, H] holds the fused input and the output of each step at live slots until
    `backward` begins. With `recompute_mlp` the backward computes gate and up again instead of keeping those
    of all steps.
    """

    def __init__(
        self, draft: Eagle3Draft, weights: FusedWeights, plan: SlotPlan, steps: int, recompute_mlp: bool
    ) -> None:
        self._draft, self._weights = draft, weights
        self._layer, self._eps = draft.midlayer, draft.config.rms_norm_eps
        self._gradient_of, self._products = weights.gradient_of, weights.products
        self._plan, self._steps = plan, steps
        self._slots = len(plan.live)
        # Steps whose weight gradients are computed in one product.
        self._together = 1 if recompute_mlp else min(steps, -(-_SLOTS_OF_A_PRODUCT // self._slots))
        self._recompute_mlp = recompute_mlp
        hidden_size, query_width = weights.output.shape
        self._query_width, self._key_width = query_width, (len(weights.qkv_of_hidden) - query_width) // 2
        self.hidden_SLH = self._empty(steps + 1, hidden_size)
        self._qkv = self._empty(steps, len(weights.qkv_of_hidden))
        self._attended = self._empty(steps, query_width)
        self._middle = self._empty(steps, hidden_size)  # between attention and feed-forward
        self._gate_up = self._empty(1 if recompute_mlp else steps, len(weights.gate_up))
        self._fusion, self._idle = AuxFusion(draft, weights), IdleSlots(draft, weights)

    def forward(self, aux_NW: Tensor, ids_BT: Tensor, positions_N: Tensor) -> None:
        """Runs all steps. `ids` and `positions` are those of step 0 at all slots."""
        plan, weights = self._plan, self._weights
        fused_NH = self._fusion.forward(aux_NW)
        torch.index_select(fused_NH, 0, plan.live, out=self.hidden_SLH[0])
        idle_key_values = fused_NH.new_empty(0, 2 * self._key_width)
        if len(plan.idle):
            ids_I, positions_I = ids_BT.flatten()[plan.idle], positions_N[plan.idle]
            idle_key_values = self._idle.forward(fused_NH[plan.idle], ids_I, positions_I)
        key_values = self._in_heads(self._qkv[..., self._query_width :])
        window, idle = self._draft.config.sliding_window, self._in_heads(idle_key_values)
        self._attention = StepAttention(plan, key_values, idle, window)

        positions_L = positions_N[plan.live]
        self._tables = [self._draft.rotary.tables(positions_L[None] + step) for step in range(self._steps)]
        self._ids_E = F.pad(ids_BT, (0, self._steps - 1)).flatten()[plan.embedded]
        embeds_EH = formulas.rms_norm(self._embeds(), weights.embeds_norm, self._eps)
        embed_part_EP = self._products.forward(embeds_EH, weights.qkv_of_embeds)
        for step in range(self._steps):
            self._forward_step(step, embed_part_EP.index_select(0, plan.first_embedded + step))

    def _forward_step(self, step: int, embed_part_LP: Tensor) -> None:
        layer, weights = self._layer, self._weights
        hidden_LH, middle_LH = self._carried(step), self._middle[step]
        normed_LH = formulas.rms_norm(hidden_LH, weights.hidden_norm, self._eps)
        hidden_part_LP = self._products.forward(normed_LH, weights.qkv_of_hidden)
        parts, qkv_1LP = (hidden_part_LP[None], embed_part_LP[None]), self._qkv[step, None]
        formulas.add_and_rotate(*parts, self._tables[step], self._key_width, qkv_1LP)
        queries_LQD = self._in_heads(self._qkv[step, :, : self._query_width])
        self._attention.forward(queries_LQD, self._in_heads(self._attended[step]))
        residual_LH = normed_LH if layer.norm_before_residual else hidden_LH
        self._products.forward(self._attended[step], weights.output, plus_NO=residual_LH, out_NO=middle_LH)
        normed_LH = formulas.rms_norm(middle_LH, weights.middle_norm, self._eps)
        gate_up_LI2 = self._gate_up[step % len(self._gate_up)]
        self._products.forward(normed_LH, weights.gate_up, out_NO=gate_up_LI2)
        gated_LI, out_LH = formulas.swiglu(gate_up_LI2), self.hidden_SLH[step + 1]
        self._products.forward(gated_LI, weights.down, plus_NO=middle_LH, out_NO=out_LH)

    def _carried(self, step: int) -> Tensor:
        """The hidden states [L, H] that a step reads."""
        hidden_LH = self.hidden_SLH[step]
        if not self._reads_normed(step):
            return hidden_LH
        return formulas.rms_norm(hidden_LH, self._weights.last_norm, self._eps)

    def _reads_normed(self, step: int) -> bool:
        return step > 0 and self._draft.config.norm_output

    def backward(self, hidden_grads_SLH: Tensor) -> None:
        """Adds to the gradients of all parameters that come before the last norm.

        `hidden_grads_SLH` [S + 1, L, H] are the gradients of the loss by `hidden_SLH`; they are overwritten.
        """
        self._hidden_grads = hidden_grads_SLH
        self._middle_grads = self._empty(self._together, self.hidden_SLH.shape[-1])
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
        middle_LH, gate_up_LI2 = self._middle[step], self._gate_up[step % len(self._gate_up)]
        if self._recompute_mlp:
            normed_LH = formulas.rms_norm(middle_LH, weights.middle_norm, self._eps)
            self._products.forward(normed_LH, weights.gate_up, out_NO=gate_up_LI2)
        out_grads_LH = self._hidden_grads[step + 1]
        gated_grads_LI = self._products.input_gradient(out_grads_LH, weights.down)
        formulas.swiglu_backward(gated_grads_LI, gate_up_LI2, self._gated[step % self._together])
        formulas.rms_norm_backward(
            self._products.input_gradient(gate_up_LI2, weights.gate_up),
            middle_LH,
            (weights.middle_norm, self._eps),
            self._gradient_of(layer.post_attention_layernorm.weight),
            out_grads_LH,
            self._middle_grads[step % self._together],
        )

    def _backward_attention(self, step: int) -> None:
        weights = self._weights
        middle_grads_LH = self._middle_grads[step % self._together]
        attended_grads_LQD = self._in_heads(self._products.input_gradient(middle_grads_LH, weights.output))
        key_value_grads = self._in_heads(self._key_value_grads)
        query_grads_LQD = self._attention.backward(attended_grads_LQD, key_value_grads)
        if step == 0:
            live_grads, self._idle_grads = self._attention.step_0_grads()
            key_value_grads[0].copy_(live_grads)
        grads = (query_grads_LQD.reshape(1, self._slots, -1), self._key_value_grads[step, None])
        formulas.rotate_back(*grads, self._tables[step], self._qkv[step, None])
        normed_grads_LH = self._products.input_gradient(self._qkv[step], weights.qkv_of_hidden)
        self._backward_input(step, normed_grads_LH, middle_grads_LH)

    def _backward_input(self, step: int, normed_grads_LH: Tensor, residual_grads_LH: Tensor) -> None:
        """From the layer's norm of its input and its residual to the output of the step before."""
        layer, hidden_LH, grads_LH = self._layer, self.hidden_SLH[step], self._hidden_grads[step]
        norm, norm_grad = (self._weights.hidden_norm, self._eps), self._gradient_of(layer.hidden_norm.weight)
        passed_LH: Tensor | None = residual_grads_LH
        if layer.norm_before_residual:
            normed_grads_LH += residual_grads_LH
            passed_LH = None
        if not self._reads_normed(step):
            if passed_LH is not None:
                grads_LH += passed_LH
            formulas.rms_norm_backward(normed_grads_LH, hidden_LH, norm, norm_grad, grads_LH, grads_LH)
            return
        carried_LH, carried_grads_LH = self._carried(step), normed_grads_LH
        formulas.rms_norm_backward(normed_grads_LH, carried_LH, norm, norm_grad, passed_LH, carried_grads_LH)
        norm, norm_grad = (self._weights.last_norm, self._eps), self._gradient_of(self._draft.norm.weight)
        formulas.rms_norm_backward(carried_grads_LH, hidden_LH, norm, norm_grad, grads_LH, grads_LH)
        # The weight gradients of the projections read the layer's norm of its input here.
        hidden_LH.copy_(carried_LH)

    def _add_weight_gradients(self, first: int) -> None:
        """For the steps from `first` on; their kept hidden states are normed by now."""
        steps = slice(first, min(first + self._together, self._steps))
        waiting = slice(0, steps.stop - first)
        attention, mlp = self._layer.self_attn, self._layer.mlp
        normed_LH = self.hidden_SLH[steps].flatten(0, 1)
        qkv_grads = self._split_qkv(self._qkv[steps].flatten(0, 1))
        read = slice(self._weights.hidden_size, None)
        gradients = (self._gradient_of(layer.weight)[:, read] for layer in self._weights.projections)
        self._products.add_weight_gradients(zip(gradients, qkv_grads, strict=True), normed_LH)
        middle_grads_LH = self._middle_grads[waiting].flatten(0, 1)
        attended_LQ = self._attended[steps].flatten(0, 1)
        output_grad = self._gradient_of(attention.o_proj.weight)
        self._products.add_weight_gradients([(output_grad, middle_grads_LH)], attended_LQ)
        normed_LH = self._middle[steps].flatten(0, 1)
        gate_up_LI2 = self._gate_up[waiting if self._recompute_mlp else steps].flatten(0, 1)
        gradients = (self._gradient_of(layer.weight) for layer in (mlp.gate_proj, mlp.up_proj))
        parts = zip(gradients, gate_up_LI2.chunk(2, dim=-1), strict=True)
        self._products.add_weight_gradients(parts, normed_LH)
        out_grads_LH, gated_LI = (
            self._hidden_grads[1:][steps].flatten(0, 1),
            self._gated[waiting].flatten(0, 1),
        )
        down_grad = self._gradient_of(mlp.down_proj.weight)
        self._products.add_weight_gradients([(down_grad, out_grads_LH)], gated_LI)

    def _backward_inputs(self) -> None:
        """The inputs that all steps share: the fused hidden states and the embeddings."""
        plan, weights = self._plan, self._weights
        fused_grads_NH = self.hidden_SLH.new_zeros(plan.shape[0] * plan.shape[1], weights.hidden_size)
        fused_grads_NH[plan.live] = self._hidden_grads[0]
        if len(plan.idle):
            fused_grads_NH[plan.idle] = self._idle.backward(self._idle_grads.flatten(1))
        self._fusion.backward(fused_grads_NH)
        grads_EP = formulas.sum_readers(self._qkv, self._readers())
        embeds_EH = self._embeds()
        embed_grads_EH = self._products.input_gradient(grads_EP, weights.qkv_of_embeds)
        norm = (weights.embeds_norm, self._eps)
        norm_grad = self._gradient_of(self._layer.input_layernorm.weight)
        formulas.rms_norm_backward(embed_grads_EH, embeds_EH, norm, norm_grad, None, embed_grads_EH)
        weights.add_embedding_gradient(self._ids_E, embed_grads_EH)
        read = slice(weights.hidden_size)
        gradients = (self._gradient_of(layer.weight)[:, read] for layer in weights.projections)
        self._products.add_weight_gradients(zip(gradients, self._split_qkv(grads_EP), strict=True), embeds_EH)

    def _readers(self) -> Tensor:
        """[S, E] int64: the live slot that reads a token at a step, or -1."""
        slots_L = torch.arange(self._slots, device=self._ids_E.device)
        readers_SE = slots_L.new_full((self._steps, len(self._ids_E)), -1)
        for step in range(self._steps):
            readers_SE[step].index_copy_(0, self._plan.first_embedded + step, slots_L)
        return readers_SE

    def _embeds(self) -> Tensor:
        """[E, H], a new tensor, which the caller may overwrite."""
        return F.embedding(self._ids_E, self._draft.embed_tokens.weight).to(self.hidden_SLH.dtype)

    def _empty(self, steps: int, width: int) -> Tensor:
        return self._weights.fuse.new_empty(steps, self._slots, width)

    def _split_qkv(self, qkv_LP: Tensor) -> tuple[Tensor, ...]:
        return qkv_LP.split((self._query_width, self._key_width, self._key_width), dim=-1)

    def _in_heads(self, wide: Tensor) -> Tensor:
        return wide.unflatten(-1, (-1, self._draft.config.head_dim))

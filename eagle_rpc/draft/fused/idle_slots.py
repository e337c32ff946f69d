"""Idle slots: the key and value of step 0, which live slots attend to, and nothing more.

Legend: I idle slots, H hidden, J width of all keys.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.draft.fused import formulas
from eagle_rpc.draft.fused.weights import FusedWeights
from eagle_rpc.draft.model import Eagle3Draft


class IdleSlots:
    """The idle slots of one batch: `forward`, then `backward` once."""

    def __init__(self, draft: Eagle3Draft, weights: FusedWeights) -> None:
        self._draft, self._weights = draft, weights

    def forward(self, hidden_IH: Tensor, ids_I: Tensor, positions_I: Tensor) -> Tensor:
        """Keys and values [I, 2 J], side by side, from fused hidden states, which `backward` overwrites."""
        draft, weights = self._draft, self._weights
        self._ids_I = ids_I
        embeds_IH = F.embedding(ids_I, draft.embed_tokens.weight).to(hidden_IH.dtype)
        self._inputs = (
            (embeds_IH, weights.key_value_of_embeds, weights.embeds_norm, draft.midlayer.input_layernorm),
            (hidden_IH, weights.key_value_of_hidden, weights.hidden_norm, draft.midlayer.hidden_norm),
        )
        self._tables = draft.rotary.tables(positions_I[None])
        embed_part, hidden_part = (
            formulas.rms_norm(x_IH, norm_H, draft.config.rms_norm_eps) @ weight_JH.t()
            for x_IH, weight_JH, norm_H, _ in self._inputs
        )
        out_1IJ2 = torch.empty_like(hidden_part)[None]
        width = out_1IJ2.shape[-1] // 2
        formulas.add_and_rotate(hidden_part[None], embed_part[None], self._tables, width, out_1IJ2)
        return out_1IJ2[0]

    def backward(self, grads_IJ2: Tensor) -> Tensor:
        """Gradients [I, H] by the hidden states; adds to those of weights and norms."""
        attention, gradient_of = self._draft.midlayer.self_attn, self._weights.gradient_of
        turned_IJ2 = torch.empty_like(grads_IJ2)
        no_queries = grads_IJ2[None, :, :0]
        formulas.rotate_back(no_queries, grads_IJ2[None], self._tables, turned_IJ2[None])
        columns, grads_of_inputs = 0, list[Tensor]()
        for x_IH, weight_JH, norm_H, layer in self._inputs:
            x_grads_IH = turned_IJ2 @ weight_JH
            norm = (norm_H, self._draft.config.rms_norm_eps)
            formulas.rms_norm_backward(x_grads_IH, x_IH, norm, gradient_of(layer.weight), None, x_grads_IH)
            read = slice(columns, columns + x_IH.shape[-1])
            gradients = (gradient_of(layer.weight)[:, read] for layer in (attention.k_proj, attention.v_proj))
            parts = zip(gradients, turned_IJ2.chunk(2, dim=-1), strict=True)
            self._weights.products.add_weight_gradients(parts, x_IH)
            columns = read.stop
            grads_of_inputs.append(x_grads_IH)
        embed_grads_IH, hidden_grads_IH = grads_of_inputs
        self._weights.add_embedding_gradient(self._ids_I, embed_grads_IH)
        return hidden_grads_IH

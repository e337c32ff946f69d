"""The projection of the captured states, with the norms before it: `Eagle3Draft.fuse` and its backward.

Only weights and norms have gradients, as the captured states are the target's.
Legend: N slots, n slots of a piece, H hidden, W width of all captured states side by side.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eagle_rpc.draft.fused import formulas
from eagle_rpc.draft.fused.weights import FusedWeights
from eagle_rpc.draft.model import Eagle3Draft, RMSNorm

# Slots that are normed at a time. Normed states are not kept: the backward computes them again.
_SLOTS_OF_A_PIECE = 16384


class AuxFusion:
    """The captured states of one batch: `forward`, then `backward` once."""

    def __init__(self, draft: Eagle3Draft, weights: FusedWeights) -> None:
        self._draft, self._weights = draft, weights

    def forward(self, aux_NW: Tensor) -> Tensor:
        """Fused hidden states [N, H]; `aux_NW`, in the compute dtype, is kept and not changed."""
        self._aux_NW = aux_NW
        if not self._draft.aux_norms:
            return self._weights.products.forward(aux_NW, self._weights.fuse)
        return torch.cat([self._fuse(aux_nW) for aux_nW in aux_NW.split(_SLOTS_OF_A_PIECE)])

    def _fuse(self, aux_nW: Tensor) -> Tensor:
        for norms in self._draft.aux_norms:
            aux_nW = self._normed(norms, aux_nW)
        return self._weights.products.forward(aux_nW, self._weights.fuse)

    def _normed(self, norms: Sequence[RMSNorm], aux_nW: Tensor) -> Tensor:
        parts = zip(norms, aux_nW.chunk(len(norms), dim=-1), strict=True)
        return torch.cat(
            [formulas.rms_norm(part.contiguous(), *self._weights.norm_of(norm)) for norm, part in parts],
            dim=-1,
        )

    def backward(self, fused_grads_NH: Tensor) -> None:
        """Adds to the gradients of the projection and of the norms before it."""
        if not self._draft.aux_norms:
            self._add_projection_gradient(fused_grads_NH, self._aux_NW)
            return
        pieces = (tensor.split(_SLOTS_OF_A_PIECE) for tensor in (fused_grads_NH, self._aux_NW))
        for fused_grads_nH, aux_nW in zip(*pieces, strict=True):
            self._backward_piece(fused_grads_nH, aux_nW)

    def _backward_piece(self, fused_grads_nH: Tensor, aux_nW: Tensor) -> None:
        *earlier, last = self._draft.aux_norms
        inputs = [aux_nW]
        for norms in earlier:
            inputs.append(self._normed(norms, inputs[-1]))
        grads_nW = self._weights.products.input_gradient(fused_grads_nH, self._weights.fuse)
        self._add_projection_gradient(fused_grads_nH, self._backward_norms(last, grads_nW, inputs.pop()))
        for norms in reversed(earlier):
            self._backward_norms(norms, grads_nW, inputs.pop())

    def _backward_norms(self, norms: Sequence[RMSNorm], grads_nW: Tensor, inputs_nW: Tensor) -> Tensor:
        """The norms' output again; replaces the gradients by it with those by the input."""
        outputs = []
        parts = (tensor.chunk(len(norms), dim=-1) for tensor in (grads_nW, inputs_nW))
        for norm, grad, part in zip(norms, *parts, strict=True):
            grad_nH, part_nH = grad.contiguous(), part.clone(memory_format=torch.contiguous_format)
            gradient = self._weights.gradient_of(norm.weight)
            formulas.rms_norm_backward(grad_nH, part_nH, self._weights.norm_of(norm), gradient, None, grad_nH)
            grad.copy_(grad_nH)
            outputs.append(part_nH)
        return torch.cat(outputs, dim=-1)

    def _add_projection_gradient(self, fused_grads_NH: Tensor, inputs_NW: Tensor) -> None:
        gradient = self._weights.gradient_of(self._draft.fc.weight)
        self._weights.products.add_weight_gradients([(gradient, fused_grads_NH)], inputs_NW)

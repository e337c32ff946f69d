"""Copies of the draft's weights for the fused unroll, and their products.

Legend: H hidden, Q width of all queries, J of all keys, P = Q + 2 J, I feed-forward width, K draft vocab.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from eagle_rpc.draft.fused.products import Fp8Products, Products
from eagle_rpc.draft.model import Eagle3Draft, RMSNorm


class FusedWeights:
    """Copies of a draft's matrices in the compute dtype, some joined for one product, and of its norms.

    Call `refresh` when the draft has changed. `gradients` are those of `FusedStep`; `fp8`: whether the
    products of all slots are computed in it.
    """

    def __init__(
        self,
        draft: Eagle3Draft,
        dtype: torch.dtype,
        gradients: Mapping[str, Tensor] | None,
        *,
        fp8: bool = False,
    ) -> None:
        self._draft = draft
        self._gradients: dict[Tensor, Tensor] = {}  # by parameter
        if gradients is not None:
            self._gradients = {draft.get_parameter(name): gradient for name, gradient in gradients.items()}
        attention, mlp = draft.midlayer.self_attn, draft.midlayer.mlp
        self.projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.hidden_size = draft.config.hidden_size
        heights = sum(projection.out_features for projection in self.projections)

        def empty(*shape: int) -> Tensor:
            return torch.empty(shape, dtype=dtype, device=draft.fc.weight.device)

        self.fuse = empty(*draft.fc.weight.shape)  # [H, W], W the width of all captured states
        self.qkv_of_embeds = empty(heights, self.hidden_size)  # [P, H], the columns that read embeddings
        self.qkv_of_hidden = empty(heights, self.hidden_size)  # [P, H], the columns that read hidden states
        widths = (self.projections[0].out_features, 2 * self.projections[1].out_features)
        _, self.key_value_of_embeds = self.qkv_of_embeds.split(widths)
        _, self.key_value_of_hidden = self.qkv_of_hidden.split(widths)
        self.output = empty(*attention.o_proj.weight.shape)  # [H, Q]
        self.gate_up = empty(2 * mlp.gate_proj.out_features, self.hidden_size)  # [2I, H]
        self.down = empty(*mlp.down_proj.weight.shape)  # [H, I]
        self.head = empty(*draft.lm_head.weight.shape)  # [K, H]
        self.products = Products()
        if fp8:
            of_layer = (self.qkv_of_embeds, self.qkv_of_hidden, self.output, self.gate_up, self.down)
            self.products = Fp8Products((self.fuse, *of_layer, self.head))
        layer = draft.midlayer
        self._norm_weights: dict[RMSNorm, Tensor] = {
            norm: torch.empty(norm.weight.shape, dtype=norm.weight.dtype, device=norm.weight.device)
            for norm in draft.modules()
            if isinstance(norm, RMSNorm)
        }
        norms = (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm, draft.norm)
        # [H] each
        self.embeds_norm, self.hidden_norm, self.middle_norm, self.last_norm = (
            self._norm_weights[norm] for norm in norms
        )
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies the draft's weights, one after the other; sharded ones are gathered from all trainers."""
        attention, mlp = self._draft.midlayer.self_attn, self._draft.midlayer.mlp
        _copy_whole(self.fuse, self._draft.fc.weight)
        copies = self._split(self.qkv_of_embeds), self._split(self.qkv_of_hidden)
        for layer, of_embeds, of_hidden in zip(self.projections, *copies, strict=True):
            weight = _whole(layer.weight, self.fuse.dtype)
            of_embeds.copy_(weight[:, : self.hidden_size])
            of_hidden.copy_(weight[:, self.hidden_size :])
        _copy_whole(self.output, attention.o_proj.weight)
        for layer, copy in zip((mlp.gate_proj, mlp.up_proj), self.gate_up.chunk(2), strict=True):
            _copy_whole(copy, layer.weight)
        _copy_whole(self.down, mlp.down_proj.weight)
        _copy_whole(self.head, self._draft.lm_head.weight)
        for norm, copy in self._norm_weights.items():
            _copy_whole(copy, norm.weight)
        self.products.refresh()

    def norm_of(self, norm: RMSNorm) -> tuple[Tensor, float]:
        """The copy of the weight of one of the draft's norms, and its eps."""
        return self._norm_weights[norm], norm.eps

    def add_embedding_gradient(self, ids_N: Tensor, grads_NH: Tensor) -> None:
        """Of the embedded tokens, if the embedding is trained."""
        weight_VH = self._draft.embed_tokens.weight
        if weight_VH.requires_grad:
            gradient_VH = self.gradient_of(weight_VH)
            gradient_VH.index_add_(0, ids_N, grads_NH.to(gradient_VH.dtype))

    def _split(self, qkv_PH: Tensor) -> Sequence[Tensor]:
        """Views of the copy for queries, keys and values."""
        return qkv_PH.split([projection.out_features for projection in self.projections])

    def gradient_of(self, parameter: Tensor) -> Tensor:
        """The tensor to which gradients of the parameter are added; zeros at first."""
        if self._gradients:
            return self._gradients[parameter]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad


def _copy_whole(copy: Tensor, weight: Tensor) -> None:
    copy.copy_(_whole(weight, copy.dtype))


def _whole(weight: Tensor, dtype: torch.dtype) -> Tensor:
    """The weight; a sharded one is converted to `dtype` and gathered."""
    if not isinstance(weight, DTensor):
        return weight
    return weight.to(dtype).full_tensor()  # type: ignore[attr-defined]

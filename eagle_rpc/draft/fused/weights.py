"""The draft's weights as the fused unroll reads them, and the product that forms their gradients.

Legend: H hidden, Q width of all queries, J of all keys, P = Q + 2 J, I feed-forward width, K draft vocab, N rows.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from eagle_rpc.draft.model import Eagle3Draft


class FusedWeights:
    """Copies of a draft's matrices in the compute dtype, joined where one product serves several, and of its norms' weights.

    They go stale when the draft changes: `refresh` then. `gradients` are as of `FusedStep`.
    """

    def __init__(
        self, draft: Eagle3Draft, dtype: torch.dtype, gradients: Mapping[str, Tensor] | None
    ) -> None:
        self._draft = draft
        self._gradients: dict[nn.Parameter, Tensor] = {}
        if gradients is not None:
            self._gradients = {draft.get_parameter(name): gradient for name, gradient in gradients.items()}
        attention, mlp = draft.midlayer.self_attn, draft.midlayer.mlp
        self.projections = (attention.q_proj, attention.k_proj, attention.v_proj)
        self.hidden_size = draft.config.hidden_size
        heights = sum(projection.out_features for projection in self.projections)

        def empty(rows: int, columns: int) -> Tensor:
            return torch.empty(rows, columns, dtype=dtype, device=draft.fc.weight.device)

        self.fuse = empty(*draft.fc.weight.shape)  # [H, 3H]
        self.qkv_of_embeds = empty(heights, self.hidden_size)  # [P, H], the columns that read embeddings
        self.qkv_of_hidden = empty(heights, self.hidden_size)  # [P, H], the columns that read hidden states
        self.output = empty(*attention.o_proj.weight.shape)  # [H, Q]
        self.gate_up = empty(2 * mlp.gate_proj.out_features, self.hidden_size)  # [2I, H]
        self.down = empty(*mlp.down_proj.weight.shape)  # [H, I]
        self.head = empty(*draft.lm_head.weight.shape)  # [K, H]
        layer = draft.midlayer
        self._norms = (layer.input_layernorm, layer.hidden_norm, layer.post_attention_layernorm, draft.norm)
        self.embeds_norm, self.hidden_norm, self.middle_norm, self.last_norm = self._norm_weights = [
            torch.empty(self.hidden_size, dtype=norm.weight.dtype, device=norm.weight.device)
            for norm in self._norms
        ]  # [H] each
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the draft's present weights, one after the other, from all trainers where each holds a part."""
        attention, mlp = self._draft.midlayer.self_attn, self._draft.midlayer.mlp
        _copy_whole(self.fuse, self._draft.fc.weight)
        for layer, embed_rows, hidden_rows in zip(
            self.projections,
            self._rows_of(self.qkv_of_embeds),
            self._rows_of(self.qkv_of_hidden),
            strict=True,
        ):
            weight = _whole(layer.weight, self.fuse.dtype)
            embed_rows.copy_(weight[:, : self.hidden_size])
            hidden_rows.copy_(weight[:, self.hidden_size :])
        _copy_whole(self.output, attention.o_proj.weight)
        for layer, rows in zip((mlp.gate_proj, mlp.up_proj), self.gate_up.chunk(2), strict=True):
            _copy_whole(rows, layer.weight)
        _copy_whole(self.down, mlp.down_proj.weight)
        _copy_whole(self.head, self._draft.lm_head.weight)
        for copy, norm in zip(self._norm_weights, self._norms, strict=True):
            _copy_whole(copy, norm.weight)

    def _rows_of(self, qkv: Tensor) -> Sequence[Tensor]:
        return qkv.split([projection.out_features for projection in self.projections])

    def gradient_of(self, parameter: nn.Parameter) -> Tensor:
        """Where the parameter's gradient is summed up; zeros at first."""
        if self._gradients:
            return self._gradients[parameter]
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        return parameter.grad


def _copy_whole(copy: Tensor, weight: nn.Parameter) -> None:
    copy.copy_(_whole(weight, copy.dtype))


def _whole(weight: nn.Parameter, dtype: torch.dtype) -> Tensor:
    """The weight, gathered in `dtype` where trainers hold parts of it."""
    return weight.to(dtype).full_tensor() if isinstance(weight, DTensor) else weight


def add_weight_gradient(gradient_OI: Tensor, output_grads_NO: Tensor, inputs_NI: Tensor) -> None:
    """`gradient += output_grads.T @ inputs`, added inside the product and in the gradient's dtype: nothing is rounded between."""
    if gradient_OI.dtype == inputs_NI.dtype:
        gradient_OI.addmm_(output_grads_NO.t(), inputs_NI)
    else:
        torch.addmm(gradient_OI, output_grads_NO.t(), inputs_NI, out_dtype=gradient_OI.dtype, out=gradient_OI)

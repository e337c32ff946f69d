"""The draft's weights as the fused unroll reads them, and the product that forms their gradients.

Legend: H hidden, Q width of all queries, J of all keys, P = Q + 2 J, I feed-forward width, K draft vocab, N rows.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from eagle_rpc.draft.model import Eagle3Draft


class FusedWeights:
    """Copies of a draft's matrices in the compute dtype, joined where one product serves several.

    They go stale when the draft changes: `refresh` then.
    """

    def __init__(self, draft: Eagle3Draft, dtype: torch.dtype) -> None:
        self._draft = draft
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
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """Takes over the draft's present weights."""
        attention, mlp = self._draft.midlayer.self_attn, self._draft.midlayer.mlp
        self.fuse.copy_(self._draft.fc.weight)
        _copy_rows(self.qkv_of_embeds, [layer.weight[:, : self.hidden_size] for layer in self.projections])
        _copy_rows(self.qkv_of_hidden, [layer.weight[:, self.hidden_size :] for layer in self.projections])
        self.output.copy_(attention.o_proj.weight)
        _copy_rows(self.gate_up, [mlp.gate_proj.weight, mlp.up_proj.weight])
        self.down.copy_(mlp.down_proj.weight)
        self.head.copy_(self._draft.lm_head.weight)


def _copy_rows(joined: Tensor, parts: Sequence[Tensor]) -> None:
    for rows, part in zip(joined.split([len(part) for part in parts]), parts, strict=True):
        rows.copy_(part)


def gradient_of(parameter: nn.Parameter) -> Tensor:
    """Where the parameter's gradient is summed up; zeros at first."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def add_weight_gradient(gradient_OI: Tensor, output_grads_NO: Tensor, inputs_NI: Tensor) -> None:
    """`gradient += output_grads.T @ inputs`, added inside the product and in the gradient's dtype: nothing is rounded between."""
    if gradient_OI.dtype == inputs_NI.dtype:
        gradient_OI.addmm_(output_grads_NO.t(), inputs_NI)
    else:
        torch.addmm(gradient_OI, output_grads_NO.t(), inputs_NI, out_dtype=gradient_OI.dtype, out=gradient_OI)

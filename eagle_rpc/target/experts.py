"""Experts of a layer as two products over rows in the order of experts, with the gate applied inside the first.

transformers' grouped products write and read gates, ups and weighted results as tensors of all choices; here
only the gated rows and the results are written. Legend: N tokens, C choices (experts that a token passes),
E experts, H hidden, I intermediate width of one expert.
"""

from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle_rpc.target.gated_mlp import ALIGNED, DTYPES, PROBE_LARGEST
from eagle_rpc.target.probes import ROUNDING, relative_error

# Tokens of a probe, and the experts that each passes.
_PROBE_TOKENS, _PROBE_CHOICES = 48, 2


class _Experts(Protocol):
    """A module that sums `down[e](silu(gate[e](x)) * up[e](x))` over a token's experts e, by their weights."""

    gate_up_proj: nn.Parameter  # [E, 2 I, H]
    down_proj: nn.Parameter  # [E, H, I]

    def __call__(self, hidden_NH: Tensor, experts_NC: Tensor, weights_NC: Tensor) -> Tensor: ...


def is_candidate(module: nn.Module) -> TypeGuard[_Experts]:
    """Whether the module holds the weights of gated experts and nothing else, in a form that the kernels take."""
    weights = dict(module.named_parameters())
    plain = all(type(weight) is nn.Parameter for weight in weights.values())
    if not plain or weights.keys() != {"gate_up_proj", "down_proj"} or "forward" in vars(module):
        return False
    gate_up, down = weights["gate_up_proj"], weights["down_proj"]
    if gate_up.dim() != 3 or gate_up.dtype != down.dtype or gate_up.dtype not in DTYPES:
        return False
    experts, width, depth = gate_up.shape
    aligned = (width // 2) % ALIGNED == 0 and depth % ALIGNED == 0
    contiguous = gate_up.is_contiguous() and down.is_contiguous()
    return aligned and contiguous and down.shape == (experts, depth, width // 2)


@torch.no_grad()
def fuse(experts: _Experts) -> bool:
    """Whether the fused experts give what the module gives, up to rounding."""
    gate_up = experts.gate_up_proj
    number, _, depth = gate_up.shape
    generator = torch.Generator().manual_seed(0)
    probe_NH = torch.randn(_PROBE_TOKENS, depth, generator=generator).to(gate_up)
    scores = torch.rand(_PROBE_TOKENS, number, generator=generator).to(gate_up.device)
    weights_NC, experts_NC = scores.topk(min(_PROBE_CHOICES, number))
    weights_NC = weights_NC.to(gate_up.dtype)
    largest = F.linear(probe_NH, gate_up[0]).abs().max().float().clamp_min(1e-6)
    for wanted in PROBE_LARGEST:
        rows_NH = probe_NH * (wanted / largest).to(probe_NH.dtype)
        fused_NH = fused_forward(experts, rows_NH, experts_NC, weights_NC)
        if not relative_error(fused_NH, experts(rows_NH, experts_NC, weights_NC)) <= ROUNDING[gate_up.dtype]:
            return False
    return True


def fused_forward(experts: _Experts, hidden_NH: Tensor, experts_NC: Tensor, weights_NC: Tensor) -> Tensor:
    """The `forward` of experts after `fuse`: [N, H]."""
    return _sum_of_experts(hidden_NH, experts_NC, weights_NC, experts.gate_up_proj, experts.down_proj)


@torch.library.custom_op("eagle_rpc::sum_of_experts", mutates_args=())
def _sum_of_experts(
    hidden_NH: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up_EIH: Tensor, down_EHI: Tensor
) -> Tensor:
    # Imported here: only torch for CUDA brings Triton.
    from eagle_rpc.target import expert_kernels, gated_kernel

    places_NC, tiles = expert_kernels.place_choices(experts_NC.contiguous(), len(gate_up_EIH))
    spread_PH = expert_kernels.spread_to_places(hidden_NH.contiguous(), places_NC, len(tiles.expert_of_tile))
    gated_PI = gated_kernel.gated_product_of_experts(spread_PH, gate_up_EIH, tiles)
    results_PH = gated_kernel.product_of_experts(gated_PI, down_EHI, tiles)
    return expert_kernels.combine_places(results_PH, places_NC, weights_NC.contiguous())


@_sum_of_experts.register_fake
def _(
    hidden_NH: Tensor, experts_NC: Tensor, weights_NC: Tensor, gate_up_EIH: Tensor, down_EHI: Tensor
) -> Tensor:
    return torch.empty_like(hidden_NH)

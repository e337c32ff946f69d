"""Gated MLPs with the gate applied inside the matrix product, instead of two products and two passes.

Legend: N rows, H hidden, I intermediate width.
"""

from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle_rpc.target.probes import ROUNDING, relative_error

DTYPES = (torch.bfloat16, torch.float16)
# Rows of all three matrices have to be multiples of 16 bytes: that many elements of these dtypes.
ALIGNED = 8
# Rows of a probe, and its largest gates and ups: the size that layers have, and a size that some MLPs clamp.
_PROBE_ROWS, PROBE_LARGEST = 8, (4.0, 100.0)


class _GatedMLP(Protocol):
    """A module that computes `down(silu(gate(x)) * up(x))`."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    gate_up_weight: Tensor  # [2, I, H], once it is fused

    def __call__(self, hidden: Tensor) -> Tensor: ...


def is_candidate(mlp: nn.Module) -> TypeGuard[_GatedMLP]:
    """Whether the module holds the three products of a gated MLP, in a form that the kernel takes."""
    products = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    linear = [product for product in products if _is_plain_linear(product)]
    # A `forward` in an instance is a replacement by other code.
    if len(linear) < 3 or any("forward" in vars(module) for module in (mlp, *linear)):
        return False
    gate, up = linear[0].weight, linear[1].weight
    alike = (gate.shape, gate.dtype, gate.device) == (up.shape, up.dtype, up.device)
    aligned = all(size % ALIGNED == 0 for size in gate.shape)
    return alike and aligned and gate.dtype in DTYPES


def _is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    # Exact types: quantised weights are a subclass of `nn.Parameter`, or belong to a subclass of `nn.Linear`.
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.bias is None


@torch.no_grad()
def fuse(mlp: _GatedMLP) -> bool:
    """Joins the gate and up weights if the fused MLP gives what its modules give, up to rounding."""
    weight_2IH = torch.stack((mlp.gate_proj.weight.data, mlp.up_proj.weight.data))
    generator = torch.Generator().manual_seed(0)
    probe_NH = torch.randn(_PROBE_ROWS, weight_2IH.shape[2], generator=generator).to(weight_2IH)
    largest = F.linear(probe_NH, weight_2IH.flatten(0, 1)).abs().max().float().clamp_min(1e-6)
    for wanted in PROBE_LARGEST:
        rows_NH = probe_NH * (wanted / largest).to(probe_NH.dtype)
        fused_NH = mlp.down_proj(_gated_product(rows_NH, weight_2IH))
        if not relative_error(fused_NH, mlp(rows_NH)) <= ROUNDING[weight_2IH.dtype]:
            return False
    mlp.gate_up_weight = weight_2IH
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = weight_2IH
    return True


def fused_forward(mlp: _GatedMLP, hidden: Tensor) -> Tensor:
    """The `forward` of an MLP after `fuse`."""
    gated_NI = _gated_product(hidden.flatten(0, -2), mlp.gate_up_weight)
    return mlp.down_proj(gated_NI.unflatten(0, hidden.shape[:-1]))


@torch.library.custom_op("eagle_rpc::gated_product", mutates_args=())
def _gated_product(hidden_NH: Tensor, weight_2IH: Tensor) -> Tensor:
    # Imported here: only torch for CUDA brings Triton.
    from eagle_rpc.target.gated_kernel import gated_product

    return gated_product(hidden_NH.contiguous(), weight_2IH)


@_gated_product.register_fake
def _(hidden_NH: Tensor, weight_2IH: Tensor) -> Tensor:
    return hidden_NH.new_empty(hidden_NH.shape[0], weight_2IH.shape[1])

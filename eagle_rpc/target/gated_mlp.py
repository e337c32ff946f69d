"""Gated MLPs with the gate applied inside the matrix product, instead of two products and two passes.

Legend: N rows, H hidden, I intermediate width.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Protocol, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle_rpc.target.probes import ROUNDING, relative_error

logger = logging.getLogger(__name__)

# Compute capability of the GPUs that the kernel was written for and measured on.
_HOPPER = 9
_DTYPES = (torch.bfloat16, torch.float16)
# Rows of all three matrices have to be multiples of 16 bytes: that many elements of these dtypes.
_ALIGNED = 8
# Rows of a probe, and its largest gates and ups: the size that layers have, and a size that some MLPs clamp.
_PROBE_ROWS, _PROBE_LARGEST = 8, (4.0, 100.0)


class _GatedMLP(Protocol):
    """A module that computes `down(silu(gate(x)) * up(x))`."""

    gate_proj: nn.Linear
    up_proj: nn.Linear
    down_proj: nn.Linear
    gate_up_weight: Tensor  # [2, I, H], once it is fused
    forward: object

    def __call__(self, hidden: Tensor) -> Tensor: ...


class FusedMLPs:
    """Those of `modules` that are gated MLPs with SiLU, as a probe of each has shown.

    Their gate and up weights become the halves of one tensor, so the modules must not be moved or given other
    weights afterwards. Empty without a Hopper GPU and Triton, or without such an MLP.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._mlps: list[_GatedMLP] = []
        warned = False
        for mlp in filter(_is_candidate, modules):
            try:
                weight_2IH = torch.stack((mlp.gate_proj.weight.data, mlp.up_proj.weight.data))
                if _equals_modules(mlp, weight_2IH):
                    mlp.gate_up_weight = weight_2IH
                    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = weight_2IH
                    self._mlps.append(mlp)
            except Exception:
                # No Triton, no C compiler, a refused kernel, an unusual module: each raises other errors.
                if not warned:
                    message = "some MLPs run as their modules do: the probe for target.fused_mlp failed"
                    logger.warning(message, exc_info=True)
                warned = True
        if self._mlps:
            # The freed weights leave gaps in torch's cache that are too small for the next pair.
            torch.cuda.empty_cache()

    def __len__(self) -> int:
        return len(self._mlps)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the modules' `forward` is the fused one."""
        try:
            for mlp in self._mlps:
                mlp.forward = MethodType(_fused_forward, mlp)
            yield
        finally:
            for mlp in self._mlps:
                vars(mlp).pop("forward", None)


def _is_candidate(mlp: nn.Module) -> TypeGuard[_GatedMLP]:
    """Whether the module holds the three products of a gated MLP, in a form that the kernel takes."""
    products = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    linear = [product for product in products if _is_plain_linear(product)]
    # A `forward` in an instance is a replacement by other code.
    if len(linear) < 3 or any("forward" in vars(module) for module in (mlp, *linear)):
        return False
    gate, up = linear[0].weight, linear[1].weight
    alike = (gate.shape, gate.dtype, gate.device) == (up.shape, up.dtype, up.device)
    aligned = all(size % _ALIGNED == 0 for size in gate.shape)
    return alike and aligned and gate.dtype in _DTYPES and _is_hopper(gate.device)


def _is_plain_linear(module: object) -> TypeGuard[nn.Linear]:
    # Exact types: quantised weights are a subclass of `nn.Parameter`, or belong to a subclass of `nn.Linear`.
    return type(module) is nn.Linear and type(module.weight) is nn.Parameter and module.bias is None


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER


@torch.no_grad()
def _equals_modules(mlp: _GatedMLP, weight_2IH: Tensor) -> bool:
    """Whether the fused MLP gives what its modules give, up to rounding."""
    generator = torch.Generator().manual_seed(0)
    probe_NH = torch.randn(_PROBE_ROWS, weight_2IH.shape[2], generator=generator).to(weight_2IH)
    largest = F.linear(probe_NH, weight_2IH.flatten(0, 1)).abs().max().float().clamp_min(1e-6)
    for wanted in _PROBE_LARGEST:
        rows_NH = probe_NH * (wanted / largest).to(probe_NH.dtype)
        fused_NH = mlp.down_proj(_gated_product(rows_NH, weight_2IH))
        if not relative_error(fused_NH, mlp(rows_NH)) <= ROUNDING[weight_2IH.dtype]:
            return False
    return True


def _fused_forward(mlp: _GatedMLP, hidden: Tensor) -> Tensor:
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

"""Gated MLPs whose gate is applied inside the matrix product, where modules take two products and two passes over what they gave.

Legend: N rows, H hidden, I intermediate width.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eagle_rpc.target.probes import ROUNDING, relative_error

logger = logging.getLogger(__name__)

# Compute capability of the GPUs that the kernel was made for and measured on.
_HOPPER = 9
_DTYPES = (torch.bfloat16, torch.float16)
# Elements of these formats in the 16 bytes that rows of all three matrices have to be multiples of.
_ALIGNED = 8
# Rows of a probe, and the largest of its gates and ups: small ones as layers have them, large ones that some MLPs clamp.
_PROBE_ROWS, _PROBE_LARGEST = 8, (4.0, 100.0)


class FusedMLPs:
    """Those of some modules that compute `down(silu(gate(x)) * up(x))`, as a probe of each has shown.

    Their gate and up weights become the halves of one tensor, so from then on the modules must not be moved or given other weights.
    Empty where there is no Hopper GPU with Triton, or no such MLP.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._mlps: list[nn.Module] = []
        told = False
        for mlp in filter(_is_candidate, modules):
            try:
                weight_2IH = _gate_and_up(mlp)
                if _gives_the_same(mlp, weight_2IH):
                    _merge(mlp, weight_2IH)
                    self._mlps.append(mlp)
            except Exception:
                # No Triton, no C compiler, a refused kernel, an odd module: each raises errors of its own, and modules run everywhere.
                if not told:
                    logger.warning(
                        "MLPs run as their modules do where a probe fails (target.fused_mlp)", exc_info=True
                    )
                told = True
        if self._mlps:
            # Two freed weights lie apart in torch's cache, where the next pair does not fit.
            torch.cuda.empty_cache()

    def __len__(self) -> int:
        return len(self._mlps)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Meanwhile the modules' `forward` is the fused one."""
        try:
            for mlp in self._mlps:
                mlp.forward = MethodType(_fused_forward, mlp)
            yield
        finally:
            for mlp in self._mlps:
                vars(mlp).pop("forward", None)


def _is_candidate(mlp: nn.Module) -> bool:
    """Whether it holds the products of a gated MLP, in a form that the kernel takes."""
    parts = [getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")]
    # Quantised weights are of a class of their own in modules of the plain one.
    if not all(
        type(part) is nn.Linear and type(part.weight) is nn.Parameter and part.bias is None for part in parts
    ):
        return False
    if any("forward" in vars(module) for module in (mlp, *parts)):
        # Somebody else has replaced it.
        return False
    gate, up = parts[0].weight, parts[1].weight
    alike = (gate.shape, gate.dtype, gate.device) == (up.shape, up.dtype, up.device)
    aligned = all(size % _ALIGNED == 0 for size in gate.shape)
    return alike and aligned and gate.dtype in _DTYPES and _is_hopper(gate.device)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER


@torch.no_grad()
def _gate_and_up(mlp: nn.Module) -> Tensor:
    return torch.stack((mlp.gate_proj.weight, mlp.up_proj.weight))


@torch.no_grad()
def _gives_the_same(mlp: nn.Module, weight_2IH: Tensor) -> bool:
    """Whether the MLP is one to rounding with its gate inside the product."""
    probe_NH = torch.randn(_PROBE_ROWS, weight_2IH.shape[2], generator=torch.Generator().manual_seed(0)).to(
        weight_2IH
    )
    largest = F.linear(probe_NH, weight_2IH.flatten(0, 1)).abs().max().float().clamp_min(1e-6)
    for wanted in _PROBE_LARGEST:
        rows_NH = probe_NH * (wanted / largest).to(probe_NH.dtype)
        fused_NH = mlp.down_proj(_gated_product(rows_NH, weight_2IH))
        if not relative_error(fused_NH, mlp(rows_NH)) <= ROUNDING[weight_2IH.dtype]:
            return False
    return True


def _merge(mlp: nn.Module, weight_2IH: Tensor) -> None:
    mlp.gate_up_weight = weight_2IH
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = weight_2IH


def _fused_forward(mlp: nn.Module, hidden: Tensor) -> Tensor:
    gated_NI = _gated_product(hidden.flatten(0, -2), mlp.gate_up_weight)
    return mlp.down_proj(gated_NI.unflatten(0, hidden.shape[:-1]))


@torch.library.custom_op("eagle_rpc::gated_product", mutates_args=())
def _gated_product(hidden_NH: Tensor, weight_2IH: Tensor) -> Tensor:
    # Only torch for CUDA brings Triton.
    from eagle_rpc.target.gated_kernel import gated_product

    return gated_product(hidden_NH.contiguous(), weight_2IH)


@_gated_product.register_fake
def _(hidden_NH: Tensor, weight_2IH: Tensor) -> Tensor:
    return hidden_NH.new_empty(hidden_NH.shape[0], weight_2IH.shape[1])

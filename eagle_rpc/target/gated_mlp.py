"""Gated MLPs whose gate is applied inside the matrix product, where modules take two products and two passes over what they gave.

Legend: N rows, H hidden, F feed-forward width.
"""

import logging
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

from eagle_rpc.target.probes import ROUNDING, relative_error

logger = logging.getLogger(__name__)

# Compute capability of the GPUs that the kernel was made for and measured on.
_HOPPER = 9
_DTYPES = (torch.bfloat16, torch.float16)
# Elements of these formats in the 16 bytes that rows have to be multiples of.
_ALIGNED = 8
# Rows of a probe, and how large their elements are: some MLPs clamp what is large.
_PROBE_ROWS, _PROBE_SCALES = 8, (1.0, 100.0)


class FusedMLPs:
    """Those of some modules that compute `down(silu(gate(x)) * up(x))`, as a probe of each has shown.

    Their gate and up weights become the halves of one tensor, which nobody sees who uses the modules. Empty where there is no
    Hopper GPU with Triton, or no such MLP.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._mlps: list[nn.Module] = []
        try:
            self._mlps.extend(mlp for mlp in modules if _is_candidate(mlp) and _fuse(mlp))
        except Exception:
            # Triton's errors have no class in common.
            logger.warning("the other MLPs run as their modules do, since a probe failed (target.fused_mlp)", exc_info=True)

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
    if not all(type(part) is nn.Linear and type(part.weight) is nn.Parameter and part.bias is None for part in parts):
        return False
    gate, up = parts[0].weight, parts[1].weight
    return _is_hopper(gate.device) and gate.dtype in _DTYPES and gate.shape == up.shape and gate.shape[1] % _ALIGNED == 0


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER


@torch.no_grad()
def _fuse(mlp: nn.Module) -> bool:
    """Whether the MLP gives the same with its gate inside the product; then its weights are ready for `_fused_forward`."""
    weight_2FH = torch.stack((mlp.gate_proj.weight, mlp.up_proj.weight))
    generator = torch.Generator().manual_seed(0)
    probe_NH = torch.randn(_PROBE_ROWS, weight_2FH.shape[2], generator=generator).to(weight_2FH)
    mlp.gate_up_weight = weight_2FH
    for scale in _PROBE_SCALES:
        if not relative_error(_fused_forward(mlp, scale * probe_NH), mlp(scale * probe_NH)) <= ROUNDING[weight_2FH.dtype]:
            del mlp.gate_up_weight
            return False
    mlp.gate_proj.weight.data, mlp.up_proj.weight.data = weight_2FH
    return True


def _fused_forward(mlp: nn.Module, hidden: Tensor) -> Tensor:
    gated_NF = _gated_product(hidden.flatten(0, -2), mlp.gate_up_weight)
    return mlp.down_proj(gated_NF.unflatten(0, hidden.shape[:-1]))


@torch.library.custom_op("eagle_rpc::gated_product", mutates_args=())
def _gated_product(hidden_NH: Tensor, weight_2FH: Tensor) -> Tensor:
    # Only torch for CUDA brings Triton.
    from eagle_rpc.target.gated_kernel import gated_product

    return gated_product(hidden_NH.contiguous(), weight_2FH)


@_gated_product.register_fake
def _(hidden_NH: Tensor, weight_2FH: Tensor) -> Tensor:
    return hidden_NH.new_empty(hidden_NH.shape[0], weight_2FH.shape[1])

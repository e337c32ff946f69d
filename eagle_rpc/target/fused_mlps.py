"""Feed-forward blocks that run as kernels of this package, where a probe of each shows the same results."""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import MethodType

import torch
from torch import Tensor, nn

from eagle_rpc.target import experts, gated_mlp

logger = logging.getLogger(__name__)

# Compute capability of the GPUs that the kernels were written for and measured on.
_HOPPER = 9
_KINDS = (gated_mlp, experts)


class FusedMLPs:
    """Those of `modules` that are gated MLPs with SiLU, or experts of such, as a probe of each has shown.

    Gate and up weights of MLPs become the halves of one tensor, so the modules must not be moved or given other
    weights afterwards. Empty without a Hopper GPU and Triton, or without such a module.
    """

    def __init__(self, modules: Iterable[nn.Module]) -> None:
        self._forwards: list[tuple[nn.Module, Callable[..., Tensor]]] = []
        warned = False
        for module in modules:
            kind = next((kind for kind in _KINDS if kind.is_candidate(module)), None)
            if kind is None or not all(_is_hopper(weight.device) for weight in module.parameters()):
                continue
            try:
                if kind.fuse(module):
                    self._forwards.append((module, kind.fused_forward))
            except Exception:
                # No Triton, no C compiler, a refused kernel, an unusual module: each raises other errors.
                if not warned:
                    message = "some MLPs run as their modules do: the probe for target.fused_mlp failed"
                    logger.warning(message, exc_info=True)
                warned = True
        if self._forwards:
            # The freed weights leave gaps in torch's cache that are too small for the next pair.
            torch.cuda.empty_cache()

    def __len__(self) -> int:
        return len(self._forwards)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Inside the block the modules' `forward` is the fused one."""
        try:
            for module, forward in self._forwards:
                module.forward = MethodType(forward, module)
            yield
        finally:
            for module, _ in self._forwards:
                vars(module).pop("forward", None)


def _is_hopper(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] == _HOPPER

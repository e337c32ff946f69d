"""Where the tests of this folder run, and what those of kernels share."""

import importlib.util
import os

import pytest
import torch

ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ON_TWO_GPUS = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices"),
]
# Where there is no GPU, Triton's interpreter runs kernels on the CPU.
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1" and importlib.util.find_spec("triton") is not None
HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability()[0] == 9
needs_hopper = pytest.mark.skipif(not HOPPER, reason="needs a Hopper GPU")
ON_HOPPER_OR_INTERPRETED = [
    pytest.mark.gpu,
    pytest.mark.skipif(not (HOPPER or INTERPRETED), reason="needs a Hopper GPU or Triton's interpreter"),
]
DEVICE_OF_KERNELS = "cuda" if HOPPER else "cpu"


def count_multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Three programs, which share tiles, where there is no GPU to count them."""
    if not HOPPER:
        from eagle_rpc.target import gated_kernel

        monkeypatch.setattr(gated_kernel, "_multiprocessors", lambda device: 3)


def drawn(*shape: int, dtype: torch.dtype, scale: float = 1.0) -> torch.Tensor:
    """Normal values that depend on the shape alone."""
    generator = torch.Generator().manual_seed(sum(shape))
    return (scale * torch.randn(*shape, generator=generator)).to(DEVICE_OF_KERNELS, dtype)

"""Root-mean-square norm, computed in fp32 as in Llama."""

import torch
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """`weight * x / rms(x)`, computed in fp32 (fp64 for fp64 inputs) and returned in the dtype of `x`."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        scaled = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight.to(x.dtype) * scaled.to(x.dtype)

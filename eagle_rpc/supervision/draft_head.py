"""The draft-vocab rows of the target's output head.

Legend: N rows, H target hidden, K draft vocab.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(kw_only=True, slots=True)
class DraftHead:
    """`soft_cap * tanh((hidden @ weight.T + bias) * scale / soft_cap)`, in the target's dtype."""

    weight: Tensor  # [K, H]
    bias: Tensor | None = None  # [K]
    scale: float | None = None
    soft_cap: float | None = None

    def project(self, hidden_NH: Tensor) -> Tensor:
        """Draft-vocab logits [N, K] of last hidden states, in their dtype."""
        logits_NK = F.linear(hidden_NH, self.weight, self.bias)
        if self.scale is not None:
            logits_NK = logits_NK * self.scale
        if self.soft_cap is not None:
            logits_NK = torch.tanh(logits_NK / self.soft_cap) * self.soft_cap
        return logits_NK

    def to(self, device: torch.device) -> "DraftHead":
        bias = None if self.bias is None else self.bias.to(device)
        return replace(self, weight=self.weight.to(device), bias=bias)

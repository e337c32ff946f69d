"""Rotary position embedding in Llama's rotate-half form (arXiv 2104.09864), with angles and tables in fp32.

Legend: B batch, T sequence, D head width.
"""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.errors import ConfigError

RopeTables = tuple[Tensor, Tensor]  # cosines and sines, each [B or 1, 1, T, D/2] fp32


def check_rope_scaling(scaling: dict[str, Any] | None) -> None:
    """Raises `ConfigError` unless `scaling` is None or of a supported `rope_type` with positive numbers."""
    if scaling is None:
        return
    rope_type = scaling.get("rope_type")
    if rope_type not in _SCALINGS:
        raise ConfigError(f"rope_scaling.rope_type must be one of {', '.join(_SCALINGS)}, got {rope_type!r}")
    _, fields = _SCALINGS[rope_type]
    for name in fields:
        value = scaling.get(name)
        if not isinstance(value, (int, float)) or value <= 0:
            raise ConfigError(
                f"rope_scaling.{name} must be a positive number for rope_type {rope_type}, got {value!r}"
            )
    if rope_type == "llama3" and scaling["high_freq_factor"] <= scaling["low_freq_factor"]:
        raise ConfigError(
            f"rope_scaling.high_freq_factor must be above low_freq_factor {scaling['low_freq_factor']}, "
            f"got {scaling['high_freq_factor']}"
        )


class RotaryEmbedding:
    """Tables of cosines and sines. Not a module: casting the draft to bf16 must not round the frequencies."""

    def __init__(self, head_dim: int, theta: float, scaling: dict[str, Any] | None) -> None:
        exponents = torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float32) / head_dim
        frequencies = 1.0 / theta**exponents
        if scaling is not None:
            scale, _ = _SCALINGS[scaling["rope_type"]]
            frequencies = scale(frequencies, scaling)
        self._frequencies = frequencies  # [D/2], radians per position

    def tables(self, positions_BT: Tensor) -> RopeTables:
        """Tables for integer positions [B or 1, T], on their device."""
        if self._frequencies.device != positions_BT.device:
            self._frequencies = self._frequencies.to(positions_BT.device)
        angles = positions_BT[:, None, :, None].float() * self._frequencies
        return angles.cos(), angles.sin()


def rotate(x: Tensor, tables: RopeTables) -> Tensor:
    """Rotates heads [B, heads, T, D] by the angles of the tables; same dtype."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _scale_linear(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    return frequencies / scaling["factor"]


def _scale_llama3(frequencies: Tensor, scaling: dict[str, Any]) -> Tensor:
    """Llama 3.1's: stretches long wavelengths by `factor`, keeps short ones, blends in between."""
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    kept_share = ((turns - low) / (high - low)).clamp(0, 1)
    return frequencies * kept_share + frequencies / scaling["factor"] * (1 - kept_share)


_SCALINGS: dict[str, tuple[Callable[[Tensor, dict[str, Any]], Tensor], tuple[str, ...]]] = {
    "linear": (_scale_linear, ("factor",)),
    "llama3": (
        _scale_llama3,
        ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
    ),
}

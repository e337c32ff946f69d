"""Rotary position embedding in Llama's rotate-half form (arXiv 2104.09864), with angles and tables in fp32.

Every kind that transformers knows has transformers' own frequencies. Legend: B batch, T sequence, D head width.
"""

from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from eagle_rpc.errors import ConfigError
from eagle_rpc.sizes.draft import Eagle3DraftConfig

RopeTables = tuple[Tensor, Tensor]  # cosines and sines, each [B or 1, 1, T, D/2] fp32


class RotaryEmbedding:
    """Tables of cosines and sines. Not a module: casting the draft to bf16 must not round the frequencies."""

    def __init__(
        self, head_dim: int, theta: float, scaling: dict[str, Any] | None, *, context: int, length: int
    ) -> None:
        """`scaling`: transformers' form, with `rope_type`; null: none.

        `context`: the longest position; `length`: that of the sequences in use, by which `longrope` chooses
        its factors. Raises `ConfigError` for an unknown `rope_type` or fields that do not suit it.
        """
        self._frequencies, self.factor = _frequencies_of(head_dim, theta, scaling, context, length)

    def tables(self, positions_BT: Tensor) -> RopeTables:
        """Tables for integer positions [B or 1, T], on their device."""
        if self._frequencies.device != positions_BT.device:
            self._frequencies = self._frequencies.to(positions_BT.device)
        angles = positions_BT[:, None, :, None].float() * self._frequencies
        return angles.cos() * self.factor, angles.sin() * self.factor


def rotary_embedding(draft: Eagle3DraftConfig) -> RotaryEmbedding:
    """The tables of a draft. Raises `ConfigError` for a `rope_scaling` that gives none."""
    context = draft.max_position_embeddings
    length = draft.rope_length or context
    return RotaryEmbedding(
        draft.head_dim, draft.rope_theta, draft.rope_scaling, context=context, length=length
    )


def rotate(x: Tensor, tables: RopeTables) -> Tensor:
    """Rotates heads [B, heads, T, D] by the angles of the tables; same dtype."""
    cos, sin = tables
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _frequencies_of(
    head_dim: int, theta: float, scaling: dict[str, Any] | None, context: int, length: int
) -> tuple[Tensor, float]:
    """Radians per position [D/2], and the factor of cosines and sines."""
    if scaling is None:
        exponents = torch.arange(0, head_dim, 2, device="cpu", dtype=torch.float32) / head_dim
        return 1.0 / theta**exponents, 1.0
    kind = scaling.get("rope_type")
    if kind not in ROPE_INIT_FUNCTIONS:
        raise ConfigError(
            f"rope_scaling.rope_type must be one of {', '.join(ROPE_INIT_FUNCTIONS)}, got {kind!r}; "
            "use draft.rope=plain"
        )
    rule = f"rope_scaling must hold what rope_type {kind} needs for heads of {head_dim}"
    try:
        shape = LlamaConfig(
            hidden_size=head_dim,
            num_attention_heads=1,
            head_dim=head_dim,
            max_position_embeddings=context,
            rope_parameters={"rope_theta": theta, **scaling},
        )
        # Also for a draft on the meta device.
        with torch.device("cpu"):
            frequencies, factor = ROPE_INIT_FUNCTIONS[kind](shape, seq_len=length)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        why = f"{type(error).__name__}: {error}"
        raise ConfigError(f"{rule}, got {scaling} ({why}); use draft.rope=plain") from error
    good = len(frequencies) == head_dim // 2 and frequencies.isfinite().all() and factor > 0
    if not good or frequencies.min() < 0:
        raise ConfigError(f"{rule}, got {scaling}; use draft.rope=plain")
    return frequencies, float(factor)

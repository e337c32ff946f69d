"""The dimensions of a draft, and how they follow from the target's."""

from dataclasses import dataclass, fields
from typing import Any

from eagle_rpc.draft.rope import check_rope_scaling
from eagle_rpc.errors import ConfigError


@dataclass(frozen=True, kw_only=True, slots=True)
class Eagle3DraftConfig:
    """A Llama-style EAGLE-3 draft of one decoder layer. Raises `ConfigError` on values that cannot work."""

    hidden_size: int  # the target's
    intermediate_size: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int  # the target's
    draft_vocab_size: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # transformers' form, with `rope_type`; null: plain rotary embedding
    max_position_embeddings: int
    hidden_act: str = "silu"
    norm_before_residual: bool = False

    def __post_init__(self) -> None:
        for field in fields(self):
            if field.type in (int, float) and getattr(self, field.name) <= 0:
                raise ConfigError(f"{field.name} must be positive, got {getattr(self, field.name)}")
        if self.draft_vocab_size > self.vocab_size:
            raise ConfigError(
                f"draft_vocab_size must be at most the target's {self.vocab_size}, "
                f"got {self.draft_vocab_size}"
            )
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads must be a multiple of num_key_value_heads {self.num_key_value_heads}, "
                f"got {self.num_attention_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even (rotary halves), got {self.head_dim}")
        if self.hidden_act != "silu":
            raise ConfigError(
                f"hidden_act must be silu (serving engines build no other draft), got {self.hidden_act!r}"
            )
        check_rope_scaling(self.rope_scaling)

    @classmethod
    def from_target(
        cls,
        target_config: Any,
        *,
        draft_vocab_size: int,
        intermediate_size: int | None = None,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        norm_before_residual: bool = False,
    ) -> "Eagle3DraftConfig":
        """The draft of a target with this `transformers` config; None takes the target's value.

        The draft is Llama-style for every target: norms of queries and keys, soft caps, sliding windows and
        other activations of a Gemma or Qwen target are left out.
        """

        def or_else(setting: int | None, of_target: int) -> int:
            return of_target if setting is None else setting

        target_heads = target_config.num_attention_heads
        head_dim = getattr(target_config, "head_dim", None) or target_config.hidden_size // target_heads
        target_kv_heads = getattr(target_config, "num_key_value_heads", None) or target_heads
        rope_theta, rope_scaling = _rope_of(target_config)
        return cls(
            hidden_size=target_config.hidden_size,
            intermediate_size=or_else(intermediate_size, target_config.intermediate_size),
            num_attention_heads=or_else(num_attention_heads, target_heads),
            num_key_value_heads=or_else(num_key_value_heads, target_kv_heads),
            head_dim=head_dim,
            vocab_size=target_config.vocab_size,
            draft_vocab_size=draft_vocab_size,
            rms_norm_eps=getattr(target_config, "rms_norm_eps", 1e-6),
            rope_theta=rope_theta,
            rope_scaling=rope_scaling,
            max_position_embeddings=target_config.max_position_embeddings,
            norm_before_residual=norm_before_residual,
        )


def _rope_of(target_config: Any) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and `rope_scaling`, from either form that transformers has used."""
    parameters = getattr(target_config, "rope_parameters", None)
    if parameters is None:
        parameters = getattr(target_config, "rope_scaling", None) or {}
    # Targets that mix kinds of attention have one set a kind; the draft's attention is full.
    parameters = dict(parameters.get("full_attention") or parameters)
    theta = parameters.pop("rope_theta", None) or getattr(target_config, "rope_theta", None) or 10000.0
    # The draft rotates whole heads even if its target rotates only a share of each.
    parameters.pop("partial_rotary_factor", None)
    rope_type = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if rope_type == "default":
        return float(theta), None
    if rope_type == "llama3":
        parameters.setdefault("original_max_position_embeddings", target_config.max_position_embeddings)
    return float(theta), {"rope_type": rope_type, **parameters}

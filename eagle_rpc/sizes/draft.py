"""The dimensions of a draft, and how they follow from the target's."""

from dataclasses import dataclass, fields
from typing import Any

from eagle_rpc.errors import ConfigError
from eagle_rpc.sizes.target import TargetShape


@dataclass(frozen=True, kw_only=True, slots=True)
class Eagle3DraftConfig:
    """A Llama-style EAGLE-3 draft. Raises `ConfigError` on values that cannot work.

    What `rope_scaling` holds is transformers' affair: `draft.rope.rotary_embedding` judges it.
    """

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
    rope_length: int | None = (
        None  # tokens by which `longrope` chooses its factors; null: the longest context
    )
    hidden_act: str = "silu"
    norm_before_residual: bool = False
    num_layers: int = 1  # decoder layers; the first alone reads token embeddings
    sliding_window: int | None = None  # tokens that a query attends to, its own included; null: all earlier
    num_aux_layers: int = 3  # captured layers
    norm_before_fc: bool = False  # one norm over the captured states side by side, before `fc`
    fc_norm: bool = False  # a norm for each captured layer, before `fc`
    norm_output: bool = False  # each step reads the normed output of the step before

    def __post_init__(self) -> None:
        for field in fields(self):
            value = getattr(self, field.name)
            if field.type in (int, float, int | None) and value is not None and value <= 0:
                raise ConfigError(f"{field.name} must be positive, got {value}")
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

    def num_parameters(self, *, embedding: bool) -> int:
        """Of the draft, with its token embedding or without it."""
        hidden, width = self.hidden_size, self.num_aux_layers * self.hidden_size
        heads, key_heads = (
            number * self.head_dim for number in (self.num_attention_heads, self.num_key_value_heads)
        )
        feed_forward = 3 * hidden * self.intermediate_size
        # Queries, keys and values of each input, and the output; the first layer reads two inputs.
        per_input = (heads + 2 * key_heads) * hidden
        first = 2 * per_input + heads * hidden + feed_forward + 3 * hidden
        further = per_input + heads * hidden + feed_forward + 2 * hidden
        fusion = width * hidden + (self.norm_before_fc + self.fc_norm) * width
        ends = hidden + self.draft_vocab_size * hidden + embedding * self.vocab_size * hidden
        return fusion + first + (self.num_layers - 1) * further + ends

    @classmethod
    def from_target(
        cls,
        target: TargetShape,
        *,
        draft_vocab_size: int,
        intermediate_size: int | None = None,
        num_attention_heads: int | None = None,
        num_key_value_heads: int | None = None,
        plain_rope: bool = False,
        max_length: int | None = None,
    ) -> "Eagle3DraftConfig":
        """The draft of a target; None takes the target's value. `max_length`: of the sequences in use.

        The draft is Llama-style for every target: norms of queries and keys, soft caps, sliding windows and
        other activations of a Gemma or Qwen target are left out. Raises `ConfigError` for a size that neither
        the target nor an argument gives.
        """

        def given(name: str, setting: int | None, of_target: int | None) -> int:
            size = of_target if setting is None else setting
            if size is None:
                raise ConfigError(
                    f"draft.{name} must be given for a target of type {target.model_type}, whose configuration "
                    "names none"
                )
            return size

        heads = given("num_attention_heads", num_attention_heads, target.num_attention_heads)
        key_heads = target.num_key_value_heads or heads
        scaling = None if plain_rope else target.rope_scaling
        is_longrope = scaling is not None and scaling["rope_type"] == "longrope"
        return cls(
            hidden_size=target.hidden_size,
            intermediate_size=given("intermediate_size", intermediate_size, target.intermediate_size),
            num_attention_heads=heads,
            num_key_value_heads=key_heads if num_key_value_heads is None else num_key_value_heads,
            head_dim=target.head_dim or target.hidden_size // heads,
            vocab_size=target.vocab_size,
            draft_vocab_size=draft_vocab_size,
            rms_norm_eps=target.rms_norm_eps,
            rope_theta=target.rope_theta,
            rope_scaling=scaling,
            max_position_embeddings=target.context or target.length(max_length),
            rope_length=max_length if is_longrope else None,
        )

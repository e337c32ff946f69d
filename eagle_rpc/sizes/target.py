"""The shape of a target: what a draft, a trainer and a plan need to know of it, read once from its configuration."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from eagle_rpc.errors import ConfigError

# What the families of transformers call the same thing, the most telling name first.
_VOCABULARY = ("vocab_size", "text_vocab_size")
_HIDDEN = ("hidden_size", "n_embd", "d_model")
_LAYERS = ("decoder_layers", "num_decoder_layers", "num_layers", "num_hidden_layers", "n_layer")
_HEADS = ("num_attention_heads", "decoder_attention_heads", "n_head", "n_heads", "num_heads")
_KEY_HEADS = ("num_key_value_heads", "num_kv_heads", "n_head_kv", "multi_query_group_num")
_WIDTH = ("intermediate_size", "ffn_hidden_size", "decoder_ffn_dim", "ffn_dim", "n_inner", "dim_ff", "dff")
_EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size")
_EXPERTS = ("num_experts_per_tok", "num_experts_per_token", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
# Beside them: the width of the experts that every token passes, or their number.
_SHARED_WIDTH = (
    "shared_expert_intermediate_size",
    "shared_experts_intermediate_size",
    "moe_shared_expert_intermediate_size",
    "shared_intermediate_size",
)
_SHARED_EXPERTS = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts")
# Of layers without experts, in a model that has both.
_DENSE_WIDTH = ("intermediate_size_mlp",)
_CONTEXT = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length", "n_ctx")
_EPSILON = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "eps")
# Key heads of a draft whose target stores latents instead of keys.
_KEY_HEADS_OF_LATENT = 8


@dataclass(frozen=True, kw_only=True, slots=True)
class TargetShape:
    """Sizes of a target, and those of a draft that suits it. Null: its configuration names none."""

    model_type: str
    vocab_size: int
    hidden_size: int
    num_layers: int
    context: int | None  # longest sequence in tokens
    num_attention_heads: int | None
    num_key_value_heads: int | None
    head_dim: int | None
    intermediate_size: int | None  # of experts: those that a token passes, together
    experts_per_token: int | None  # null: it has none
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict[str, Any] | None  # transformers' form, with `rope_type`; null: plain rotary embedding
    bos_token_id: int | None
    eos_token_id: int | list[int] | None

    @classmethod
    def of(cls, config: Any) -> "TargetShape":
        """The shape of the text model of a transformers configuration.

        Raises `ConfigError` without vocabulary, hidden size or number of layers.
        """
        text = config.get_text_config()
        names = {"vocab_size": _VOCABULARY, "hidden_size": _HIDDEN, "num_layers": _LAYERS}
        sizes: dict[str, int] = {}
        for name, aliases in names.items():
            if size := _integer(text, aliases):
                sizes[name] = size
        if missing := names.keys() - sizes.keys():
            raise ConfigError(
                f"target.model must be a causal language model, got one of type {config.model_type} "
                f"without {', '.join(sorted(missing))}"
            )
        context = _integer(text, _CONTEXT)
        heads, key_heads, head_dim = _heads_of(text, sizes["hidden_size"])
        theta, scaling = _rope_of(text, context)
        return cls(
            model_type=config.model_type,
            context=context,
            **sizes,
            num_attention_heads=heads,
            num_key_value_heads=key_heads,
            head_dim=head_dim,
            intermediate_size=_width_of(text),
            experts_per_token=_integer(text, _EXPERTS),
            rms_norm_eps=next((_read(text, name) for name in _EPSILON if _read(text, name)), 1e-6),
            rope_theta=theta,
            rope_scaling=scaling,
            bos_token_id=_token_of(config, text, "bos_token_id"),
            eos_token_id=_token_of(config, text, "eos_token_id"),
        )

    def length(self, max_length: int | None) -> int:
        """Longest sequence, with `target.max_length`. Raises `ConfigError` if neither names one."""
        length = max_length or self.context
        if length is None:
            raise ConfigError(
                f"target.max_length must be given for type {self.model_type}, whose configuration has no "
                "longest context"
            )
        return length


def aux_layers(num_layers: int, wanted: Sequence[int] | None) -> tuple[int, ...]:
    """The layers to capture, counted from 0, read after the layer; by default `[1, L//2 - 1, L - 4]`.

    Raises `ConfigError` unless they are distinct ids in range; shallow targets have no default.
    """
    ids = tuple(wanted) if wanted is not None else (1, num_layers // 2 - 1, num_layers - 4)
    if not ids or len(set(ids)) != len(ids) or not all(0 <= layer < num_layers for layer in ids):
        origin = "got" if wanted is not None else "shallow targets must name theirs, the default would be"
        rule = f"target.aux_layer_ids must be distinct ids in [0, {num_layers})"
        raise ConfigError(f"{rule}, {origin} {list(ids)}")
    return ids


def _read(config: Any, name: str) -> Any:
    try:
        return getattr(config, name, None)
    except RuntimeError:
        # Values that differ between layers are refused as attributes; the common one is still stored.
        return config.to_dict().get(name)


def _integer(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of the names that holds a size; of a list of layers the largest."""
    for name in names:
        value = _read(config, name)
        if isinstance(value, (list, tuple)) and value and all(isinstance(size, int) for size in value):
            return max(value)
        if isinstance(value, int) and value > 0:
            return value
    return None


def _heads_of(text: Any, hidden_size: int) -> tuple[int | None, int | None, int | None]:
    """Heads, key heads and width: the target's, or those of its values where keys are stored as latents."""
    heads, width = _integer(text, _HEADS), _integer(text, ("head_dim",))
    key_heads = _integer(text, _KEY_HEADS) or heads
    if _integer(text, ("kv_lora_rank",)):
        width = min(_integer(text, ("v_head_dim",)) or hidden_size, hidden_size)
        heads = hidden_size // width
        key_heads = math.gcd(heads, _KEY_HEADS_OF_LATENT)
    elif heads and _read(text, "multi_query") and not _read(text, "new_decoder_architecture"):
        key_heads = 1
    if heads and width is None:
        width = hidden_size // heads
    return heads, key_heads, width


def _width_of(text: Any) -> int | None:
    """Width of the feed-forward block; of experts that of all that a token passes, or of dense layers beside them."""
    width, expert_width = _integer(text, _WIDTH), _integer(text, _EXPERT_WIDTH)
    if active := _integer(text, _EXPERTS):
        one = expert_width or width or 0
        shared = _integer(text, _SHARED_WIDTH) or (_integer(text, _SHARED_EXPERTS) or 0) * one
        return max(active * one + shared, width or 0, _integer(text, _DENSE_WIDTH) or 0) or None
    if width is None and hasattr(text, "n_inner"):
        # transformers documents null as this.
        return 4 * _read(text, "hidden_size")
    return width


def _rope_of(text: Any, context: int | None) -> tuple[float, dict[str, Any] | None]:
    """`rope_theta` and `rope_scaling`, from either form that transformers has used."""
    parameters = _read(text, "rope_parameters")
    if parameters is None:
        parameters = _read(text, "rope_scaling") or {}
    # Targets that mix kinds of attention have one set a kind; the draft's attention is full.
    parameters = dict(parameters.get("full_attention") or parameters)
    theta = parameters.pop("rope_theta", None) or _read(text, "rope_theta") or 10000.0
    kind = parameters.pop("rope_type", None) or parameters.pop("type", None) or "default"
    parameters.pop("type", None)
    if kind != "proportional":
        # The draft rotates whole heads even if its target rotates only a share of each.
        parameters.pop("partial_rotary_factor", None)
    if kind == "default":
        return float(theta), None
    if context is not None and kind in ("llama3", "yarn", "longrope"):
        parameters.setdefault("original_max_position_embeddings", context)
    return float(theta), {"rope_type": kind, **parameters}


def _token_of(config: Any, text: Any, name: str) -> Any:
    outer = _read(config, name)
    return _read(text, name) if outer is None else outer

"""Sizes of the plainest families by formula from their stored configuration: what transformers would build.

These are decoders as Llama's: attention with grouped heads, a gated feed-forward block, two norms a layer. A
configuration that leaves a deciding field to the defaults of its class is left to transformers.
"""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

from eagle_rpc.sizes.outline import Outline, Part, TargetSizes
from eagle_rpc.sizes.target import TargetShape

_CLASSES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_COUNTS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "max_position_embeddings",
)
_NAMED = ("rms_norm_eps", "tie_word_embeddings", "bos_token_id", "eos_token_id")
# Numbers without which transformers has no such rotary embedding.
_LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


class _Stored(SimpleNamespace):
    """A stored configuration as `TargetShape` reads those of transformers."""

    def get_text_config(self) -> "_Stored":
        return self


def sizes_by_formula(stored: Mapping[str, Any]) -> TargetSizes | None:
    """The sizes of a stored configuration; null for one that only transformers understands."""
    if stored.get("model_type") not in _CLASSES or not _names_all(stored):
        return None
    shape = TargetShape.of(_Stored(**stored))
    return TargetSizes(
        shape=shape,
        outline=_outline(stored, shape),
        sdpa=True,
        quantization=stored.get("quantization_config"),
    )


def _names_all(stored: Mapping[str, Any]) -> bool:
    counts = [stored.get(name) for name in _COUNTS]
    if not all(type(count) is int and count > 0 for count in counts):
        return False
    if not all(name in stored for name in _NAMED) or not _plain_rope(stored):
        return False
    # Qwen3's class has a width of heads of its own.
    has_width = stored.get("head_dim") is not None or stored["model_type"] != "qwen3"
    heads = stored["num_attention_heads"]
    return has_width and stored["hidden_size"] % heads == 0 and heads % stored["num_key_value_heads"] == 0


def _plain_rope(stored: Mapping[str, Any]) -> bool:
    """Whether the rotary embedding is plain or Llama 3's, with all of its numbers."""
    parameters = stored.get("rope_parameters") or stored.get("rope_scaling") or {}
    if "rope_theta" not in {**stored, **parameters}:
        return False
    kind = parameters.get("rope_type") or parameters.get("type") or "default"
    if kind == "default":
        return True
    numbers: list[Any] = [parameters.get(name) for name in _LLAMA3_ROPE]
    if kind != "llama3" or not all(isinstance(number, (int, float)) and number > 0 for number in numbers):
        return False
    _, low, high, _ = numbers
    return bool(low < high)


def _outline(stored: Mapping[str, Any], shape: TargetShape) -> Outline:
    layer, rows = _layer(stored, shape), shape.vocab_size * shape.hidden_size
    tied = bool(stored["tie_word_embeddings"])
    embedding, head = Part(rows), Part(rows, shape.hidden_size, rows)
    whole = Part(rows if tied else 2 * rows, shape.hidden_size, rows)
    in_layers = shape.num_layers * (layer.matrices + layer.others)
    return Outline(
        name=_CLASSES[stored["model_type"]],
        num_parameters=int(in_layers + whole.matrices + whole.others),
        layers=(layer,) * shape.num_layers,
        whole=whole,
        before=embedding,
        behind=head,
        undivided=None,
    )


def _layer(stored: Mapping[str, Any], shape: TargetShape) -> Part:
    family, hidden, width = stored["model_type"], shape.hidden_size, stored["intermediate_size"]
    assert shape.head_dim and shape.num_attention_heads and shape.num_key_value_heads
    queries = shape.num_attention_heads * shape.head_dim
    keys = shape.num_key_value_heads * shape.head_dim
    matrices = 2 * hidden * (queries + keys) + 3 * hidden * width
    others = 2 * hidden
    if family == "qwen3":
        # Norms of queries and keys.
        others += 2 * shape.head_dim
    if family == "qwen2":
        others += queries + 2 * keys
    if family in ("llama", "qwen3") and stored.get("attention_bias"):
        others += queries + 2 * keys + hidden
    if family == "llama" and stored.get("mlp_bias"):
        others += 2 * width + hidden
    return Part(matrices, others, matrices)

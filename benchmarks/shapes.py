"""Shapes of targets and drafts with random weights."""

import json
from collections.abc import Iterator
from typing import Any


def architecture(
    model_type: str,
    *,
    hidden: int,
    width: int,
    layers: int,
    heads: int,
    key_heads: int,
    vocab: int,
    positions: int,
    **more: Any,
) -> dict[str, Any]:
    """The fields of a `transformers` config; `width` is the MLP's."""
    return {
        "model_type": model_type,
        "hidden_size": hidden,
        "intermediate_size": width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": key_heads,
        "vocab_size": vocab,
        "max_position_embeddings": positions,
        "tie_word_embeddings": False,
        **more,
    }


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}


# meta-llama/Llama-3.1-8B-Instruct and -70B-Instruct, Qwen/Qwen3-8B and -30B-A3B by their configs, and two for
# a CPU.
_LLAMA = {"hidden": 4096, "width": 14336, "layers": 32, "heads": 32, "key_heads": 8, "vocab": 128256}
_LLAMA_70B = {"hidden": 8192, "width": 28672, "layers": 80, "heads": 64, "key_heads": 8, "vocab": 128256}
_QWEN3 = {"hidden": 4096, "width": 12288, "layers": 36, "heads": 32, "key_heads": 8, "vocab": 151936}
_QWEN3_EXPERTS = {
    **{"hidden": 2048, "width": 6144, "layers": 48, "heads": 32, "key_heads": 4, "vocab": 151936},
    **{"num_experts": 128, "num_experts_per_tok": 8, "moe_intermediate_size": 768, "norm_topk_prob": True},
}
_MEDIUM = {"hidden": 256, "width": 1024, "layers": 8, "heads": 4, "key_heads": 4, "vocab": 32000}
_SMALL = {"hidden": 64, "width": 128, "layers": 8, "heads": 4, "key_heads": 2, "vocab": 2000}
SHAPES: dict[str, dict[str, Any]] = {
    "llama": architecture("llama", **_LLAMA, positions=131072, rms_norm_eps=1e-5, **_rope(500000.0)),
    "llama-70b": architecture("llama", **_LLAMA_70B, positions=131072, rms_norm_eps=1e-5, **_rope(500000.0)),
    "qwen3": architecture(
        "qwen3", **_QWEN3, positions=40960, head_dim=128, rms_norm_eps=1e-6, **_rope(1000000.0)
    ),
    "qwen3-30b-a3b": architecture(
        "qwen3_moe", **_QWEN3_EXPERTS, positions=40960, head_dim=128, rms_norm_eps=1e-6, **_rope(1000000.0)
    ),
    "medium": architecture("llama", **_MEDIUM, positions=4096),
    "small": architecture("llama", **_SMALL, positions=4096),
}


def overrides_of(fields: dict[str, Any], path: str = "target.random") -> Iterator[str]:
    """Settings of `python -m eagle_rpc` for a target of this architecture, one for each field, nested ones too."""
    for name, value in fields.items():
        if isinstance(value, dict):
            yield from overrides_of(value, f"{path}.{name}")
        else:
            yield f"++{path}.{name}={json.dumps(value)}"

"""`config.json` in the form of speculators, made of the plain one and read as a plain one.

Keys of the layer lie in `transformer_layer_config`, what changes the meaning of the weights outside of it. An absent
`norm_before_residual` means true there, and mlx-vlm guesses absent layer ids, so both are always written.
Source: `speculators/models/eagle3/config.py` of speculators 0.9, and vLLM's reader of 0.33
(`vllm/transformers_utils/configs/speculators`).
"""

from dataclasses import dataclass
from typing import Any

from eagle_rpc.serving.plain_config import ARCHITECTURE, AUX_LAYERS

MODEL_TYPE = "speculators_model_type"
_LAYER = "transformer_layer_config"
# speculators drops `fc_norm` and `norm_output` of versions that do not know them, so they are written if they are on.
_OUTSIDE = (
    "draft_vocab_size",
    "norm_before_residual",
    "norm_before_fc",
    "fc_norm",
    "norm_output",
    AUX_LAYERS,
)
_INSTEAD = ("architectures", "eagle_config", "torch_dtype", "tie_word_embeddings")


@dataclass(frozen=True, slots=True)
class Speculators:
    """What this form names beside the draft."""

    target: str  # directory or hub name
    draft_tokens: int  # guesses of a round


def speculators_config(plain: dict[str, Any], beside: Speculators) -> dict[str, Any]:
    """The keys of a draft whose plain form is `plain`."""
    outside = {name: plain[name] for name in _OUTSIDE if name in plain}
    layer = {name: value for name, value in plain.items() if name not in (*_OUTSIDE, *_INSTEAD)}
    method = {"proposal_type": "greedy", "speculative_tokens": beside.draft_tokens}
    return outside | {
        "architectures": ["Eagle3DraftModel"],
        MODEL_TYPE: "eagle3",
        "speculators_version": "0.9.0",
        "speculators_config": {
            "algorithm": "eagle3",
            "default_proposal_method": "greedy",
            "proposal_methods": [method | {"verifier_accept_k": 1, "accept_tolerance": 0.0}],
            "verifier": {"name_or_path": beside.target, "architectures": []},
        },
        "torch_dtype": plain["torch_dtype"],
        "tie_word_embeddings": False,
        _LAYER: layer | {"tie_word_embeddings": False},
    }


def as_plain(raw: dict[str, Any]) -> dict[str, Any]:
    """The keys of either form as those of the plain one."""
    if MODEL_TYPE not in raw:
        return raw
    outside = {name: raw[name] for name in _OUTSIDE if name in raw}
    inner = {AUX_LAYERS: [layer - 1 for layer in raw[AUX_LAYERS]]} if raw.get(AUX_LAYERS) else {}
    return {
        "norm_before_residual": True,
        **(raw.get(_LAYER) or {}),
        **outside,
        "architectures": [ARCHITECTURE],
        "tie_word_embeddings": raw.get("tie_word_embeddings", False),
        "eagle_config": inner,
    }

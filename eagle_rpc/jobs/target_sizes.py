"""The sizes of a target, without its weights: by formula, kept from an earlier plan, or by transformers.

Only the last of these loads torch and transformers, for seconds. Its result is kept below `run.cache_dir`.
"""

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from eagle_rpc.config import Config
from eagle_rpc.jobs.draft_form import planned_draft
from eagle_rpc.process.files import replaced_file
from eagle_rpc.sizes.families import sizes_by_formula
from eagle_rpc.sizes.outline import Outline, Part, TargetSizes
from eagle_rpc.sizes.target import TargetShape
from eagle_rpc.target.directory import local_directory

_PACKAGE = Path(__file__).parents[1]
# Rooms whose code the sizes follow from.
_MEASURING = ("sizes", "target")


def target_sizes(config: Config) -> TargetSizes:
    """The sizes of the target of this configuration.

    Raises `ConfigError` as `load_target_config`, and for a rotary embedding that the draft cannot have.
    """
    stored = _stored_config(config)
    if stored is None:
        # transformers has the words for it.
        return _measured(config)
    if (sizes := sizes_by_formula(stored)) is not None:
        return sizes
    path = Path(config.run.cache_dir) / f"sizes-{_digest(config, stored)}.json"
    if (sizes := _kept(path)) is None:
        sizes = _measured(config)
        with replaced_file(path) as fresh:
            fresh.write_text(json.dumps(asdict(sizes), default=str), encoding="utf-8")
    return sizes


def _stored_config(config: Config) -> Mapping[str, Any] | None:
    """The fields of a random target, or of `config.json`; null if it cannot be read."""
    if config.target.random:
        return config.target.random
    path = local_directory(config.target, config.run.cache_dir, ["config.json"]) / "config.json"
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return stored if isinstance(stored, dict) else None


def _digest(config: Config, stored: Mapping[str, Any]) -> str:
    """Of all that the sizes, and the check of the draft's rotary embedding, follow from."""
    digest = hashlib.sha256(
        json.dumps(
            [stored, version("transformers"), config.target.max_length, config.draft.rope.name]
        ).encode()
    )
    for source in sorted(path for room in _MEASURING for path in (_PACKAGE / room).glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:16]


def _kept(path: Path) -> TargetSizes | None:
    """The sizes in this file; null without a whole one."""
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
        outline = raw["outline"]
        parts = {name: Part(**outline[name]) for name in ("whole", "before", "behind")}
        layers = tuple(Part(**layer) for layer in outline["layers"])
        return TargetSizes(
            shape=TargetShape(**raw["shape"]),
            outline=Outline(**{**outline, **parts, "layers": layers}),
            sdpa=raw["sdpa"],
            quantization=raw["quantization"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _measured(config: Config) -> TargetSizes:
    """By the model that transformers builds, on the meta device."""
    # Here alone, since they take seconds.
    from eagle_rpc.draft.rope import rotary_embedding
    from eagle_rpc.target.loading import exact_attention, target_outline
    from eagle_rpc.target.model_files import load_target_config
    from eagle_rpc.target.quantization import stored_quantisation
    from eagle_rpc.target.structure import Structure

    target = load_target_config(config.target, cache_dir=config.run.cache_dir)
    shape = TargetShape.of(target)
    rotary_embedding(planned_draft(config, shape))
    return TargetSizes(
        shape=shape,
        outline=Structure(target_outline(config.target, target)).outline(shape.experts_per_token),
        sdpa=exact_attention(target, "sdpa") == "sdpa",
        quantization=stored_quantisation(target),
    )

"""The model card of an export: what the draft is for, how it was trained, and what was measured.

Its head is the metadata that the Hugging Face hub reads. The licence is left to the user: weights and data decide it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import ModelCardData

from eagle_rpc.draft import Eagle3DraftConfig
from eagle_rpc.process.files import replaced_file
from eagle_rpc.serving.hub import CARD_FILE

_MEASURED = "## Measured"
_TAGS = ["eagle3", "speculative-decoding", "vllm", "sglang"]
_NOTHING = "Nothing yet: `eagle-rpc job=evaluate` writes its figures here."


@dataclass(frozen=True, kw_only=True, slots=True)
class Training:
    """What a card tells of the training."""

    target: str  # directory, hub name or file
    target_class: str
    aux_layer_ids: Sequence[int]  # counted after the layer
    sources: Sequence[str]  # files, patterns and hub datasets of the training data
    data_digest: str | None
    settings: Mapping[str, str]  # by name
    versions: Mapping[str, str]  # by package
    step: int | None = None
    validation: float | None = None  # accept length of that step


def model_card(config: Eagle3DraftConfig, training: Training) -> str:
    """The content of `README.md`. Directories of this machine are left out: a card may be published."""
    target, base = _public(training.target), training.target
    data = ModelCardData(
        base_model=base if base == target and not base.endswith(".gguf") else None,
        library_name="eagle-rpc",
        tags=_TAGS,
    )
    rows = {
        "target": f"{target} ({training.target_class})",
        "captured layers, counted after the layer": ", ".join(map(str, training.aux_layer_ids)),
        "decoder layers": str(config.num_layers),
        "draft vocabulary": f"{config.draft_vocab_size} of {config.vocab_size} tokens",
        "training data": ", ".join(map(_public, training.sources)) or "not recorded",
        "digest of the data": training.data_digest or "not recorded",
        **training.settings,
        "optimiser steps": "not recorded" if training.step is None else str(training.step),
        "accept length in validation": "none"
        if training.validation is None
        else f"{training.validation:.3f}",
        "versions": ", ".join(f"{name} {version}" for name, version in training.versions.items()),
    }
    lines = [
        f"---\n{data.to_yaml()}\n---",
        f"# EAGLE-3 draft for {target}",
        f"A draft model for speculative decoding. It guesses tokens of {target}, which verifies them: the text is the "
        "target's own. No licence is set here; it depends on target and training data.",
        "## Trained",
        "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]),
        _MEASURED,
        _NOTHING,
    ]
    return "\n\n".join(lines) + "\n"


def with_measured(card: str, figures: Mapping[str, str]) -> str:
    """The card with these figures in place of those that it had; another card without such a section as it is."""
    head, heading, _ = card.partition(f"{_MEASURED}\n")
    if not heading:
        return card
    table = ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in figures.items())]
    return head + heading + "\n" + "\n".join(table) + "\n"


def write_measured(draft: Path, figures: Mapping[str, str]) -> None:
    """Puts figures into the model card of an export. A draft without a card stays without one."""
    path = draft / CARD_FILE
    if path.is_file():
        with replaced_file(path) as fresh:
            fresh.write_text(with_measured(path.read_text(encoding="utf-8"), figures), encoding="utf-8")


def _public(source: str) -> str:
    """A source without directories of this machine; a name of the hub as it is."""
    is_local = source.startswith(("/", "~", ".")) or source.count("/") > 1 or Path(source).exists()
    return Path(source).name if is_local else source

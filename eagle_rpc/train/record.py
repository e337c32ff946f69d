"""The identity of a run, kept in each checkpoint: compared on resuming, read on exporting a draft."""

import hashlib
import json
import logging
from dataclasses import asdict, dataclass, fields, replace
from enum import Enum
from typing import Any

from eagle_rpc.config.schema import Config
from eagle_rpc.draft import Eagle3DraftConfig
from eagle_rpc.errors import CheckpointError
from eagle_rpc.supervision import ModelInfo, VocabMapping

logger = logging.getLogger(__name__)

# The saved data position and optimiser state are valid only for the same values of these.
_FIXED_SETTINGS = (
    "run.seed",
    "train.batch_size",
    "train.accumulation",
    "train.optimiser",
    "train.ema_decay",
    "draft.ttt_steps",
    "draft.step_decay",
    "draft.train_embeddings",
    "draft.step_weighting",
    "draft.step_weights",
    "data.validation_share",
    "data.max_length",
    "data.overlong",
    "data.bucket_lengths",
    "data.packing",
    "data.row_length",
    "data.template_arguments",
)
_WATCHED_SECTIONS = ("train", "draft", "supervision", "data")
_OTHER_DATA = (
    "a run keeps its chats, so train others, such as answers to more prompts, under another run.name "
    "(regenerate.output may go on naming the answers that are there)"
)
_TARGET_FIELDS = (
    "weights_fingerprint",
    "tokenizer_fingerprint",
    "aux_layer_ids",
    "dtype",
    "hidden_size",
    "vocab_size",
)


@dataclass(frozen=True, kw_only=True, slots=True)
class RunRecord:
    """Draft, draft vocab, target and configuration of one run. Exporting needs nothing else of the target."""

    draft_config: Eagle3DraftConfig
    mapping: VocabMapping
    target: ModelInfo
    bos_token_id: int | None
    eos_token_id: int | list[int] | None
    config: dict[str, Any]  # the result of `plain`
    init_digest: str | None = None  # of the draft that training started from; None: a new one
    data_digest: str | None = None  # of the training examples in order; None: the seed determines them

    def to_json(self) -> dict[str, Any]:
        """All fields, with the digest of the mapping instead of the mapping."""
        return {
            "draft_config": asdict(self.draft_config),
            "mapping_digest": self.mapping.digest,
            "target": asdict(self.target),
            "bos_token_id": self.bos_token_id,
            "eos_token_id": self.eos_token_id,
            "config": self.config,
            "data_digest": self.data_digest,
            "init_digest": self.init_digest,
        }

    @property
    def digest(self) -> str:
        """SHA-256 of all fields but the target's incarnation: trainers may use different replicas."""
        content = replace(self, target=replace(self.target, incarnation="")).to_json()
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    @classmethod
    def from_json(cls, content: dict[str, Any], mapping: VocabMapping) -> "RunRecord":
        """Raises `KeyError` or `TypeError` for content of another form."""
        target = content["target"] | {"aux_layer_ids": tuple(content["target"]["aux_layer_ids"])}
        return cls(
            draft_config=Eagle3DraftConfig(**content["draft_config"]),
            mapping=mapping,
            target=ModelInfo(**target),
            bos_token_id=content["bos_token_id"],
            eos_token_id=content["eos_token_id"],
            config=content["config"],
            data_digest=content["data_digest"],
            init_digest=content.get("init_digest"),  # earlier versions made new drafts only
        )


def plain(config: Config) -> dict[str, Any]:
    """The configuration as JSON values, enum members by name."""
    return _plain(asdict(config))


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(element) for key, element in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(element) for element in value]
    return value.name if isinstance(value, Enum) else value


def require_same_run(saved: RunRecord, current: RunRecord) -> None:
    """Raises `CheckpointError` naming the first field that differs and must not, with both values.

    Changes of other settings (rates, steps, intervals) are logged.
    """
    for field in fields(Eagle3DraftConfig):
        before, now = (getattr(record.draft_config, field.name) for record in (saved, current))
        _require_equal(f"draft.{field.name}", before, now)
    for name in _TARGET_FIELDS:
        _require_equal(f"the target's {name}", getattr(saved.target, name), getattr(current.target, name))
    _require_equal("the vocab mapping's digest", saved.mapping.digest, current.mapping.digest)
    _require_equal("the digest of draft.init_from", saved.init_digest, current.init_digest)
    _require_equal("the training data's digest", saved.data_digest, current.data_digest, _OTHER_DATA)
    # A checkpoint of an earlier version lacks newer settings; it was made with their present defaults.
    old, new = _flatten(plain(Config())) | _flatten(saved.config), _flatten(current.config)
    for path in _FIXED_SETTINGS:
        _require_equal(path, old.get(path), new.get(path))
    for path in sorted(old.keys() | new.keys()):
        watched = path.partition(".")[0] in _WATCHED_SECTIONS and path != "train.resume"
        if watched and old.get(path) != new.get(path):
            logger.warning(
                "resuming with %s=%s; the checkpoint was made with %s", path, new.get(path), old.get(path)
            )


def _require_equal(
    name: str, saved: Any, current: Any, advice: str = "another run.name starts a run of its own"
) -> None:
    if saved != current:
        raise CheckpointError(
            f"{name} must be the checkpoint's to resume, it has {saved}, this run has {current}: {advice}"
        )


def _flatten(section: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train.batch_size": 4, ...}`"""
    flat: dict[str, Any] = {}
    for key, value in section.items():
        flat |= _flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat

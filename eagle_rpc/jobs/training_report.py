"""What a trainer says about its run: at the start on the terminal, at the end in `training.json`."""

import json
import logging
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from eagle_rpc.client import RemoteEagle3TargetModel
from eagle_rpc.config import Config
from eagle_rpc.data import ChatDataset, coverage, coverage_by_size
from eagle_rpc.jobs.plan import bytes_per_token, num_trained
from eagle_rpc.process.files import replaced_file
from eagle_rpc.report.versions import versions
from eagle_rpc.supervision import VocabMapping
from eagle_rpc.topology import Cast
from eagle_rpc.train import RunRecord, Trainer
from eagle_rpc.train.figures import TIMES

logger = logging.getLogger(__name__)


def setup_lines(
    config: Config, cast: Cast, record: RunRecord, training: ChatDataset, trainer: Trainer, device: str
) -> Iterator[str]:
    """Who runs where, and the sizes of the work: a line each."""
    target, draft = record.target, record.draft_config
    targets = ", ".join(cast.target_names) or "the targets of the registry"
    yield f"{', '.join(cast.trainer_names)} on {device}, asking {targets} over {config.rpc.interface}"
    yield (
        f"target: {config.target.model}, {target.architecture}, {target.num_layers} layers, "
        f"hidden {target.hidden_size}, {target.dtype}, layers {target.aux_layer_ids} captured"
    )
    layers = "1 layer" if draft.num_layers == 1 else f"{draft.num_layers} layers"
    yield (
        f"draft: {num_trained(config, draft) / 1e6:.1f} M trained parameters, {layers}, "
        f"{draft.draft_vocab_size:,} of {draft.vocab_size:,} tokens, {config.draft.ttt_steps} steps unrolled"
    )
    encoding = config.supervision.encoding.value
    yield (
        f"supervision: {encoding}, {bytes_per_token(config, draft, encoding):,.0f} bytes a supervised token, "
        f"{config.supervision.prefetch} requests under way, TensorPipe over {', '.join(config.rpc.transports)}"
    )
    sequences = config.train.batch_size * config.train.accumulation * len(cast.trainer_names)
    computed = "float32" if config.train.autocast is None else config.train.autocast.value
    rows = "rows" if config.data.packing else "samples"
    yield (
        f"work: {trainer.total_steps:,} steps of {sequences} {rows}, from {len(training):,} samples of at most "
        f"{config.data.longest_row:,} tokens; computed in {computed}"
    )


def training_summary(
    cast: Cast,
    trainer: Trainer,
    backend: RemoteEagle3TargetModel,
    training: ChatDataset,
    mapping: VocabMapping,
    setup: list[str],
) -> dict[str, Any]:
    """The content of `training.json`: where the time went since this start, coverage, versions."""
    return {
        "steps": trainer.learner.steps_done,
        "total_steps": trainer.total_steps,
        "trainers": [
            {"name": name, "seconds": dict(zip(TIMES, seconds, strict=True))}
            for name, seconds in zip(cast.trainer_names, trainer.times, strict=True)
        ],
        "targets": [_of_target(name, report) for name, report in sorted(backend.reports().items())],
        "draft_vocab_size": len(mapping),
        "covered": coverage(training, mapping),
        "coverage": coverage_by_size(training, mapping.target_vocab_size, len(mapping)),
        "setup": setup,
        "versions": versions(),
    }


def _of_target(name: str, report: Mapping[str, Any]) -> dict[str, Any]:
    # Before the first request it waits for trainers to start.
    busy, asked = report["busy_seconds"], report["asked_seconds"]
    return {
        "name": name,
        "seconds": {"computing": busy, "idle": max(0.0, asked - busy)},
        "busy_share": min(1.0, busy / asked) if asked else None,
        **{key: report[key] for key in ("passes", "tokens", "reply_bytes")},
    }


def write_summary(summary: Mapping[str, Any], path: Path) -> None:
    """Writes JSON, in one piece."""
    with replaced_file(path) as fresh:
        fresh.write_text(json.dumps(summary, indent=2) + "\n", encoding="utf-8")

"""Exports a draft to the directory that serving engines load.

Legend: H hidden, V target vocab.
"""

import logging
from collections.abc import Mapping
from pathlib import Path

import torch
import transformers
from torch import Tensor

import eagle_rpc
from eagle_rpc.config import Config
from eagle_rpc.config.choices import ExportForm
from eagle_rpc.config.schema import ServingConfig, TrainConfig
from eagle_rpc.errors import CheckpointError
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.process.startup import start_worker
from eagle_rpc.serving import ServedForm, check_form, export_draft, warn_of_engines
from eagle_rpc.serving.export import EMBEDDING
from eagle_rpc.serving.model_card import Training, model_card
from eagle_rpc.serving.speculators_config import Speculators
from eagle_rpc.train import (
    Checkpoint,
    RunRecord,
    best_checkpoint,
    checkpoint_of,
    latest_checkpoint,
    latest_whole_checkpoint,
    load_target_embedding,
    read_checkpoint,
)
from eagle_rpc.train.schedule import peak_rate

logger = logging.getLogger(__name__)

_BEST, _LATEST = "best", "latest"  # values of `serving.checkpoint`


def run(config: Config) -> int:
    """Writes `serving.dir`; always 0. Raises `CheckpointError` if there is nothing to export."""
    start_worker(config, "export")
    directory, serving = RunDirectory.of(config), config.serving
    path, checkpoint = _chosen(directory.checkpoints, serving.checkpoint)
    embedding = checkpoint.draft_weights.get(EMBEDDING)
    if embedding is None:
        embedding = load_target_embedding(path.parent / directory.target_embedding.name)
    history = checkpoint.history
    validation = history.best_accept_length if history.best_step == checkpoint.step else None
    files = export_run(
        checkpoint.draft_weights,
        checkpoint.record,
        embedding,
        serving,
        step=checkpoint.step,
        validation=validation,
    )
    of_best = "" if validation is None else f" with accept length {validation:.3f} in validation"
    logger.info("exported step %d%s: %s", checkpoint.step, of_best, ", ".join(map(str, files)))
    return 0


def _chosen(checkpoints: Path, setting: str | None) -> tuple[Path, Checkpoint]:
    """The checkpoint that `serving.checkpoint` means, of those in this directory."""
    if setting == _LATEST:
        return _newest(checkpoints)
    if setting in (None, _BEST):
        best = best_checkpoint(checkpoints)
        if best is not None:
            return best, read_checkpoint(best)
        if setting is None:
            return _newest(checkpoints)
        raise CheckpointError(
            f"{checkpoints} must hold a validated checkpoint for serving.checkpoint=best, got none"
        )
    path = checkpoint_of(checkpoints, int(setting)) if setting.isdecimal() else Path(setting)
    return path, read_checkpoint(path)


def _newest(checkpoints: Path) -> tuple[Path, Checkpoint]:
    """Raises `CheckpointError` if the newest checkpoint is damaged; an older one is named, not exported."""
    whole = latest_whole_checkpoint(checkpoints)
    if whole is None:
        raise CheckpointError(
            f"{checkpoints} must hold a checkpoint to export, got none: run job=train first"
        )
    path, newest = whole[0], latest_checkpoint(checkpoints)
    if path != newest:
        raise CheckpointError(
            f"{newest} must be whole to be exported, it is damaged; train on with train.resume=auto, or "
            f"export an older one with serving.checkpoint={path}"
        )
    return whole


def export_run(
    weights: Mapping[str, Tensor],
    record: RunRecord,
    embedding_VH: Tensor,
    settings: ServingConfig,
    *,
    step: int,
    validation: float | None,
) -> list[Path]:
    """Exports the draft of a run with this embedding in each of `serving.forms`; returns the files.

    The card tells of the optimiser steps and, if it is known, the accept length in validation. Raises as
    `export_draft` and `check_form`.
    """
    target = record.target
    served = ServedForm(
        config=record.draft_config,
        aux_layer_ids=target.aux_layer_ids,
        num_target_layers=target.num_layers,
        target=target.architecture,
        own_embedding=EMBEDDING in weights,
    )
    check_form(served, settings.engines)
    warn_of_engines(served, settings.engines)
    beside = Speculators(record.config["target"]["model"], settings.draft_tokens)
    card = model_card(record.draft_config, _training_of(record, step, validation))
    files = list[Path]()
    for form in settings.forms:
        files += export_draft(
            weights,
            record.draft_config,
            record.mapping,
            Path(settings.dir if form is settings.forms[0] else f"{settings.dir}-{form.name}"),
            dtype=getattr(torch, settings.dtype.value),
            aux_layer_ids=target.aux_layer_ids,
            target_embedding=embedding_VH,
            bos_token_id=record.bos_token_id,
            eos_token_id=record.eos_token_id,
            speculators=beside if form is ExportForm.speculators else None,
            card=card,
        )
    return files


def _training_of(record: RunRecord, step: int, validation: float | None) -> Training:
    train, data, draft = (record.config[section] for section in ("train", "data", "draft"))
    own = [data["train_path"]] if data["train_path"] else []
    chosen = TrainConfig(learning_rate=train["learning_rate"])
    rate = peak_rate(chosen, record.draft_config.hidden_size)
    versions = {"eagle-rpc": eagle_rpc.__version__, "torch": torch.__version__}
    return Training(
        target=record.config["target"]["model"],
        target_class=record.target.architecture,
        aux_layer_ids=record.target.aux_layer_ids,
        sources=own + [source["path"] for source in data["sources"]],
        data_digest=record.data_digest,
        settings={
            "loss": f"{draft['loss']}, {draft['ttt_steps']} training-time test steps",
            "learning rate": f"{rate:g}, {train['schedule']}",
            "chats of a step": str(train["batch_size"] * train["accumulation"]),
        },
        versions=versions | {"transformers": transformers.__version__},
        step=step,
        validation=validation,
    )

"""A worker that trains the draft, from the data to the last step."""

import contextlib
import logging
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from eagle_rpc.client import RemoteEagle3TargetModel
from eagle_rpc.config import Config
from eagle_rpc.jobs.assembly import (
    connect_target,
    join_group,
    log_padding,
    make_draft,
    make_record,
    plan_batches,
    require_room,
    stored_draft,
    vocabulary,
)
from eagle_rpc.jobs.inputs import Inputs
from eagle_rpc.jobs.report import make_report
from eagle_rpc.jobs.training_report import setup_lines, training_summary, write_summary
from eagle_rpc.jobs.watching import trainer_watched
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.report.trackers import TrackedRun, Tracker, open_trackers
from eagle_rpc.rpc import ElasticMembership, Membership
from eagle_rpc.topology import Cast
from eagle_rpc.train import Trainer, plain

logger = logging.getLogger(__name__)


def train_until_done(
    config: Config,
    inputs: Inputs,
    device: torch.device,
    cast: Cast,
    membership: Membership,
    store: dist.Store,
    stop: threading.Event,
) -> bool:
    """Connects to the target, builds the draft and trains it; returns early if `stop` is set at any trainer.

    Whether another trainer was told to stop, and this one was not. Over `store` the trainers of this job find each
    other.
    """
    index = cast.me.index
    shape, tokenizer = inputs.shape, inputs.tokenizer
    training, validation = inputs.training, inputs.validation
    if index == 0:
        log_padding(config, training, len(cast.trainer_names))
    stored = stored_draft(config, shape)
    mapping = vocabulary(config, shape, stored, training, tokenizer)
    backend = connect_target(config, shape, tokenizer, device, cast, membership, stop)
    with contextlib.closing(backend):
        require_room(config, backend.model_info().max_length)
        backend.open_session(mapping)
        with join_group(config, cast, store, device) as group:
            trainer = Trainer(
                config.train,
                config.draft,
                draft=make_draft(config, shape, backend, device, stored=stored, mapping=mapping),
                backend=backend,
                batches=plan_batches(config, training, rank=index, num_ranks=group.size),
                validation=plan_batches(config, validation, endless=False) if len(validation) else None,
                num_draft_tokens=config.evaluate.num_draft_tokens,
                group=group,
                run=RunDirectory.of(config),
                record=make_record(
                    config,
                    shape,
                    backend,
                    mapping,
                    data_digest=training.digest,
                    init_digest=None if stored is None else stored.digest,
                ),
                stop=stop,
                trackers=lambda last_step: _trackers(config, last_step),
            )
            group.barrier("the other trainers to take embedding and head rows")
            backend.release_host_copies()
            setup = list(setup_lines(config, cast, trainer.record, training, trainer, str(device)))
            if group.is_primary:
                _log_lines(setup)
            _train(config, cast, membership, backend, trainer)
            summary = None
            if group.is_primary and trainer.has_trained:
                summary = training_summary(cast, trainer, backend, training, mapping, setup)
    if summary is not None:
        write_summary(summary, RunDirectory.of(config).training)
        _log_lines(make_report(config).splitlines())
    return trainer.was_stopped and not stop.is_set()


def _train(
    config: Config, cast: Cast, membership: Membership, backend: RemoteEagle3TargetModel, trainer: Trainer
) -> None:
    """Trains, and meanwhile shows the state in the registry, as metrics and in spans."""

    def status() -> dict[str, Any]:
        return {**trainer.status(), **backend.status()}

    if isinstance(membership, ElasticMembership):
        membership.report(status)
    with trainer_watched(config, cast, backend, status):
        trainer.train()


def _log_lines(lines: Iterable[str]) -> None:
    for line in lines:
        logger.info("%s", line)


def _trackers(config: Config, last_step: int) -> list[Tracker]:
    run = TrackedRun(
        name=config.run.name, directory=Path(config.run.dir), settings=plain(config), last_step=last_step
    )
    return open_trackers(config.report.trackers, run)

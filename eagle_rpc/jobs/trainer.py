"""A worker that trains the draft, from the data to the last step."""

import contextlib
import datetime
import logging
import threading
from dataclasses import replace

import torch
import torch.distributed as dist

from eagle_rpc.config import Config
from eagle_rpc.config.choices import Resume
from eagle_rpc.data import build_vocab_mapping, datasets_of, load_data
from eagle_rpc.errors import ConfigError
from eagle_rpc.jobs.assembly import (
    chat_template,
    connect_target,
    join_group,
    log_padding,
    make_draft,
    make_record,
    plan_batches,
    require_room,
)
from eagle_rpc.rpc import ElasticMembership, Membership
from eagle_rpc.target.loading import load_target_config, load_tokenizer
from eagle_rpc.topology import Cast
from eagle_rpc.train import RunDirectory, Trainer, latest_whole_checkpoint

logger = logging.getLogger(__name__)


def train_until_done(
    config: Config,
    device: torch.device,
    cast: Cast,
    membership: Membership,
    store: dist.Store,
    stop: threading.Event,
) -> None:
    """Loads the data, connects to the target, builds the draft and trains it; returns early if `stop` is set.

    Over `store` the trainers of this job find each other.
    """
    index = cast.me.index
    cache_dir = config.run.cache_dir
    tokenizer = load_tokenizer(config.target, cache_dir=cache_dir)
    if tokenizer is None:
        raise ConfigError("target.random has no tokenizer to read data with: name a stored target.model")
    target_config = load_target_config(config.target, cache_dir=cache_dir)
    config = replace(config, data=replace(config.data, date=_date_of_run(config, index, store)))
    template = chat_template(config, tokenizer)
    if index == 0:
        for finding in template.findings.lines():
            logger.info("chat template: %s", finding)
    data = load_data(config.data, template, cache_dir=cache_dir, show_progress=index == 0)
    for source in data.sources:
        source.require_ids_below(target_config.vocab_size)
    training, validation = datasets_of(config.data, data)
    if index == 0:
        log_padding(config, training, len(cast.trainer_names))
    mapping, _ = build_vocab_mapping(
        training,
        tokenizer=tokenizer,
        target_vocab_size=target_config.vocab_size,
        draft_vocab_size=config.draft.vocab_size,
        cache_dir=cache_dir,
    )
    backend = connect_target(config, target_config, tokenizer, device, cast, membership, stop)
    with contextlib.closing(backend):
        require_room(config, backend.model_info().max_length)
        backend.open_session(mapping)
        with join_group(config, cast, store, device) as group:
            trainer = Trainer(
                config.train,
                config.draft,
                draft=make_draft(config, target_config, backend, device),
                backend=backend,
                batches=plan_batches(config, training, rank=index, num_ranks=group.size),
                validation=plan_batches(config, validation, endless=False) if len(validation) else None,
                group=group,
                run=RunDirectory.of(config),
                record=make_record(config, target_config, backend, mapping, data_digest=training.digest),
                stop=stop,
            )
            if isinstance(membership, ElasticMembership):
                membership.report(lambda: {**trainer.status(), **backend.status()})
            trainer.train()


def _date_of_run(config: Config, index: int, store: dist.Store) -> str:
    """The day that templates write: of the first start of the run, the same for all of its trainers."""
    if index == 0:
        resumes = config.train.resume is Resume.auto
        newest = latest_whole_checkpoint(RunDirectory.of(config).checkpoints) if resumes else None
        saved = newest[1].record.config["data"].get("date") if newest else None
        store.set("date", config.data.date or saved or datetime.date.today().isoformat())
    return store.get("date").decode()

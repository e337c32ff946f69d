"""The parts of a trainer, each built from the configuration: target, group, batches, draft, record."""

import logging
import threading
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import PreTrainedTokenizerBase

from eagle_rpc.client import ClientSettings, RemoteEagle3TargetModel
from eagle_rpc.config import Config
from eagle_rpc.config.choices import InitVocab, MembershipKind
from eagle_rpc.data import BatchPlan, ChatDataset, ChatTemplate, build_vocab_mapping, coverage
from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.draft.rope import rotary_embedding
from eagle_rpc.errors import ConfigError, UnsupportedTarget
from eagle_rpc.jobs.draft_form import draft_vocab_size, planned_draft
from eagle_rpc.rpc import Membership
from eagle_rpc.serving import StoredDraft
from eagle_rpc.sizes.target import aux_layers
from eagle_rpc.supervision import (
    Eagle3TargetBackend,
    SessionSettings,
    TargetExpectation,
    TargetShape,
    VocabMapping,
    tokenizer_fingerprint,
)
from eagle_rpc.target.stop_tokens import stored_stop_token_ids
from eagle_rpc.topology import Cast, Worker
from eagle_rpc.train import RunRecord, TrainerGroup, join_trainers, plain

logger = logging.getLogger(__name__)


def connect_target(
    config: Config,
    shape: TargetShape,
    tokenizer: PreTrainedTokenizerBase | None,
    device: torch.device,
    cast: Cast,
    membership: Membership,
    stop: threading.Event,
) -> RemoteEagle3TargetModel:
    """Waits for a target that serves, and refuses targets other than `expectation`."""
    settings = client_settings(config, cast.me)
    expected = expectation(config, shape, tokenizer)
    return RemoteEagle3TargetModel(membership, settings=settings, expected=expected, device=device, stop=stop)


def client_settings(config: Config, me: Worker) -> ClientSettings:
    """The client of trainer `me`."""
    elastic = config.rpc.membership is MembershipKind.elastic
    return ClientSettings(
        session=SessionSettings(
            encoding=config.supervision.encoding.value,
            rows=config.supervision.rows.value,
            run=config.run.name,
            trainer=me.name,
        ),
        index=me.index,
        prefetch=config.supervision.prefetch,
        request_timeout=config.rpc.request_timeout,
        reconnect_deadline=config.rpc.reconnect_deadline,
        heartbeat_interval=config.rpc.heartbeat_interval,
        heartbeat_misses=config.rpc.heartbeat_misses,
        most_targets=config.rpc.targets_per_trainer,
        # A sole trainer would share with nobody.
        shared_dir=Path(config.run.shared_dir) if elastic or config.topology.trainers > 1 else None,
    )


def require_room(config: Config, limit: int) -> None:
    """Raises `ConfigError` if a batch may be longer than `limit`, the tokens that the target accepts."""
    longest = config.data.longest_row
    if longest > limit:
        raise ConfigError(
            "data.max_length (and data.bucket_lengths, data.row_length) must be at most the target's "
            f"{limit} tokens, got {longest}"
        )


def expectation(
    config: Config, shape: TargetShape, tokenizer: PreTrainedTokenizerBase | None
) -> TargetExpectation:
    """The requirements of the draft on its target."""
    return TargetExpectation(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        aux_layer_ids=aux_layers(shape.num_layers, config.target.aux_layer_ids),
        dtype=config.target.dtype.value,
        tokenizer_fingerprint=None if tokenizer is None else tokenizer_fingerprint(tokenizer),
    )


def join_group(
    config: Config, cast: Cast, store: dist.Store, device: torch.device
) -> AbstractContextManager[TrainerGroup]:
    """The trainers' process group. Its time-out allows for another trainer's request to the target."""
    return join_trainers(
        dist.PrefixStore("trainers", store),
        cast.me.index,
        len(cast.trainer_names),
        timeout=config.rpc.start_timeout + config.rpc.request_timeout + config.rpc.reconnect_deadline,
        device=device,
    )


def chat_template(
    config: Config, tokenizer: PreTrainedTokenizerBase, *, date: str | None = None
) -> ChatTemplate:
    """The template of this configuration; `date` is the day that it writes, null: `data.date`."""
    stop = stored_stop_token_ids(config.target, tokenizer, cache_dir=config.run.cache_dir)
    return ChatTemplate(
        tokenizer,
        config.data.chat_template,
        arguments=config.data.template_arguments,
        date=date or config.data.date,
        stop_token_ids=stop,
    )


def plan_batches(
    config: Config, dataset: ChatDataset, *, rank: int = 0, num_ranks: int = 1, endless: bool = True
) -> BatchPlan:
    """The micro-batches of one trainer; without `endless` those of one epoch."""
    return BatchPlan(
        dataset,
        batch_size=config.train.batch_size,
        seed=config.run.seed,
        rank=rank,
        num_ranks=num_ranks,
        bucket_lengths=config.data.bucket_lengths,
        packed_length=config.data.longest_row if config.data.packing else None,
        endless=endless,
    )


def log_padding(config: Config, dataset: ChatDataset, num_ranks: int) -> None:
    """Logs the share of padding with packing and without it."""
    packed, padded = (
        plan_batches(replace(config, data=replace(config.data, packing=on)), dataset, num_ranks=num_ranks)
        for on in (True, False)
    )
    logger.info(
        "data.packing=%s: padding is %.1f %% of the tokens with packing and %.1f %% without it, "
        "in %d and %d micro-batches an epoch",
        str(config.data.packing).lower(),
        100 * packed.padding_share,
        100 * padded.padding_share,
        packed.batches_per_epoch,
        padded.batches_per_epoch,
    )


def stored_draft(config: Config, shape: TargetShape) -> StoredDraft | None:
    """The draft of `draft.init_from`; null for a new one.

    Raises `CheckpointError` if it does not fit, `ConfigError` for another `draft.vocab_size` than its own.
    """
    if config.draft.init_from is None:
        return None
    stored = StoredDraft.open(Path(config.draft.init_from))
    stored.require_fit(draft_config(config, shape), aux_layers(shape.num_layers, config.target.aux_layer_ids))
    if stored.aux_layer_ids is None and config.target.aux_layer_ids is not None:
        logger.warning(
            "draft.init_from=%s names no captured layers, so it may have read others than %s",
            config.draft.init_from,
            config.target.aux_layer_ids,
        )
    keeps_vocabulary = config.draft.init_vocab is InitVocab.stored
    if keeps_vocabulary and len(stored.mapping) != draft_vocab_size(config, shape):
        raise ConfigError(
            f"draft.vocab_size must be {len(stored.mapping)} with draft.init_from={config.draft.init_from}, "
            f"got {config.draft.vocab_size}; draft.init_vocab=data takes a vocabulary of this run's data"
        )
    return stored


def vocabulary(
    config: Config,
    shape: TargetShape,
    stored: StoredDraft | None,
    training: ChatDataset,
    tokenizer: PreTrainedTokenizerBase,
) -> VocabMapping:
    """The draft vocabulary of this run: of the stored draft, or of the data."""
    if stored is not None and config.draft.init_vocab is InitVocab.stored:
        share = 100 * coverage(training, stored.mapping)
        logger.info("the draft vocabulary of draft.init_from covers %.2f %% of the predicted tokens", share)
        return stored.mapping
    mapping, _ = build_vocab_mapping(
        training,
        tokenizer=tokenizer,
        target_vocab_size=shape.vocab_size,
        draft_vocab_size=draft_vocab_size(config, shape),
        cache_dir=config.run.cache_dir,
    )
    return mapping


def make_draft(
    config: Config,
    shape: TargetShape,
    backend: Eagle3TargetBackend,
    device: torch.device,
    *,
    stored: StoredDraft | None = None,
    mapping: VocabMapping | None = None,
) -> Eagle3Draft:
    """The initial draft, equal on all trainers: new, or `stored` in the draft vocabulary `mapping`."""
    draft = Eagle3Draft(draft_config(config, shape), backend.input_embeddings())
    draft.initialise(config.run.seed)
    if config.draft.seed_head:
        try:
            draft.seed_lm_head(backend.output_embeddings().weight.cpu())
        except UnsupportedTarget as error:
            raise UnsupportedTarget(
                f"draft.seed_head must be false for a head that is not a plain matrix: {error}"
            ) from error
    if config.draft.train_embeddings:
        draft.train_embeddings()
    if stored is not None:
        assert mapping is not None
        stored.load_into(draft, mapping)
    return draft.to(device)


def draft_config(config: Config, shape: TargetShape) -> Eagle3DraftConfig:
    """The draft of this configuration, for a target of this shape, with a rotary embedding that works.

    Raises `ConfigError` as `planned_draft` and `rotary_embedding`.
    """
    draft = planned_draft(config, shape)
    rotary_embedding(draft)
    return draft


def make_record(
    config: Config,
    shape: TargetShape,
    backend: Eagle3TargetBackend,
    mapping: VocabMapping,
    *,
    data_digest: str | None = None,
    init_digest: str | None = None,
) -> RunRecord:
    """The identity of this run, for its checkpoints."""
    return RunRecord(
        draft_config=draft_config(config, shape),
        mapping=mapping,
        target=backend.model_info(),
        bos_token_id=shape.bos_token_id,
        eos_token_id=shape.eos_token_id,
        config=plain(config),
        data_digest=data_digest,
        init_digest=init_digest,
    )

"""Rules that types cannot express; each message names field, rule and value."""

import re
from collections.abc import Callable
from enum import Enum
from operator import attrgetter
from typing import Any

from eagle_rpc.config.choices import DraftLoss, DType, Encoding, JobName, Membership, Quantization
from eagle_rpc.config.schema import Config
from eagle_rpc.config.texts import NAME_RULE, is_name, parse_address
from eagle_rpc.errors import ConfigError

# Two positive numbers: targets x trainers, or sequences x tokens.
PAIR = re.compile(r"([1-9]\d*)x([1-9]\d*)")
_POSITIVE = (
    "job.verify_steps job.verify_timeout topology.targets topology.trainers rpc.start_timeout rpc.model_timeout "
    "rpc.request_timeout rpc.reconnect_deadline rpc.heartbeat_interval rpc.heartbeat_misses rpc.drain_timeout "
    "rpc.shutdown_timeout rpc.max_pickle_bytes rpc.max_request_bytes target.max_batch_tokens target.chunk_rows "
    "target.max_queued_requests target.max_queued_per_session target.max_reply_bytes target.max_reply_bytes_per_session "
    "target.max_sessions target.session_lease supervision.prefetch draft.vocab_size draft.ttt_steps train.max_steps "
    "train.batch_size train.accumulation train.learning_rate train.max_grad_norm train.checkpoint_every "
    "train.keep_checkpoints train.log_every evaluate.num_prompts evaluate.max_new_tokens evaluate.num_draft_tokens "
    "regenerate.batch_size regenerate.max_new_tokens regenerate.max_prompt_tokens"
).split()
_NOT_NEGATIVE = (
    "run.threads job.status_watch topology.first_target train.validate_every train.validation_batches train.weight_decay "
    "evaluate.near_tie regenerate.temperature"
).split()
_SHARES = "train.min_learning_rate_share train.warmup_share".split()
_POSITIVE_OR_NULL = (
    "target.max_length data.row_length draft.intermediate_size draft.num_attention_heads draft.num_key_value_heads train.max_epochs "
    "regenerate.num_prompts"
).split()


def check(config: Config) -> None:
    """Raises `ConfigError` for the first rule that does not hold."""
    for paths, holds, rule in (
        (_POSITIVE, lambda value: value > 0, "must be positive"),
        (_NOT_NEGATIVE, lambda value: value >= 0, "must not be negative"),
        (_SHARES, lambda value: 0 <= value <= 1, "must lie in [0, 1]"),
        (_POSITIVE_OR_NULL, lambda value: value is None or value > 0, "must be positive or null"),
    ):
        for path in paths:
            _require(config, path, holds, rule)
    _require(config, "rpc.worker_threads", lambda value: value > 1, "must be at least 2")
    _require(
        config,
        "rpc.transports",
        lambda value: value[-1:] == ["uv"],
        "must end with uv, which has an address to check",
    )
    _require(config, "run.name", is_name, f"must be {NAME_RULE}")
    parse_address(config.rpc.registry)
    _require(config, "draft.step_decay", lambda value: 0 < value <= 1, "must lie in (0, 1]")
    _require(config, "data.validation_share", lambda value: 0 <= value < 1, "must lie in [0, 1)")
    _require(config, "data.max_length", lambda value: value > 2, "must be at least 3")
    _require(config, "data.bucket_lengths", lambda value: value == sorted(set(value)), "must ascend")
    _require(
        config,
        "train.betas",
        lambda value: len(value) == 2 and all(0 <= beta < 1 for beta in value),
        "must be two numbers in [0, 1)",
    )
    _require(
        config,
        "target.aux_layer_ids",
        lambda value: value is None or (len(value) == 3 and len(set(value)) == 3 and value == sorted(value)),
        "must be three distinct layers in ascending order, or null",
    )
    # The gradients of fp16 would need scaling.
    _require(
        config,
        "train.autocast",
        lambda value: value is not DType.float16,
        "must be bfloat16, float32 or null",
    )
    _require(
        config,
        "job.verify_topologies",
        lambda value: value and all(PAIR.fullmatch(topology) for topology in value),
        "must name at least one topology, targets x trainers as in 1x2",
    )
    # Those read a cache of a server of transformers' own.
    _require(
        config,
        "target.attention",
        lambda value: not value.startswith("paged"),
        "must be an implementation without pages",
    )
    _require(
        config,
        "target.compile_shapes",
        lambda value: all(PAIR.fullmatch(shape) for shape in value),
        "must name shapes, sequences x tokens as in 4x2048",
    )
    _check_across(config)


def _check_across(config: Config) -> None:
    silence = config.rpc.heartbeat_interval * config.rpc.heartbeat_misses
    if config.target.session_lease <= silence:
        raise ConfigError(
            f"target.session_lease must be longer than rpc.heartbeat_interval x rpc.heartbeat_misses = {silence:g} s, "
            f"got {config.target.session_lease:g}"
        )
    if config.target.max_reply_bytes_per_session > config.target.max_reply_bytes:
        raise ConfigError(
            f"target.max_reply_bytes_per_session must be at most target.max_reply_bytes {config.target.max_reply_bytes}, "
            f"got {config.target.max_reply_bytes_per_session}"
        )
    if config.topology.single and config.rpc.membership is Membership.elastic:
        raise ConfigError("topology.single must go with rpc.membership=static, got elastic")
    if config.job.name is JobName.serve and config.rpc.membership is not Membership.elastic:
        raise ConfigError(
            f"job=serve must go with rpc.membership=elastic (rpc=elastic), got {config.rpc.membership.name}"
        )
    if config.topology.single and (config.topology.targets, config.topology.trainers) != (1, 1):
        raise ConfigError(
            f"topology.single must go with one target and one trainer, got {config.topology.targets} and {config.topology.trainers}"
        )
    if config.data.packing and config.target.compile_shapes and not config.target.compile_packed:
        raise ConfigError(
            "target.compile_packed must be true for data.packing with target.compile_shapes, got false"
        )
    if config.target.quantization is Quantization.fp8 and config.target.dtype is not DType.bfloat16:
        raise ConfigError(
            f"target.dtype must be bfloat16 for target.quantization=fp8, got {config.target.dtype.name}"
        )
    if (
        config.draft.loss in (DraftLoss.lk_alpha, DraftLoss.lk_lambda)
        and config.supervision.encoding is Encoding.probs
    ):
        raise ConfigError(
            f"draft.loss={config.draft.loss.name} must not go with supervision.encoding=probs, whose probabilities are those "
            "among the draft vocabulary alone: use hidden or logits"
        )
    _check_rows(config)


def _check_rows(config: Config) -> None:
    data = config.data
    if data.row_length is not None and (not data.packing or data.bucket_lengths):
        raise ConfigError(
            "data.row_length must go with data.packing=true and without data.bucket_lengths, whose last one it would be, "
            f"got data.packing={str(data.packing).lower()} and data.bucket_lengths={data.bucket_lengths}"
        )
    if data.longest_row < data.max_length:
        field = "data.bucket_lengths" if data.row_length is None else "data.row_length"
        raise ConfigError(f"{field} must reach data.max_length {data.max_length}, got {data.longest_row}")
    padded = config.train.batch_size * data.longest_row
    if config.job.name is JobName.train and padded > config.target.max_batch_tokens:
        raise ConfigError(
            f"train.batch_size x the longest row must be at most target.max_batch_tokens {config.target.max_batch_tokens}, "
            f"got {config.train.batch_size} x {data.longest_row} = {padded}"
        )


def _require(config: Config, path: str, holds: Callable[[Any], bool], rule: str) -> None:
    value = attrgetter(path)(config)
    if not holds(value):
        raise ConfigError(f"{path} {rule}, got {value.name if isinstance(value, Enum) else value}")

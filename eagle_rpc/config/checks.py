"""The check of a whole configuration: every setting's own rule, then the rules between settings."""

from collections.abc import Iterator, Sequence

from eagle_rpc.config.choices import (
    AnswerBackend,
    DraftLoss,
    DType,
    Encoding,
    Guesses,
    JobName,
    MembershipKind,
    Optimiser,
    Precision,
    Quantization,
    Schedule,
    Sharding,
    StepWeighting,
    TargetEngine,
)
from eagle_rpc.config.rules import broken_rules
from eagle_rpc.config.schema import Config, EvaluateConfig, TrainConfig
from eagle_rpc.errors import ConfigError


def check(config: Config, missing: Sequence[str] = ()) -> None:
    """Raises one `ConfigError` with a line for each `missing` setting and each rule that does not hold."""
    broken = {path: f"{path} must be given, got nothing" for path in missing}
    for path, message in broken_rules(config):
        broken.setdefault(path, message)
    # A rule between settings says nothing new about a setting that breaks its own rule.
    between = [message for message in _broken_between(config) if message.split()[0] not in broken]
    if mistakes := [*broken.values(), *between]:
        raise ConfigError(as_message(mistakes))


def as_message(mistakes: list[str], place: str = "in the configuration") -> str:
    """One message for one mistake or several; several have a line each."""
    if len(mistakes) == 1:
        return mistakes[0]
    return "\n  ".join([f"{len(mistakes)} mistakes {place}:", *mistakes])


def _broken_between(config: Config) -> Iterator[str]:
    yield from _broken_in_service(config)
    yield from _broken_in_engine(config)
    yield from _broken_in_answers(config)
    yield from _broken_in_decoding(config)
    yield from _broken_in_draft(config)
    yield from _broken_in_data(config)
    yield from _broken_in_training(config.train)
    if config.draft.train_embeddings and config.train.sharding is Sharding.state:
        yield "train.sharding must be none with draft.train_embeddings, whose rows each step looks up, got state"


def _broken_in_service(config: Config) -> Iterator[str]:
    """Rules for targets, and for the way to them."""
    job, topology, rpc, target = config.job, config.topology, config.rpc, config.target
    elastic = rpc.membership is MembershipKind.elastic
    silence = rpc.heartbeat_interval * rpc.heartbeat_misses
    if target.session_lease <= silence:
        yield (
            "target.session_lease must be longer than rpc.heartbeat_interval x rpc.heartbeat_misses = "
            f"{silence:g} s, got {target.session_lease:g}"
        )
    if target.max_reply_bytes_per_session > target.max_reply_bytes:
        yield (
            "target.max_reply_bytes_per_session must be at most "
            f"target.max_reply_bytes {target.max_reply_bytes}, got {target.max_reply_bytes_per_session}"
        )
    if topology.single and elastic:
        yield "topology.single must go with rpc.membership=static, got elastic"
    if topology.single and (topology.targets, topology.trainers) != (1, 1):
        yield (
            "topology.single must go with one target and one trainer, "
            f"got {topology.targets} and {topology.trainers}"
        )
    if topology.devices_per_target > 1:
        yield from _broken_over_devices(config)
    if topology.stages_per_target > 1:
        yield from _broken_over_stages(config)
    if topology.first_stage >= topology.stages_per_target:
        yield (
            f"topology.first_stage must be below topology.stages_per_target {topology.stages_per_target}, "
            f"got {topology.first_stage}"
        )
    if job.name is JobName.serve and not elastic:
        yield "job=serve must go with rpc.membership=elastic (rpc=elastic), got static"
    if job.name is JobName.drain and (job.drain_host is None) == (job.drain_targets == []):
        yield (
            "job.drain_host must be given with job=drain, or job.drain_targets instead, "
            f"got {job.drain_host} and {job.drain_targets}"
        )
    if config.data.packing and target.compile_shapes and not target.compile_packed:
        yield "target.compile_packed must be true for data.packing with target.compile_shapes, got false"
    if target.quantization is Quantization.fp8 and target.dtype is not DType.bfloat16:
        yield f"target.dtype must be bfloat16 for target.quantization=fp8, got {target.dtype.name}"


def _broken_in_engine(config: Config) -> Iterator[str]:
    """Rules for targets that vLLM runs."""
    target, vllm = config.target, config.target.vllm
    if target.engine is not TargetEngine.vllm:
        return
    with_engine = "with target.engine=vllm"
    num_gpus = vllm.tensor_parallel_size * vllm.pipeline_parallel_size
    given = config.topology.devices_per_target
    if config.job.name in (JobName.train, JobName.serve) and given != num_gpus:
        yield (
            "topology.devices_per_target must be target.vllm.tensor_parallel_size x "
            f"target.vllm.pipeline_parallel_size = {num_gpus} {with_engine}, got {given}"
        )
    if config.job.name is JobName.verify:
        yield "target.engine must be transformers with job=verify, whose bits vLLM does not promise, got vllm"
    if config.topology.single:
        yield f"topology.single must be false {with_engine}, which needs a process of its own, got true"
    if target.random:
        yield f"target.random must be empty {with_engine}, which loads stored models, got {target.random}"
    if target.quantization is not None:
        yield (
            f"target.quantization must be null {with_engine}, whose own methods target.vllm.quantization names, "
            f"got {target.quantization.name}"
        )
    if target.compile_shapes:
        yield f"target.compile_shapes must be empty {with_engine}, got {target.compile_shapes}"


def _broken_in_answers(config: Config) -> Iterator[str]:
    asked, asks_service = config.regenerate, config.regenerate.backend is AnswerBackend.service
    elastic = config.rpc.membership is MembershipKind.elastic
    if config.job.name is JobName.regenerate and asks_service and not elastic:
        yield "regenerate.backend=service must go with rpc.membership=elastic (rpc=elastic), got static"
    if asked.answers_per_prompt > 1 and asked.temperature == 0:
        yield (
            "regenerate.answers_per_prompt must be 1 with regenerate.temperature=0, whose answers are all "
            f"equal, got {asked.answers_per_prompt}"
        )
    if asked.stop and asks_service:
        yield "regenerate.stop must be empty with regenerate.backend=service, which ends answers by tokens alone"
    if asked.backend is AnswerBackend.openai and not asked.endpoints:
        yield "regenerate.endpoints must name a server for regenerate.backend=openai, got []"


def _broken_in_decoding(config: Config) -> Iterator[str]:
    if config.evaluate.guesses is Guesses.drawn and config.evaluate.temperature == 0:
        yield "evaluate.temperature must be positive with evaluate.guesses=drawn, got 0"
    yield from _broken_in_trees(config.evaluate)
    if config.job.name is JobName.compare and len(set(config.compare.drafts)) < 2:
        yield f"compare.drafts must name at least two directories, got {config.compare.drafts}"
    if config.job.name is JobName.serve_check and config.evaluate.temperature:
        yield (
            "evaluate.temperature must be 0 with job=serve_check, which compares texts, "
            f"got {config.evaluate.temperature:g}"
        )


def _broken_in_trees(evaluate: EvaluateConfig) -> Iterator[str]:
    nodes, depth, branching = evaluate.tree_nodes, evaluate.tree_depth, evaluate.tree_branching
    most = branching + (depth - 1) * branching**2
    if nodes is not None and not depth <= nodes <= most:
        yield (
            "evaluate.tree_nodes must lie between evaluate.tree_depth and the candidates of a tree, "
            f"branching + (depth - 1) x branching^2, so in [{depth}, {most}], got {nodes}"
        )
    if nodes is not None and evaluate.guesses is Guesses.drawn:
        yield (
            "evaluate.tree_nodes must be null with evaluate.guesses=drawn, since a dynamic tree is of the "
            f"likeliest guesses, got {nodes}"
        )


def _broken_in_draft(config: Config) -> Iterator[str]:
    draft = config.draft
    acceptance_loss = draft.loss in (DraftLoss.lk_alpha, DraftLoss.lk_lambda)
    if acceptance_loss and config.supervision.encoding is Encoding.probs:
        yield (
            f"draft.loss={draft.loss.name} must not go with supervision.encoding=probs, whose "
            "probabilities cover the draft vocabulary alone: use hidden or logits"
        )
    mixed = (DraftLoss.reverse_kl, DraftLoss.total_variation, DraftLoss.jensen_shannon)
    if draft.kl_share and draft.loss not in mixed:
        names = ", ".join(loss.name for loss in mixed)
        yield (
            f"draft.kl_share must be 0 but with draft.loss={names}, "
            f"got {draft.kl_share} with {draft.loss.name}"
        )
    window, steps = draft.sliding_window, draft.ttt_steps
    listed = draft.step_weighting is StepWeighting.listed
    if len(draft.step_weights) != (steps if listed else 0):
        number = f"a weight for each of draft.ttt_steps {steps}" if listed else "none"
        yield (
            f"draft.step_weights must have {number} with draft.step_weighting={draft.step_weighting.name}, "
            f"got {draft.step_weights}"
        )
    if window is not None and window < steps:
        yield f"draft.sliding_window must reach over draft.ttt_steps {steps}, got {window}"


def _broken_in_data(config: Config) -> Iterator[str]:
    job, data, target = config.job, config.data, config.target
    if job.name in (JobName.train, JobName.inspect) and data.train_path is None and not data.sources:
        yield "data.train_path must be given, or data.sources, got nothing"
    if data.row_length is not None and (not data.packing or data.bucket_lengths):
        yield (
            "data.row_length must go with data.packing=true and without data.bucket_lengths, "
            f"got data.packing={str(data.packing).lower()} and data.bucket_lengths={data.bucket_lengths}"
        )
    if data.longest_row < data.max_length:
        field = "data.bucket_lengths" if data.row_length is None else "data.row_length"
        yield f"{field} must reach data.max_length {data.max_length}, got {data.longest_row}"
    batch_size = config.train.batch_size
    if job.name is JobName.train and batch_size * data.longest_row > target.max_batch_tokens:
        yield (
            "train.batch_size x the longest row must be at most "
            f"target.max_batch_tokens {target.max_batch_tokens}, "
            f"got {batch_size} x {data.longest_row} = {batch_size * data.longest_row}"
        )


def _broken_in_training(train: TrainConfig) -> Iterator[str]:
    if train.precision is Precision.fp8:
        yield from _broken_in_fp8(train)
    if train.optimiser is Optimiser.muon and train.sharding is Sharding.state:
        yield "train.sharding must be none with train.optimiser=muon, which needs whole matrices, got state"
    for name in ("validate_every", "validation_batches"):
        if train.patience is not None and getattr(train, name) == 0:
            yield f"train.{name} must be positive with train.patience, got 0"
    if train.schedule is Schedule.wsd and train.warmup_share + train.decay_share > 1:
        yield (
            "train.decay_share must be at most 1 - train.warmup_share with train.schedule=wsd, "
            f"got {train.decay_share} with {train.warmup_share}"
        )


def _broken_in_fp8(train: TrainConfig) -> Iterator[str]:
    """What keeps a training from the fused step, which alone computes in fp8."""
    if train.autocast is not DType.bfloat16:
        found = "null" if train.autocast is None else train.autocast.name
        yield f"train.autocast must be bfloat16 with train.precision=fp8, got {found}"
    if not train.fused:
        yield "train.fused must be true with train.precision=fp8, got false"
    if train.device == "cpu":
        yield "train.device must be a GPU with train.precision=fp8, got cpu"


def _broken_over_stages(config: Config) -> Iterator[str]:
    """Rules for targets of several processes."""
    given, field = config.topology.stages_per_target, "topology.stages_per_target"
    if config.target.engine is TargetEngine.vllm:
        yield f"{field} must be 1 with target.engine=vllm, which starts its own processes, got {given}"
    reason = "later stages run the model's code on stand-ins for its embedding"
    yield from _broken_where_divided(config, field, given, "in one process", reason)


def _broken_over_devices(config: Config) -> Iterator[str]:
    """Rules for targets over several devices."""
    given = config.topology.devices_per_target
    field = "topology.devices_per_target"
    yield from _broken_where_divided(config, field, given, "on one device", "its masks stay on one device")


def _broken_where_divided(config: Config, field: str, given: int, place: str, reason: str) -> Iterator[str]:
    """Rules for targets whose layers are divided: jobs that run `place`, and why flex_attention does not fit."""
    if config.topology.single:
        yield f"topology.single must be false with {field}={given}, got true"
    asks_itself = config.job.name is JobName.regenerate and config.regenerate.backend is AnswerBackend.engine
    whole = (JobName.evaluate, JobName.compare, JobName.serve_check, JobName.verify)
    if config.job.name in whole or asks_itself:
        backend = " and regenerate.backend=engine" if asks_itself else ""
        yield f"{field} must be 1 with job={config.job.name.name}{backend}, which runs {place}, got {given}"
    if config.target.attention == "flex_attention":
        yield (
            f"target.attention must be another than flex_attention with {field}={given}, since {reason}, "
            "got flex_attention"
        )

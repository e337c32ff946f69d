"""Settings of jobs, runs, and of the workers that RPC connects."""

from dataclasses import dataclass, field
from typing import Annotated

from omegaconf import MISSING

from eagle_rpc.config import rules
from eagle_rpc.config.choices import (
    Encoding,
    JobName,
    LogFormat,
    MembershipKind,
    VerifySide,
)
from eagle_rpc.config.rules import FilePath, NotNegative, Positive


@dataclass(kw_only=True, slots=True)
class JobConfig:
    """The job of this process, and settings of jobs that have no section of their own."""

    name: JobName = MISSING
    """Chosen by `job=NAME`."""
    verify_steps: Positive[int] = 3
    """Optimiser steps that `job=verify` compares."""
    verify_side: VerifySide = VerifySide.both
    """Set by `job=verify` for the processes that it starts."""
    verify_topologies: Annotated[list[str], rules.TOPOLOGIES] = field(
        default_factory=lambda: ["1x1", "1x2", "2x2"]
    )
    """Topologies that `job=verify` runs, each with the same number of trainers on both sides."""
    verify_encodings: list[Encoding] = field(
        default_factory=lambda: [Encoding.probs, Encoding.logits, Encoding.hidden]
    )
    """Encodings that `job=verify` compares; the default is all exact ones."""
    verify_timeout: Positive[float] = 600.0
    """Seconds for one side of one comparison."""
    status_watch: NotNegative[float] = 0.0
    """Seconds between two looks of `job=status`; 0: one look."""
    status_json: bool = False
    """`job=status` prints one JSON object a look instead of tables."""
    drain_host: str | None = None
    """`job=drain`: host whose targets leave, with their stages, as the column `host` of `job=status` names it."""
    drain_targets: list[str] = field(default_factory=list)
    """`job=drain`: names of the targets that leave, with all their stages."""
    drain_within: Positive[float] = 600.0
    """`job=drain`: seconds within which they must have left."""
    serve_until_unused: bool = False
    """`job=serve` ends when its last session has gone; otherwise it serves until it is told to stop."""
    sweep_timeout: Positive[float] = 604800.0
    """Seconds for one job of one run of a sweep (`--multirun`), after which that run counts as failed."""
    plan_device_gib: Positive[float] | None = None
    """Memory of one GPU in GiB with which `job=plan` compares what each needs, 80 for an H100; null: none."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    """One training run and its files. Paths are relative to the working directory; `~` is the home directory."""

    name: Annotated[str, rules.NAME] = "smollm2"
    """Name of the run, shown by services and trackers."""
    dir: FilePath = "runs/${run.name}"
    """The run directory: configuration, metrics, logs, checkpoints, export, plots."""
    cache_dir: FilePath = ".cache/eagle_rpc"
    """Directory of converted models, sizes of targets, vocabulary mappings and compiled code, kept between runs."""
    shared_dir: FilePath = "/dev/shm"
    """Directory, in memory, of the one copy of the target's embedding and head rows that the trainers of a host
    share. Without room there, each trainer has its own."""
    seed: int = 0
    """Seed of initial weights, order of the data and sampling."""
    log_format: LogFormat = LogFormat.text
    """Form of the log of every process, in the terminal and in `run.dir/logs`."""
    threads: NotNegative[int] = 0
    """CPU threads of each worker; 0: the cores, divided between the workers of the host."""


@dataclass(kw_only=True, slots=True)
class TopologyConfig:
    """The processes of a job."""

    targets: Positive[int] = 1
    """Target replicas of a static job."""
    trainers: Positive[int] = 1
    """Trainer processes of one torchrun."""
    devices_per_target: Positive[int] = 1
    """GPUs of one host over which each target's decoder layers are spread, with as many passes under way. Target i
    takes GPUs i x N to i x N + N - 1, trainers the next ones; replies leave from the last GPU of a target."""
    stages_per_target: Positive[int] = 1
    """Processes, on one host or several, over which each target's decoder layers are spread, each with
    `devices_per_target` devices. `target0` is the first stage and what trainers know, `target0.1`, ... follow."""
    first_target: NotNegative[int] = 0
    """Number of the first replica of a `job=serve`; jobs of one registry need different numbers."""
    first_stage: NotNegative[int] = 0
    """`job=serve` with `topology.stages_per_target`: stage of the first process; further ones follow in order."""
    single: bool = False
    """One process is target and trainer and calls itself over RPC."""


@dataclass(kw_only=True, slots=True)
class RpcConfig:
    """Connections between workers: membership, time limits, size limits, TensorPipe."""

    membership: MembershipKind = MembershipKind.static
    """Whether the workers form one job or meet in a registry; chosen by `rpc=static` or `rpc=elastic`."""
    interface: str = "lo"
    """Network interface that RPC, registry, gloo and NCCL bind to."""
    start_timeout: Positive[float] = 120.0
    """Seconds for all workers to join."""
    model_timeout: Positive[float] = 600.0
    """Seconds that trainers wait for a target to load its model."""
    request_timeout: Positive[float] = 300.0
    """Seconds for a request, queue included; travels with it as its deadline."""
    reconnect_deadline: Positive[float] = 300.0
    """Seconds that trainers wait for a target to come back before they write a checkpoint and end."""
    heartbeat_interval: Positive[float] = 1.0
    """Seconds between two heartbeats: of a trainer at each target, of an elastic worker at the registry."""
    heartbeat_misses: Positive[int] = 3
    """Heartbeats in a row without an answer after which a peer counts as silent."""
    targets_per_trainer: Positive[int] = 16
    """Targets of an elastic service to which a trainer connects at a time; more of them cost heartbeats and
    sessions. Each trainer takes others, so that all targets are used."""
    drain_timeout: Positive[float] = 30.0
    """Seconds that a target gives its queued requests after it is told to stop."""
    shutdown_timeout: Positive[float] = 60.0
    """Seconds for an orderly shutdown; then the process ends itself."""
    registry: Annotated[str, rules.ADDRESS] = "127.0.0.1:29711"
    """Address of the registry where elastic targets and trainers meet."""
    host_registry: bool = False
    """`job=serve`: the first target runs the registry itself; no `job=registry` is needed."""
    token_file: FilePath = "~/.eagle_rpc/token"
    """File of the registry's secret. The host of the registry creates it, readable by its owner only."""
    max_pickle_bytes: Positive[int] = 8 * 2**20
    """Largest message, tensors not counted, that a worker unpickles."""
    max_request_bytes: Positive[int] = 64 * 2**20
    """Largest sum of tensors of one message that a target accepts; further stages of a target also accept the hidden
    states of its largest request."""
    worker_threads: Annotated[int, rules.AT_LEAST_2] = 4
    """Threads of each worker that handle RPC; a handler may wait for another one."""
    transports: Annotated[list[str], rules.UV_LAST] = field(default_factory=lambda: ["uv"])
    """TensorPipe transports; peers use the address of `uv`. `shm` is faster on large hosts, takes a core."""
    channels: list[str] = field(default_factory=list)
    """TensorPipe channels; empty: `basic`, and torch's choice for GPUs. `mpt_uv` uses several connections
    between hosts. `cma` reads the sender's memory, which torch may free early if the connection breaks."""

"""The typed configuration. Hydra composes it from `conf/`, `config.load` checks it, nothing below sees OmegaConf.

A field's docstring stands below it and says unit, rule and meaning; `choices` has the values of those that are one of a few.
"""

from dataclasses import dataclass, field
from typing import Any

from omegaconf import MISSING

from eagle_rpc.config.choices import (
    CompileMode,
    DraftLoss,
    DType,
    Encoding,
    JobName,
    Membership,
    OnError,
    Overlong,
    PromptSource,
    Quantization,
    Resume,
    Rows,
    Sharding,
    VerifySide,
)


@dataclass(kw_only=True, slots=True)
class JobConfig:
    name: JobName = MISSING
    verify_steps: int = 3
    """Optimiser steps that `job=verify` compares (> 0)."""
    verify_side: VerifySide = VerifySide.both
    verify_topologies: list[str] = field(default_factory=lambda: ["1x1", "1x2", "2x2"])
    """Topologies (`targets x trainers`) that `job=verify` runs, each with the same number of trainer ranks on both sides."""
    verify_encodings: list[Encoding] = field(
        default_factory=lambda: [Encoding.probs, Encoding.logits, Encoding.hidden]
    )
    """Encodings that `job=verify` compares."""
    verify_timeout: float = 600.0
    """Seconds one side of one comparison may take."""
    status_watch: float = 0.0
    """Seconds between two looks of `job=status` (>= 0; 0: one look)."""
    status_json: bool = False
    """`job=status` prints one JSON object a look instead of tables."""
    serve_until_unused: bool = False
    """`job=serve` ends by itself when the last of its sessions has gone; otherwise it serves until it is told to stop."""


@dataclass(kw_only=True, slots=True)
class RunConfig:
    name: str = MISSING
    dir: str = MISSING
    """The run directory: config, metrics, logs, checkpoints, export, plots."""
    cache_dir: str = MISSING
    """Where converted models and vocabulary mappings are kept between runs."""
    seed: int = 0
    threads: int = 0
    """CPU threads of each worker of a multi-process job; 0 divides the cores between the workers."""


@dataclass(kw_only=True, slots=True)
class TopologyConfig:
    targets: int = 1
    """Target replicas (> 0); elastic: as many as there are, this one does not count."""
    trainers: int = 1
    """Trainer processes (> 0); elastic: the workers of the trainers' own torchrun, this one does not count."""
    first_target: int = 0
    """Number of the first replica that a `job=serve` starts (>= 0): a second such job on the same registry needs another."""
    single: bool = False
    """One process is target and trainer and calls itself over RPC."""


@dataclass(kw_only=True, slots=True)
class RpcConfig:
    membership: Membership = Membership.static
    interface: str = "lo"
    """Network interface that RPC, the registry and gloo bind to."""
    start_timeout: float = 120.0
    """Seconds until all workers must have joined."""
    model_timeout: float = 600.0
    """Seconds that trainers wait for a target to load its model."""
    request_timeout: float = 300.0
    """Seconds a request may take, queue included; travels with it as its deadline."""
    reconnect_deadline: float = 300.0
    """Seconds that trainers wait for a target to come back before they checkpoint and end."""
    heartbeat_interval: float = 1.0
    """Seconds between two heartbeats of a trainer at each target, and of every elastic worker at the registry (> 0)."""
    heartbeat_misses: int = 3
    """Heartbeats without an answer after which a peer is taken for silent (> 0)."""
    drain_timeout: float = 30.0
    """Seconds that a target which is told to stop gives to its queue."""
    shutdown_timeout: float = 60.0
    """Seconds an orderly shutdown may take before the process ends itself."""
    registry: str = "127.0.0.1:29711"
    """`host:port` of the registry where elastic targets and trainers find each other."""
    host_registry: bool = False
    """`job=serve`: the first target hosts the registry itself, so that no `job=registry` is needed."""
    token_file: str = "~/.eagle_rpc/token"
    """File with the registry's secret; who hosts the registry makes it if it is absent, readable by its owner only."""
    max_pickle_bytes: int = 8 * 2**20
    """Largest message without its tensors that a worker unpickles (> 0)."""
    max_request_bytes: int = 64 * 2**20
    """Largest tensors of one message that a target takes (> 0)."""
    worker_threads: int = 4
    """RPC handler threads of each worker (> 1: a handler may wait for another)."""
    transports: list[str] = field(default_factory=lambda: ["uv"])
    """TensorPipe transports, `uv` last: its address is the one that peers are told. `shm` before it is faster on large hosts
    but burns a core while idle."""
    channels: list[str] = field(default_factory=list)
    """TensorPipe channels; empty: `basic`, and whatever torch chooses for a worker with a GPU. `mpt_uv` uses several connections
    between hosts. `cma` copies from the sender's memory, which torch may have freed if the connection breaks meanwhile."""


@dataclass(kw_only=True, slots=True)
class TargetConfig:
    model: str = MISSING
    """Directory or hub name of a causal language model; a `.gguf` file inside a package is written `package/file.gguf`."""
    random: dict[str, Any] = field(default_factory=dict)
    """Architecture of a random target instead of a stored one (`model_type` and its config fields); empty: load `model`."""
    dtype: DType = DType.bfloat16
    device: str = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: the local rank's GPU where there is one."""
    attention: str = "sdpa"
    """Attention implementation of transformers, without `paged|`; packages that it needs have to be installed."""
    quantization: Quantization | None = None
    """Quantises the weights of a stored model as they are loaded, all but head and embedding; null: as they are stored."""
    compile_shapes: list[str] = field(default_factory=list)
    """Shapes, `BxT` each, that decoder layers are compiled for at the start; empty: nothing is compiled. Batches are cut and padded to
    them, so name `train.batch_size` x each of `data.bucket_lengths`. Compiled and eager bits differ."""
    compile_packed: bool = False
    """Compile the form for packed chats as well, in twice the time; without it a compiled target refuses them."""
    compile_mode: CompileMode = CompileMode.default
    aux_layer_ids: list[int] | None = None
    """Decoder layers whose outputs are captured, counted after the layer; null: `[1, L//2 - 1, L - 4]`."""
    max_length: int | None = None
    """Longest sequence accepted; null: the model's context."""
    max_batch_tokens: int = 65536
    """Largest B x T of one request (> 0)."""
    chunk_rows: int = 2048
    """Rows that are projected onto the whole vocabulary at a time (> 0); more of them keep a large GPU busier."""
    fused_rows: bool = True
    """On a GPU: argmax, log-normaliser and draft-vocab columns of those rows by one Triton kernel; false: by torch, through an fp32
    copy. On a CPU the two are the same."""
    fused_mlp: bool = True
    """On a Hopper GPU: the gate of SiLU-gated MLPs is applied by a Triton kernel inside the matrix product; false: by the model's own
    modules. Elsewhere the two are the same."""
    max_queued_requests: int = 64
    """Requests that wait for the forward thread at most (> 0)."""
    max_queued_per_session: int = 16
    """Requests of one session that wait or run at a time at most (> 0): the credits of its trainer."""
    max_reply_bytes: int = 8 * 2**30
    """Bytes of replies that are promised or made but not yet sent at most (> 0), over all sessions."""
    max_reply_bytes_per_session: int = 4 * 2**30
    """The same for one session (> 0)."""
    max_sessions: int = 256
    """Sessions that are open at a time at most (> 0)."""
    session_lease: float = 60.0
    """Seconds without a heartbeat or request after which a session is closed and what it queued is dropped (> 0)."""


@dataclass(kw_only=True, slots=True)
class SupervisionConfig:
    encoding: Encoding = Encoding.hidden
    rows: Rows = Rows.position_mask
    prefetch: int = 4
    """Requests in flight for each trainer (> 0)."""


@dataclass(kw_only=True, slots=True)
class DraftConfig:
    vocab_size: int = 8192
    """Draft vocabulary K (> 0, at most the target's)."""
    intermediate_size: int | None = None
    """Width of the feed-forward block; null: the target's."""
    num_attention_heads: int | None = None
    """null: the target's."""
    num_key_value_heads: int | None = None
    """null: the target's."""
    norm_before_residual: bool = False
    """Residual of the decoder layer after `hidden_norm` instead of before it."""
    seed_head: bool = True
    """The draft's head starts from the target's rows instead of from noise."""
    ttt_steps: int = 7
    """Steps the draft is unrolled in training (> 0)."""
    step_decay: float = 0.8
    """Weight of step k is `step_decay ** k`, normalised over the steps (0 < decay <= 1)."""
    loss: DraftLoss = DraftLoss.soft_cross_entropy
    """`lk_alpha` and `lk_lambda` aim at acceptance; they need the target's true probabilities, which `probs` does not carry."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    train_path: str = MISSING
    """JSONL of chats, one a line: `messages` or ShareGPT's `conversations`."""
    validation_path: str | None = None
    """A second file; null: `validation_share` of the chats of `train_path`."""
    validation_share: float = 0.02
    """Share of the chats set aside by a hash of their content (0 <= share < 1)."""
    max_length: int = 2048
    """Longest sequence in tokens (> 2)."""
    overlong: Overlong = Overlong.truncate
    on_error: OnError = OnError.fail
    bucket_lengths: list[int] = field(default_factory=list)
    """Ascending lengths that batches are padded to; empty: the longest of the batch, rounded up to 64."""
    packing: bool = False
    """Fills each row with whole chats that do not see each other, instead of one chat and padding."""
    row_length: int | None = None
    """Tokens that packing fills a row up to (at least `max_length`); null: the last of `bucket_lengths`, or `max_length`."""
    chat_template: str | None = None
    """Path of a Jinja template that replaces the tokenizer's."""
    prompt_source: PromptSource = PromptSource.files
    """`chitchat` writes the two prompt files from an installed package; `files` expects them."""

    @property
    def longest_row(self) -> int:
        """Tokens of the longest row that a batch may have, padding included."""
        return self.row_length or (self.bucket_lengths or [self.max_length])[-1]


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    max_steps: int = 1000
    """Optimiser steps (> 0); the data repeat as needed."""
    max_epochs: int | None = None
    """Ends earlier when the data have been seen this often; null: `max_steps` alone decides."""
    batch_size: int = 4
    """Rows of one micro-batch of one trainer (> 0): each of them one chat, or with `data.packing` several."""
    accumulation: int = 1
    """Micro-batches of one optimiser step of one trainer (> 0)."""
    learning_rate: float = 1e-3
    min_learning_rate_share: float = 0.05
    """The cosine ends at this share of `learning_rate` (0 <= share <= 1)."""
    warmup_share: float = 0.05
    """Share of the steps that the rate climbs linearly (0 <= share <= 1)."""
    weight_decay: float = 0.0
    betas: list[float] = field(default_factory=lambda: [0.9, 0.95])
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm (> 0)."""
    autocast: DType | None = DType.bfloat16
    """Format of matrix products; weights stay fp32. null: fp32 throughout."""
    fused: bool = True
    """On a GPU, with `autocast=bfloat16`: the fused TTT step instead of autograd over the reference."""
    recompute_mlp: bool = False
    """The fused step computes the feed-forward block again in the backward: two thirds of the memory for a tenth more time."""
    offload_supervision: bool = False
    """With `accumulation` on a GPU: supervision waits in pinned host memory for the rest of its step, so that the GPU holds
    no more of it with more micro-batches."""
    sharding: Sharding = Sharding.none
    """`state`: several trainers share out master weights, optimiser state and reduced gradients (FSDP2); `none`: each has all."""
    device: str = "auto"
    validate_every: int = 100
    """Optimiser steps between validations (>= 0; 0: only at the end)."""
    validation_batches: int = 16
    """Micro-batches of a validation (>= 0)."""
    checkpoint_every: int = 200
    """Optimiser steps between checkpoints (> 0)."""
    keep_checkpoints: int = 2
    """Newest checkpoints that stay (> 0)."""
    log_every: int = 10
    """Optimiser steps between lines of `metrics.jsonl` (> 0)."""
    resume: Resume = Resume.never


@dataclass(kw_only=True, slots=True)
class ServingConfig:
    checkpoint: str | None = None
    """Checkpoint directory to export; null: the newest of the run."""
    dtype: DType = DType.bfloat16
    """Format of the exported weights."""
    dir: str = MISSING
    """Where the exported draft goes."""


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    draft: str = MISSING
    """Directory of an exported draft."""
    prompts: str = MISSING
    """JSONL of chats whose last user turn is answered; any assistant turns after it are ignored."""
    num_prompts: int = 16
    """Prompts that are decoded (> 0)."""
    max_new_tokens: int = 64
    """Tokens of an answer (> 0)."""
    num_draft_tokens: int = 3
    """Guesses k of each round (> 0)."""
    dtype: DType = DType.float32
    near_tie: float = 1e-4
    """A differing token counts as a tie when the target's two best logits are closer than this."""


@dataclass(kw_only=True, slots=True)
class RegenerateConfig:
    prompts: str = MISSING
    """JSONL of chats: their user turns are asked, the target answers."""
    output: str = MISSING
    """JSONL that answers are appended to; a chat already in it is not asked again."""
    num_prompts: int | None = None
    """null: all."""
    batch_size: int = 128
    """Answers that are decoded at a time (> 0); a finished one makes room for the next prompt."""
    max_new_tokens: int = 96
    """Tokens of one answer, the end of turn included (> 0)."""
    max_prompt_tokens: int = 512
    """Longer prompts are skipped and counted."""
    temperature: float = 0.0
    """0: greedy."""
    dtype: DType = DType.bfloat16


@dataclass(kw_only=True, slots=True)
class Config:
    """The whole of a run."""

    job: JobConfig = field(default_factory=JobConfig)
    run: RunConfig = field(default_factory=RunConfig)
    topology: TopologyConfig = field(default_factory=TopologyConfig)
    rpc: RpcConfig = field(default_factory=RpcConfig)
    target: TargetConfig = field(default_factory=TargetConfig)
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    draft: DraftConfig = field(default_factory=DraftConfig)
    data: DataConfig = field(default_factory=DataConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    serving: ServingConfig = field(default_factory=ServingConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)

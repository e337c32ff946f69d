"""The typed configuration. Hydra composes it from `conf/` and overrides; other rooms never see OmegaConf.

A setting's rule stands in its type; unit and meaning stand below it. `docs/generate.py` makes a page of them.
"""

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from eagle_rpc.config import rules
from eagle_rpc.config.choices import (
    AnswerBackend,
    CompileMode,
    DraftLoss,
    DraftRope,
    DType,
    Encoding,
    Engine,
    ExportForm,
    Guesses,
    InitVocab,
    JobName,
    MembershipKind,
    OnError,
    Optimiser,
    Overlong,
    Precision,
    PromptSource,
    Quantization,
    Resume,
    Rows,
    Schedule,
    Sharding,
    StepWeighting,
    TargetEngine,
    TrackerName,
    VerifySide,
)
from eagle_rpc.config.rules import FilePath, NotNegative, Positive, Share


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
    """Directory of converted models, vocabulary mappings and compiled code, kept between runs."""
    seed: int = 0
    """Seed of initial weights, order of the data and sampling."""
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


@dataclass(kw_only=True, slots=True)
class VLLMConfig:
    """vLLM as the engine of a target (`target.engine=vllm`)."""

    tensor_parallel_size: Positive[int] = 1
    """GPUs that share each layer; times `pipeline_parallel_size` it is `topology.devices_per_target`."""
    pipeline_parallel_size: Positive[int] = 1
    """Groups of GPUs that hold consecutive layers."""
    expert_parallel: bool = False
    """The GPUs of a layer hold whole experts instead of a share of each."""
    gpu_memory_utilization: Annotated[float, rules.SHARE_ABOVE_0] = 0.85
    """Share of each GPU's memory for weights, activations and keys; the rest is for the head and replies."""
    kv_cache_gib: Positive[float] | None = None
    """GiB for keys and values of the sequences under way; null: what `gpu_memory_utilization` leaves on a GPU,
    1 on a CPU."""
    max_batched_tokens: Positive[int] | None = None
    """Tokens of one step of the engine; null: vLLM's choice. Longer chats take several steps."""
    quantization: str | None = None
    """Method of vLLM that quantises the weights during loading, as `fp8`; null: as they are stored."""
    enforce_eager: bool = True
    """Neither `torch.compile` nor CUDA graphs, which need minutes at start and serve short steps."""
    check: bool = True
    """Compares the engine with transformers at the first start, for which transformers loads the model before
    it, and with the kept result at later ones; false: for checkpoints that transformers cannot run here."""
    start_timeout: Positive[float] = 1800.0
    """Seconds for the engine to load the model; then the process ends."""
    pass_timeout: Positive[float] = 600.0
    """Seconds for one forward pass; then the process ends, as nothing else stops an engine that hangs."""


@dataclass(kw_only=True, slots=True)
class TargetConfig:
    """The frozen language model and the service around it."""

    model: FilePath = MISSING
    """Directory or hub name of a causal language model, or `package/file.gguf` of an installed package."""
    random: dict[str, Any] = field(default_factory=dict)
    """Architecture (`model_type` and config fields) of a random model; empty: load `target.model`."""
    engine: TargetEngine = TargetEngine.transformers
    """What makes the supervision. Regeneration, evaluation and comparison in a process of their own load the
    model by transformers."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """The engine vLLM."""
    dtype: DType = DType.bfloat16
    """Format of weights and activations."""
    device: Annotated[str, rules.DEVICE] = "auto"
    """`cpu`, `cuda`, `cuda:N`, or `auto`: the GPU of the local rank if there is one, else the CPU."""
    attention: Annotated[str, rules.NOT_PAGED] = "sdpa"
    """Attention implementation of transformers; packages that it needs must be installed. `sdpa` is `eager` for
    models that have none, or whose soft cap it would leave out."""
    quantization: Quantization | None = None
    """Quantises the weights during loading, except head and embedding; null: weights as they are stored."""
    compile_shapes: Annotated[list[str], rules.SHAPES] = field(default_factory=list)
    """Shapes `BxT` that decoder layers are compiled for at start; empty: none. Batches are cut and padded to
    them: name `train.batch_size` x each of `data.bucket_lengths`. Compiled and eager bits differ."""
    compile_packed: bool = False
    """Also compiles the form for packed chats, in twice the time; else a compiled target refuses them."""
    compile_mode: CompileMode = CompileMode.default
    """Mode of `torch.compile`."""
    aux_layer_ids: Annotated[list[int], rules.AUX_LAYERS] | None = None
    """Decoder layers whose outputs are captured, counted after the layer; null: `[1, L//2 - 1, L - 4]`. Their
    number is that of the states that the draft reads."""
    max_length: Positive[int] | None = None
    """Longest sequence in tokens; null: the model's context. Models with `longrope` take their long factors if it
    exceeds the context of their first training."""
    max_batch_tokens: Positive[int] = 65536
    """Largest B x T of one request, padding included."""
    chunk_rows: Positive[int] = 2048
    """Rows that are projected onto the whole vocabulary at a time; more rows use a large GPU better."""
    fused_rows: bool = True
    """On a GPU: one Triton kernel for argmax, log-normaliser and draft-vocab columns, not torch in fp32."""
    fused_mlp: bool = True
    """On a Hopper GPU: Triton kernels for SiLU-gated MLPs and experts, with the gate inside the matrix product."""
    max_queued_requests: Positive[int] = 64
    """Requests that may wait for the forward thread."""
    max_queued_per_session: Positive[int] = 16
    """Requests of one session that may wait or run at a time: the credits of its trainer."""
    max_reply_bytes: Positive[int] = 8 * 2**30
    """Bytes of replies, over all sessions, that may be promised or made but not yet sent."""
    max_reply_bytes_per_session: Positive[int] = 4 * 2**30
    """The same limit for one session; at most `target.max_reply_bytes`."""
    max_answers: Positive[int] = 128
    """Prompts that the target answers at a time, and prompts that may wait for it."""
    max_answer_tokens: Positive[int] = 131072
    """Tokens whose keys and values answers may hold: the prompts answered at a time x the longest of them."""
    max_sessions: Positive[int] = 256
    """Sessions that may be open at a time."""
    session_lease: Positive[float] = 60.0
    """Seconds without heartbeat or request after which a session is closed and its queue is dropped."""


@dataclass(kw_only=True, slots=True)
class SupervisionConfig:
    """The answers of a target to training batches."""

    encoding: Encoding = Encoding.hidden
    """Form in which supervision travels; chosen by `supervision=NAME`."""
    rows: Rows = Rows.position_mask
    """Rows that carry a target distribution."""
    prefetch: Positive[int] = 4
    """Requests in flight for each trainer."""


@dataclass(kw_only=True, slots=True)
class DraftConfig:
    """The draft: Llama-style layers, shaped like the target, and its objective."""

    vocab_size: Positive[int] | None = 8192
    """Draft vocabulary K; at most the target's vocabulary, which null takes whole."""
    num_layers: Positive[int] = 1
    """Decoder layers. Several train by the reference step, which is slower on a GPU."""
    sliding_window: Positive[int] | None = None
    """Tokens that the draft attends to, at least `draft.ttt_steps`; null: all earlier ones."""
    intermediate_size: Positive[int] | None = None
    """Width of the feed-forward block; null: the target's, of experts that of all that a token passes,
    shared ones included."""
    num_attention_heads: Positive[int] | None = None
    """Attention heads; null: the target's, or hidden size over width of its values where it stores latents."""
    num_key_value_heads: Positive[int] | None = None
    """Key-value heads; null: the target's, at most 8 where it stores latents."""
    rope: DraftRope = DraftRope.target
    """Rotary embedding: the target's, stretched as its own, or plain with the target's base."""
    norm_before_residual: bool = False
    """The decoder layer's residual starts after `hidden_norm` instead of before it."""
    norm_before_fc: bool = False
    """One norm over the captured states side by side, before they are projected."""
    fc_norm: bool = False
    """EAGLE-3.1: a norm for each captured layer, before the states are projected."""
    norm_output: bool = False
    """EAGLE-3.1: each further step reads the normed output of the step before, as the head does."""
    seed_head: bool = True
    """The head starts from the target's rows instead of from noise."""
    train_embeddings: bool = False
    """Also trains the draft's copy of the target's token embedding, in fp32: 16 bytes a value of the target's whole
    vocabulary with AdamW. SGLang and TensorRT-LLM serve the target's embedding instead."""
    init_from: FilePath | None = None
    """Directory of a trained EAGLE-3 draft of this target to start from: an export, or a draft of SpecForge,
    NeMo AutoModel or speculators in safetensors; null: a new draft."""
    init_vocab: InitVocab = InitVocab.stored
    """Draft vocabulary with `draft.init_from`."""
    ttt_steps: Positive[int] = 7
    """Steps that the draft is unrolled in training."""
    step_decay: Annotated[float, rules.DECAY] = 0.8
    """Step k weighs `step_decay ** k`, normalised over the steps."""
    step_weighting: StepWeighting = StepWeighting.decay
    """Origin of the weights of the steps."""
    step_weights: Annotated[list[float], rules.WEIGHTS] = field(default_factory=list)
    """With `draft.step_weighting=listed`: the weight of each step, normalised over the steps."""
    loss: DraftLoss = DraftLoss.soft_cross_entropy
    """Loss of a row. `lk_alpha` and `lk_lambda` aim at acceptance and need another encoding than `probs`."""
    kl_share: Share[float] = 0.0
    """Share of (forward) KL in the losses `reverse_kl`, `total_variation` and `jensen_shannon`."""


@dataclass(kw_only=True, slots=True)
class SourceConfig:
    """One of several sources of chats."""

    path: FilePath = ""
    """Chats in any form that `data.train_path` takes."""
    weight: Positive[float] = 1.0
    """How often an epoch has each chat; of 0.5 a fixed half of the chats, of 2.5 two or three times each."""


@dataclass(kw_only=True, slots=True)
class DataConfig:
    """Chats, and the rows that they fill."""

    train_path: FilePath | None = None
    """Chats: a file (JSON lines, JSON, parquet, Arrow; also in gzip or zstd), a directory, a pattern of files
    or a dataset of the Hugging Face hub as `owner/name:config@split`; null: `data.sources` alone."""
    sources: list[SourceConfig] = field(default_factory=list)
    """Further chats to train on, each with a weight, as `[{path: chats.jsonl, weight: 2}]`."""
    validation_path: FilePath | None = None
    """Chats of the same forms; null: `data.validation_share` of the chats to train on."""
    validation_share: Annotated[float, rules.SHARE_BELOW_1] = 0.02
    """Share of the chats that validate instead of train, chosen by a hash of their content."""
    max_length: Annotated[int, rules.AT_LEAST_3] = 2048
    """Longest chat in tokens."""
    overlong: Overlong = Overlong.truncate
    """Whether a longer chat is cut or left out."""
    on_error: OnError = OnError.fail
    """Whether a broken record ends the job or is counted and skipped."""
    bucket_lengths: Annotated[list[int], rules.ASCENDING] = field(default_factory=list)
    """Lengths that batches are padded to, up to `data.max_length` or more; empty: multiples of 64."""
    packing: bool = False
    """Fills each row with whole chats that do not see each other, instead of one chat and padding."""
    row_length: Positive[int] | None = None
    """Tokens of a packed row, at least `data.max_length`; null: the last bucket, or `data.max_length`."""
    chat_template: FilePath | None = None
    """Path of a Jinja template that replaces the tokenizer's."""
    template_arguments: dict[str, Any] = field(default_factory=dict)
    """Arguments of the template for every rendering, such as `{enable_thinking: false}`."""
    date: Annotated[str, rules.DATE] | None = None
    """Day that templates write, as 2026-01-31; null: the day on which the run started."""
    workers: NotNegative[int] = 0
    """Processes that tokenise large data; 0: one for each core."""
    prompt_source: PromptSource = PromptSource.files
    """Origin of the two prompt files."""

    @property
    def longest_row(self) -> int:
        """Tokens of the longest possible row, padding included."""
        return self.row_length or (self.bucket_lengths or [self.max_length])[-1]


@dataclass(kw_only=True, slots=True)
class TrainConfig:
    """The training loop, the optimiser and checkpoints."""

    max_steps: Positive[int] = 1000
    """Optimiser steps; the data repeat as needed."""
    max_epochs: Positive[int] | None = None
    """Passes over the data after which training ends even before `train.max_steps`; null: no such limit."""
    batch_size: Positive[int] = 4
    """Rows of one micro-batch of one trainer; a row holds one chat, or several with `data.packing`."""
    accumulation: Positive[int] = 1
    """Micro-batches of one optimiser step of one trainer."""
    optimiser: Optimiser = Optimiser.adamw
    """AdamW alone, or Muon for the matrices of the draft's layer."""
    learning_rate: Positive[float] | None = None
    """Highest learning rate, reached after the warm-up; null: 1e-3 up to hidden size 576, beyond 0.576 / hidden
    size."""
    schedule: Schedule = Schedule.cosine
    """Course of the learning rate after the warm-up."""
    min_learning_rate_share: Share[float] = 0.05
    """Share of the highest learning rate at the last step, except with `train.schedule=constant`."""
    warmup_share: Share[float] = 0.05
    """Share of the steps in which the learning rate climbs linearly."""
    decay_share: Share[float] = 0.2
    """Share of the steps in which `train.schedule=wsd` falls linearly at the end."""
    weight_decay: NotNegative[float] = 0.0
    """Decoupled weight decay of matrices."""
    ema_decay: Annotated[float, rules.SHARE_BELOW_1] | None = None
    """Decay of an exponential moving average of the weights, such as 0.999, which validation and export then
    take; null: no average."""
    betas: Annotated[list[float], rules.TWO_SHARES] = field(default_factory=lambda: [0.9, 0.95])
    """Decay rates of AdamW's two moments."""
    aux_noise: NotNegative[float] = 0.0
    """Bound of uniform noise that is added to the captured states in training, such as 0.1; 0: none."""
    max_grad_norm: Positive[float] = 1.0
    """Larger gradients are scaled down to this norm."""
    autocast: Annotated[DType, rules.NOT_FLOAT16] | None = DType.bfloat16
    """Format of matrix products; weights stay fp32; null: fp32. float16 would need scaled gradients."""
    fused: bool = True
    """On a GPU with `autocast=bfloat16`: the fused TTT step instead of autograd over the reference."""
    precision: Precision = Precision.bf16
    """Format of the large matrix products of the fused step."""
    recompute_mlp: bool = False
    """The fused step computes the feed-forward block again in the backward: 2/3 memory, 1/10 more time."""
    offload_supervision: bool = False
    """With `accumulation` on a GPU: supervision waits in pinned host memory, GPU memory does not grow."""
    sharding: Sharding = Sharding.none
    """Training state that each of several trainers holds."""
    device: Annotated[str, rules.DEVICE] = "auto"
    """Device of a trainer; values as for `target.device`."""
    validate_every: NotNegative[int] = 100
    """Optimiser steps between validations; 0: only at the end."""
    validation_batches: NotNegative[int] = 16
    """Micro-batches of a validation, whose answers also give the accept length of decoding."""
    patience: Positive[int] | None = None
    """Validations in a row without a higher accept length after which training ends; null: no early end."""
    checkpoint_every: Positive[int] = 200
    """Optimiser steps between checkpoints; a validation that is the best so far writes one as well."""
    keep_checkpoints: Positive[int] = 2
    """Newest checkpoints that are kept, beside the best one."""
    log_every: Positive[int] = 10
    """Optimiser steps between lines of `metrics.jsonl`."""
    resume: Resume = Resume.never
    """`auto` continues from the newest checkpoint of the run directory if there is one."""


@dataclass(kw_only=True, slots=True)
class ServingConfig:
    """The export of a draft."""

    checkpoint: FilePath | None = None
    """`best`, `latest`, a step as 2000, or a checkpoint directory; null: the best by the accept length of
    validations, or the newest if there was none."""
    dtype: DType = DType.bfloat16
    """Format of the exported weights."""
    dir: FilePath = "${run.dir}/export"
    """Directory that the draft is written to."""
    forms: Annotated[list[ExportForm], rules.FORMS] = field(default_factory=lambda: [ExportForm.plain])
    """The first form is written to `serving.dir`, a second one beside it, to `serving.dir`-FORM."""
    draft_tokens: Positive[int] = 3
    """Guesses of a round that the form of speculators names, for `vllm serve` with the draft alone."""
    engines: list[Engine] = field(default_factory=list)
    """Engines that will serve the draft: a form that one of them ignores is refused, before training already.
    Empty: exports warn of all engines."""


@dataclass(kw_only=True, slots=True)
class EvaluateConfig:
    """Held-out prompts, answered and guessed by a draft."""

    draft: FilePath = "${serving.dir}"
    """Directory of an exported draft."""
    prompts: FilePath = "${run.cache_dir}/chitchat/heldout.jsonl"
    """Chats in any form that `data.train_path` takes. The last user turn of each is answered, or the first of
    several without answers between them; assistant turns after it are ignored."""
    num_prompts: Positive[int] = 16
    """Prompts that the target answers, in batches; what decoding accepts follows from the answers."""
    num_decoded: Positive[int] = 4
    """The first prompts, also decoded for real, one by one: for times, and to check texts and counts."""
    batch_size: Positive[int] = 64
    """Prompts that the target answers at a time."""
    max_new_tokens: Positive[int] = 64
    """Tokens of an answer."""
    num_draft_tokens: Positive[int] = 3
    """Guesses k of each round; the result has the accept length of shorter rounds as well."""
    tree_nodes: Positive[int] | None = None
    """Guesses of EAGLE-2's dynamic trees, which are counted beside chains of the same depth, such as 60; null: no
    trees. SGLang's `speculative-num-draft-tokens` is one more, for the root."""
    tree_depth: Positive[int] = 5
    """Guesses of a tree's longest path; SGLang's `speculative-num-steps`."""
    tree_branching: Positive[int] = 8
    """Children of a node, and nodes of each depth that have children; SGLang's `speculative-eagle-topk`."""
    batch_sizes: Annotated[list[int], rules.ASCENDING_SIZES] = field(default_factory=list)
    """Sequences of a batch for which the speed-up of every draft length is estimated from measured times of target
    and draft, as [1, 8, 32]; empty: none."""
    temperature: NotNegative[float] = 0.0
    """Temperature of the target's texts; 0: the most likely tokens. Texts that are drawn are not decoded for
    real, where other tokens would be drawn."""
    guesses: Guesses = Guesses.likeliest
    """How the draft guesses at a temperature above 0."""
    dtype: DType = DType.float32
    """Format of target and draft while they decode."""
    near_tie: NotNegative[float] = 1e-4
    """Real decoding may differ where the two best logits of target or draft are closer than this; half formats
    round them to far coarser steps."""


@dataclass(kw_only=True, slots=True)
class CompareConfig:
    """Drafts of one target, compared by `job=compare` with the prompts and settings of `evaluate`."""

    drafts: list[str] = field(default_factory=list)
    """Directories of exported drafts; the others are compared with the first."""
    output: FilePath = "${run.dir}/comparison.json"
    """JSON file to write."""


@dataclass(kw_only=True, slots=True)
class ServeCheckConfig:
    """Serving engines beside the draft `evaluate.draft`, with the prompts and settings of `evaluate`."""

    vllm_python: FilePath | None = None
    """Python of an environment with vLLM; null: this one, if vLLM is installed in it."""
    sglang_python: FilePath | None = None
    """Python of an environment with SGLang; null: this one, if SGLang is installed in it."""
    control: bool = True
    """Each engine also decodes with captured layers that are off by one, which must show in the counts."""
    timeout: Positive[float] = 1800.0
    """Seconds for an engine to start and decode all prompts."""


@dataclass(kw_only=True, slots=True)
class RegenerateConfig:
    """Answers of the target to prompts, which a draft then learns from."""

    prompts: FilePath = "${run.cache_dir}/chitchat/train.jsonl"
    """Chats in any form that `data.train_path` takes; the target answers their user turns."""
    output: FilePath = "${run.dir}/answers.jsonl"
    """JSONL file that answers are appended to; a chat that is already in it is not asked again."""
    num_prompts: Positive[int] | None = None
    """Prompts to answer; null: all."""
    backend: AnswerBackend = AnswerBackend.engine
    """What answers: a model in this process, endpoints, or the targets of a service."""
    endpoints: Annotated[list[str], rules.URLS] = field(default_factory=list)
    """Base URLs of OpenAI-compatible servers, as http://127.0.0.1:8000/v1, for `regenerate.backend=openai`."""
    api_key_file: FilePath | None = None
    """File with the key that the endpoints ask for; null: no key."""
    concurrency: Positive[int] = 64
    """Requests under way at a time at each endpoint, or prompts at each target of a service."""
    answer_timeout: Positive[float] = 1800.0
    """Seconds for one answer of an endpoint or a target, its wait there included; then it is asked again."""
    batch_size: Positive[int] = 128
    """Answers that the engine decodes at a time; a finished one makes room for the next prompt."""
    max_new_tokens: Positive[int] = 2048
    """Tokens of one answer, the end of turn included."""
    max_prompt_tokens: Positive[int] = 2048
    """Longer prompts are skipped and counted."""
    answers_per_prompt: Positive[int] = 1
    """Answers to each prompt; more than one needs a temperature above 0."""
    temperature: NotNegative[float] = 0.0
    """Sampling temperature; 0: greedy."""
    top_p: Annotated[float, rules.DECAY] = 1.0
    """Smallest set of tokens of at least this probability that sampling chooses from; 1: all tokens."""
    top_k: NotNegative[int] = 0
    """Number of most probable tokens that sampling chooses from; 0: all tokens."""
    stop: list[str] = field(default_factory=list)
    """Texts that end an answer, beside the target's own end of turn."""
    dtype: DType = DType.bfloat16
    """Format of the target while it answers."""


@dataclass(kw_only=True, slots=True)
class PromptsConfig:
    """Prompts that the target writes itself, for `data.prompt_source=self`."""

    num_train: Positive[int] = 2000
    """Prompts to train on that are kept after filtering."""
    num_heldout: Positive[int] = 200
    """Prompts for evaluation, none of which is among those to train on."""
    system: str = ""
    """System prompt before the user's turn; empty: none beside the template's own."""
    temperature: Positive[float] = 1.0
    """Sampling temperature."""
    top_p: Annotated[float, rules.DECAY] = 0.99
    """Smallest set of tokens of at least this probability that sampling chooses from."""
    max_tokens: Positive[int] = 256
    """Longest prompt; longer ones are left out."""
    min_chars: Positive[int] = 12
    """Shorter prompts are left out."""
    scripts: list[str] = field(default_factory=list)
    """Scripts by their Unicode names, as LATIN, that a prompt's letters must have; empty: any."""
    max_attempts_per_prompt: Positive[int] = 10
    """The job ends with an error once it needs more attempts than this for each prompt that it keeps."""


@dataclass(kw_only=True, slots=True)
class InspectConfig:
    """The report of `job=inspect`."""

    output: FilePath = "${run.dir}/inspection.html"
    """HTML page to write."""
    num_samples: Positive[int] = 8
    """Samples that are shown with their supervised tokens."""


@dataclass(kw_only=True, slots=True)
class ReportConfig:
    """What people see of a run beside the terminal."""

    output: FilePath = "${run.dir}/report.html"
    """HTML page that train, evaluate, compare and report write; it holds whatever the run directory has."""
    trackers: list[TrackerName] = field(default_factory=lambda: [TrackerName.tensorboard])
    """Trackers that the figures of training go to; all but tensorboard need their extra, as
    `pip install 'eagle-rpc[wandb]'`."""
    prometheus_port: Annotated[int, rules.PORT] | None = None
    """Port of the first worker's Prometheus metrics, on 127.0.0.1 only; the next workers of the job, targets,
    then trainers, have the next ports. A second job on the host needs a port of its own. With
    `topology.single` only the trainer's figures are there. Needs `pip install 'eagle-rpc[prometheus]'`; null:
    none."""
    spans: bool = False
    """Whether trainers write OpenTelemetry spans of each request, from the wait for a target to the decoding,
    to `run.dir/spans-TRAINER.jsonl`. Needs `pip install 'eagle-rpc[opentelemetry]'`."""


@dataclass(kw_only=True, slots=True)
class Config:
    """All settings of a job."""

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
    compare: CompareConfig = field(default_factory=CompareConfig)
    serve_check: ServeCheckConfig = field(default_factory=ServeCheckConfig)
    regenerate: RegenerateConfig = field(default_factory=RegenerateConfig)
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    inspect: InspectConfig = field(default_factory=InspectConfig)
    report: ReportConfig = field(default_factory=ReportConfig)

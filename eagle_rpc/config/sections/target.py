"""Settings of the target, and of the supervision that it sends."""

from dataclasses import dataclass, field
from typing import Annotated, Any

from omegaconf import MISSING

from eagle_rpc.config import rules
from eagle_rpc.config.choices import (
    CompileMode,
    DType,
    Encoding,
    Quantization,
    Rows,
    TargetEngine,
)
from eagle_rpc.config.rules import FilePath, Positive


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


EVERY_RUN = "*"


@dataclass(kw_only=True, slots=True)
class QuotaConfig:
    """What one run may use of each target at a time; null: as much as the others leave."""

    run: Annotated[str, rules.NAME] = EVERY_RUN
    """`run.name` of the run; `*`: each run that no other quota names."""
    requests: Positive[int] | None = None
    """Requests that may wait or run, over all sessions of the run; of prompts so many more."""
    sessions: Positive[int] | None = None
    """Open sessions: one for each trainer, and for each regeneration."""
    reply_share: Annotated[float, rules.SHARE_ABOVE_0] | None = None
    """Share of `target.max_reply_bytes` that promised and unsent replies may take."""


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
    quotas: Annotated[list[QuotaConfig], rules.EACH_RUN_ONCE] = field(default_factory=list)
    """Bounds of single runs, as `[{run: mine, requests: 8}, {run: "*", sessions: 16, reply_share: 0.25}]`. What
    exceeds them is delayed as by a full target."""
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

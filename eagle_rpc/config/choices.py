"""Settings with few possible values, written by name on the command line: `supervision.encoding=hidden`."""

from enum import Enum


class JobName(Enum):
    """The work of a process; `eagle_rpc/jobs/` has one file for each."""

    regenerate = "regenerate"
    """Asks the target the user turns of a prompt file and appends its answers to a chat file."""
    inspect = "inspect"
    """Shows what training would see: samples with supervised tokens, lengths, coverage, skipped records."""
    train = "train"
    """Trains a draft: targets and trainers under one torchrun, or trainers of a running service."""
    export = "export"
    """Writes a checkpoint as a directory that vLLM and SGLang load."""
    evaluate = "evaluate"
    """Counts what decoding of held-out prompts with an exported draft accepts; decodes some for real."""
    compare = "compare"
    """Counts what decoding of the same prompts accepts with each of several drafts."""
    report = "report"
    """Makes `report.html` anew from the files of a run directory."""
    serve_check = "serve_check"
    """Lets vLLM and SGLang decode with an exported draft and compares drafts, accepted guesses and texts."""
    verify = "verify"
    """Runs the same steps co-located and remote and compares every bit."""
    plan = "plan"
    """Prints the workers, bytes and memory of a configuration without starting anything."""
    registry = "registry"
    """Runs the directory where targets and trainers of a service find each other."""
    serve = "serve"
    """Serves a target to the trainers of other jobs."""
    drain = "drain"
    """Takes targets, or all targets of a host, out of a running service without losing a batch."""
    status = "status"
    """Shows a running service: targets, trainers, queues, tokens a second."""


class LogFormat(Enum):
    """The form of the log, in the terminal and in files."""

    text = "text"
    """Lines for people."""
    json = "json"
    """One JSON object a line, for programs that collect logs."""


class MembershipKind(Enum):
    """The way in which RPC workers find each other."""

    static = "static"
    """All workers belong to one torchrun job, start together and end together."""
    elastic = "elastic"
    """Targets and trainers are jobs of their own and meet in a registry; they may come and go."""


class Encoding(Enum):
    """The form in which supervision travels. The exact ones decode to the same batch."""

    probs = "probs"
    """fp32 probabilities over the draft vocabulary."""
    logits = "logits"
    """The target's logits of the draft vocabulary."""
    hidden = "hidden"
    """The target's last hidden state; the trainer applies the head's rows of the draft vocabulary."""
    hidden_fp8 = "hidden_fp8"
    """As `hidden`, but hidden states are rounded to float8, a scale a token and layer: half of the bytes, not exact."""


class Rows(Enum):
    """The rows that carry a target distribution."""

    position_mask = "position_mask"
    """Supervised rows whose most probable token is in the draft vocabulary."""
    loss_mask = "loss_mask"
    """All supervised rows."""


class Precision(Enum):
    """The format of the large matrix products of the draft's training."""

    bf16 = "bf16"
    """That of `train.autocast`."""
    fp8 = "fp8"
    """float8 with one scale a tensor; weights, their gradients and all other work as before. Needs a GPU of compute
    capability 8.9 or later."""


class DraftRope(Enum):
    """The rotary embedding of the draft."""

    target = "target"
    """The target's frequencies and attention factor, which it needs at long positions."""
    plain = "plain"
    """The target's base without scaling, for engines that build no other draft."""


class DraftLoss(Enum):
    """The loss of a row; `eagle_rpc/draft/losses.py` has the formulas."""

    soft_cross_entropy = "soft_cross_entropy"
    kl = "kl"
    lk_alpha = "lk_alpha"
    lk_lambda = "lk_lambda"
    reverse_kl = "reverse_kl"
    total_variation = "total_variation"
    jensen_shannon = "jensen_shannon"


class StepWeighting(Enum):
    """The weights of the steps of training-time test in the loss."""

    decay = "decay"
    """Powers of `draft.step_decay`."""
    listed = "listed"
    """`draft.step_weights`."""
    learned = "learned"
    """Step k as often as the draft's own steps before it are all right, a running mean that begins with powers of
    `draft.step_decay`."""


class InitVocab(Enum):
    """The draft vocabulary of a training that starts from `draft.init_from`."""

    stored = "stored"
    """The draft's own."""
    data = "data"
    """That of this run's data; the head's rows of tokens in both are taken over."""


class Engine(Enum):
    """Engines that serve drafts; `docs/drafts.md` says what each makes of a draft's form."""

    vllm = "vllm"
    sglang = "sglang"
    tensorrt_llm = "tensorrt_llm"
    llama_cpp = "llama_cpp"


class ExportForm(Enum):
    """The form of an exported draft."""

    plain = "plain"
    """The keys and names that all engines read."""
    speculators = "speculators"
    """Those of the speculators library, which vLLM and mlx-vlm read; it also names the target."""


class TargetEngine(Enum):
    """What runs the forward passes of a target."""

    transformers = "transformers"
    """The model of transformers, in this process; its supervision has the same bits everywhere."""
    vllm = "vllm"
    """vLLM with its own kernels and parallelism (section `target.vllm`); equal to rounding."""


class DType(Enum):
    """Floating-point formats by their torch names."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"

    @property
    def num_bytes(self) -> int:
        """Bytes of one value."""
        return 4 if self is DType.float32 else 2


class Quantization(Enum):
    """Quantisation of the target's weights while transformers loads them."""

    fp8 = "fp8"
    """torchao: weights and activations, one scale a row; needs a GPU of compute capability 8.9 or later."""
    int8 = "int8"
    """bitsandbytes: weights and activations."""
    int8_weights = "int8_weights"
    """torchao: weights only."""
    nf4 = "nf4"
    """bitsandbytes: weights only."""


class CompileMode(Enum):
    """Modes of `torch.compile` that work with several shapes and captured outputs."""

    default = "default"
    max_autotune = "max-autotune-no-cudagraphs"
    """Tries kernels for matrix products; takes minutes."""


class PromptSource(Enum):
    """The origin of the files `regenerate.prompts` and `evaluate.prompts`."""

    files = "files"
    """The files exist."""
    chitchat = "chitchat"
    """Absent files are written from the installed package chitchat-dataset."""
    self = "self"
    """The target writes absent files itself, from its template's user header on (section `prompts`)."""


class Guesses(Enum):
    """The choice of a draft's guesses where the target's texts are drawn at a temperature."""

    likeliest = "likeliest"
    """The most likely token, accepted where the target draws it; vLLM proposes so."""
    drawn = "drawn"
    """Drawn at the target's temperature, accepted by the rule of speculative sampling."""


class AnswerBackend(Enum):
    """What answers the prompts of `job=regenerate`."""

    engine = "engine"
    """The target, loaded into this process."""
    openai = "openai"
    """OpenAI-compatible servers (`regenerate.endpoints`)."""
    service = "service"
    """The targets of a running service, all replicas."""


class TrackerName(Enum):
    """Trackers that the figures of a training go to, beside `metrics.jsonl`."""

    tensorboard = "tensorboard"
    """Files in `run.dir/tensorboard`."""
    wandb = "wandb"
    """Weights & Biases; `WANDB_MODE=offline` sends nothing."""
    mlflow = "mlflow"
    """MLflow, at `MLFLOW_TRACKING_URI`."""
    trackio = "trackio"
    """Trackio, in a local database unless its variables name a Space."""


class VerifySide(Enum):
    """The side of `job=verify` that a process computes."""

    both = "both"
    """Starts the other two and compares them: the choice for people."""
    colocated = "colocated"
    remote = "remote"


class Overlong(Enum):
    """The treatment of a chat with more than `data.max_length` tokens."""

    truncate = "truncate"
    drop = "drop"


class OnError(Enum):
    """The treatment of a broken record in a data file."""

    fail = "fail"
    skip = "skip"


class Optimiser(Enum):
    """The optimiser of the draft; `eagle_rpc/train/optimiser.py` says which parameters get which."""

    adamw = "adamw"
    muon = "muon"
    """Muon for the matrices of layer and `fc`, AdamW for head and norms, at one learning rate."""


class Schedule(Enum):
    """The learning rate after the warm-up."""

    cosine = "cosine"
    linear = "linear"
    constant = "constant"
    wsd = "wsd"
    """Warm-up, stable, decay: constant, then linear over the last `train.decay_share` of the steps."""


class Sharding(Enum):
    """The training state that each of several trainers holds."""

    none = "none"
    """All of it."""
    state = "state"
    """A share of master weights, optimiser state and reduced gradients (FSDP2)."""


class Resume(Enum):
    """Whether a run continues from the newest checkpoint of its directory."""

    never = "never"
    auto = "auto"

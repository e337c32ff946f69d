"""What a field that is one of a few can be. Members are written by name on the command line (`supervision.encoding=hidden`)."""

from enum import Enum


class JobName(Enum):
    """What a process does; one file in `eagle_rpc/jobs/` each."""

    train = "train"
    regenerate = "regenerate"
    export = "export"
    evaluate = "evaluate"
    verify = "verify"
    plan = "plan"
    registry = "registry"
    serve = "serve"
    status = "status"


class Membership(Enum):
    """How RPC workers find each other."""

    static = "static"
    elastic = "elastic"


class Encoding(Enum):
    """How supervision travels; all three decode to the same batch."""

    probs = "probs"
    logits = "logits"
    hidden = "hidden"


class Rows(Enum):
    """Which rows carry a target distribution."""

    position_mask = "position_mask"
    loss_mask = "loss_mask"


class DraftLoss(Enum):
    """What a row costs; `eagle_rpc/draft/losses.py` has the formulas."""

    soft_cross_entropy = "soft_cross_entropy"
    kl = "kl"
    lk_alpha = "lk_alpha"
    lk_lambda = "lk_lambda"


class DType(Enum):
    """Floating point formats by their torch names."""

    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


class Quantization(Enum):
    """How the target's weights are quantised as they are loaded, by transformers."""

    fp8 = "fp8"  # torchao, weights and activations by row; a GPU of compute capability 8.9 or later
    int8 = "int8"  # bitsandbytes, weights and activations
    int8_weights = "int8_weights"  # torchao, weights only
    nf4 = "nf4"  # bitsandbytes, weights only


class CompileMode(Enum):
    """Modes of `torch.compile` that keep several shapes and captured outputs apart; the second tries matrix kernels for minutes."""

    default = "default"
    max_autotune = "max-autotune-no-cudagraphs"


class PromptSource(Enum):
    """Where the prompts of `regenerate.prompts` and `evaluate.prompts` come from when the files are absent."""

    files = "files"
    chitchat = "chitchat"


class VerifySide(Enum):
    """Which part of `job=verify` a process plays; people start `both`, which starts the others."""

    both = "both"
    colocated = "colocated"
    remote = "remote"


class Overlong(Enum):
    """What happens to a chat with more than `data.max_length` tokens."""

    truncate = "truncate"
    drop = "drop"


class OnError(Enum):
    """What happens to a broken record in a data file."""

    fail = "fail"
    skip = "skip"


class Sharding(Enum):
    """What of a draft's training state each of several trainers holds."""

    none = "none"
    state = "state"


class Resume(Enum):
    """Whether a run continues from the newest checkpoint of its directory."""

    never = "never"
    auto = "auto"

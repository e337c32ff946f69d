"""Settings of the draft, its training and its export."""

from dataclasses import dataclass, field
from typing import Annotated

from eagle_rpc.config import rules
from eagle_rpc.config.choices import (
    DraftLoss,
    DraftRope,
    DType,
    Engine,
    ExportForm,
    InitVocab,
    Optimiser,
    Precision,
    Resume,
    Schedule,
    Sharding,
    StepWeighting,
)
from eagle_rpc.config.rules import FilePath, NotNegative, Positive, Share


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

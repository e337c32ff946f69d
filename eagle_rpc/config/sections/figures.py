"""Settings of what is measured and shown."""

from dataclasses import dataclass, field
from typing import Annotated

from eagle_rpc.config import rules
from eagle_rpc.config.choices import (
    DType,
    Guesses,
    TrackerName,
)
from eagle_rpc.config.rules import FilePath, NotNegative, Positive


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
    """Real decoding, here or in an engine, may differ where the two best logits of target or draft are closer than
    this; half formats round them to far coarser steps."""


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

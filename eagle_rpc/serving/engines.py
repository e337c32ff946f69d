"""What each serving engine makes of a draft's form: the one table of what it ignores, refuses or has to be told.

The files named were read. Only vLLM was run: `benchmarks/vllm_forms.py` compares its counts. `docs/drafts.md` shows
the table, as `table_rows` gives it.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from enum import Enum

from eagle_rpc.config.choices import Engine
from eagle_rpc.draft import Eagle3DraftConfig
from eagle_rpc.errors import ConfigError

logger = logging.getLogger(__name__)


class Verdict(Enum):
    """What an engine does with a form."""

    ignores = "ignores"
    """It serves another draft and says nothing."""
    refuses = "does not load"
    asks = "has to be told of"
    """It serves the draft if it is started with an option."""
    needs = "reads in newer versions only"
    """Versions before the one named ignore it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class ServedForm:
    """A draft, and what engines know of its target."""

    config: Eagle3DraftConfig
    aux_layer_ids: Sequence[int]  # counted after the layer
    num_target_layers: int
    target: str  # model type or class of the target
    own_embedding: bool = False  # whether it was trained


def _has_other_layers(form: ServedForm) -> bool:
    layers = form.num_target_layers
    return list(form.aux_layer_ids) != [1, layers // 2 - 1, layers - 4]


def _has_ambiguous_layers(form: ServedForm) -> bool:
    target = form.target.lower().replace("_", "")
    return target.startswith(("deepseekv", "kimi", "glm4moelite")) and form.aux_layer_ids[0] != 1


_RESIDUAL, _WINDOW = "draft.norm_before_residual", "draft.sliding_window"
_FC_NORM, _NORM_OUTPUT, _NORM_BEFORE_FC = "draft.fc_norm", "draft.norm_output", "draft.norm_before_fc"
_BOTH_NORMS, _SEVERAL_LAYERS = "draft.norm_before_fc beside draft.fc_norm", "draft.num_layers above 1"
_ONE_CAPTURED, _NOT_THREE = (
    "one layer in target.aux_layer_ids",
    "other than three layers in target.aux_layer_ids",
)
_EMBEDDINGS, _OF_TARGET = "draft.train_embeddings", "it takes the target's embedding"
_OTHER_LAYERS = "target.aux_layer_ids other than the default"
_AMBIGUOUS = "target.aux_layer_ids of DeepSeek, Kimi or GLM-4 MoE lite that do not begin with 1"

FORMS: dict[str, Callable[[ServedForm], bool]] = {
    _RESIDUAL: lambda form: form.config.norm_before_residual,
    _WINDOW: lambda form: form.config.sliding_window is not None,
    _FC_NORM: lambda form: form.config.fc_norm,
    _NORM_OUTPUT: lambda form: form.config.norm_output,
    _NORM_BEFORE_FC: lambda form: form.config.norm_before_fc,
    _BOTH_NORMS: lambda form: form.config.norm_before_fc and form.config.fc_norm,
    _SEVERAL_LAYERS: lambda form: form.config.num_layers > 1,
    _ONE_CAPTURED: lambda form: form.config.num_aux_layers == 1,
    _NOT_THREE: lambda form: form.config.num_aux_layers != 3,
    _EMBEDDINGS: lambda form: form.own_embedding,
    _OTHER_LAYERS: _has_other_layers,
    _AMBIGUOUS: _has_ambiguous_layers,
}
"""Whether a draft has a form of which some engine is particular."""


@dataclass(frozen=True, slots=True)
class Rule:
    """What an engine makes of one of `FORMS`."""

    form: str
    verdict: Verdict
    detail: str


@dataclass(frozen=True, slots=True)
class EngineFacts:
    """What was read of an engine."""

    name: str
    version: str
    file: str
    rules: tuple[Rule, ...]


_RAW_RESIDUAL = "the residual is the state before the norm"
_WHOLE_CONTEXT = "it attends to the whole context"
_UNPROJECTED = "states as wide as the draft count as projected"
_NO_NORM = "no norm before the projection"

ENGINES = {
    Engine.vllm: EngineFacts(
        "vLLM",
        "0.33.0",
        "vllm/model_executor/models/llama_eagle3.py",
        (
            Rule(_FC_NORM, Verdict.needs, "from pull request 42764, May 2026"),
            Rule(_NORM_OUTPUT, Verdict.needs, "from pull request 42764, May 2026"),
        ),
    ),
    Engine.sglang: EngineFacts(
        "SGLang",
        "0.5.23",
        "python/sglang/srt/models/llama_eagle3.py",
        (
            Rule(_RESIDUAL, Verdict.ignores, _RAW_RESIDUAL),
            Rule(_EMBEDDINGS, Verdict.ignores, _OF_TARGET),
            Rule(_ONE_CAPTURED, Verdict.ignores, _UNPROJECTED),
            Rule(_AMBIGUOUS, Verdict.ignores, "it counts them before the layer"),
            Rule(_WINDOW, Verdict.asks, "--speculative-draft-window-size, less the query's own token"),
            Rule(_FC_NORM, Verdict.needs, "seen in 0.5.23"),
            Rule(_NORM_OUTPUT, Verdict.needs, "seen in 0.5.23"),
            Rule(_NORM_BEFORE_FC, Verdict.needs, "from pull request 32334, July 2026"),
            Rule(_SEVERAL_LAYERS, Verdict.needs, "seen in 0.5.23"),
        ),
    ),
    Engine.tensorrt_llm: EngineFacts(
        "TensorRT-LLM",
        "00679c6",
        "tensorrt_llm/_torch/models/modeling_speculative.py",
        (
            Rule(_RESIDUAL, Verdict.ignores, _RAW_RESIDUAL),
            Rule(_EMBEDDINGS, Verdict.ignores, _OF_TARGET),
            Rule(_WINDOW, Verdict.ignores, _WHOLE_CONTEXT),
            Rule(_BOTH_NORMS, Verdict.ignores, "it applies the norms of draft.fc_norm alone"),
            Rule(_ONE_CAPTURED, Verdict.ignores, _UNPROJECTED),
            Rule(_OTHER_LAYERS, Verdict.asks, "eagle3_layers_to_capture, in our counting"),
            Rule(_FC_NORM, Verdict.needs, "from pull request 14988, June 2026"),
            Rule(_NORM_OUTPUT, Verdict.needs, "from pull request 14988, June 2026"),
        ),
    ),
    Engine.llama_cpp: EngineFacts(
        "llama.cpp",
        "0274f0f",
        "src/models/eagle3.cpp",
        (
            Rule(_NORM_OUTPUT, Verdict.ignores, "each guess reads the output before the norm"),
            Rule(_WINDOW, Verdict.ignores, _WHOLE_CONTEXT),
            Rule(_FC_NORM, Verdict.refuses, _NO_NORM),
            Rule(_NORM_BEFORE_FC, Verdict.refuses, _NO_NORM),
            Rule(_SEVERAL_LAYERS, Verdict.refuses, "it takes one"),
            Rule(_NOT_THREE, Verdict.refuses, "it takes three"),
        ),
    ),
}
"""What was read of each engine."""


def check_form(form: ServedForm, engines: Sequence[Engine]) -> None:
    """Raises `ConfigError` for a form that one of the `engines` ignores or does not load."""
    bad = (Verdict.ignores, Verdict.refuses)
    if mistakes := [text for verdict, text in _findings(form, engines) if verdict in bad]:
        advice = "change the draft's form, or take the engine out of serving.engines"
        raise ConfigError(
            f"serving.engines must read the draft as it is trained, but {'; '.join(mistakes)}: {advice}"
        )


def warn_of_engines(form: ServedForm, engines: Sequence[Engine]) -> None:
    """Logs all that the `engines` ignore, refuse or have to be told; none named: all engines."""
    for _, text in _findings(form, engines or list(ENGINES)):
        logger.warning("%s", text)


def table_rows() -> Iterator[tuple[str, str, str, str]]:
    """The table for people: engine, what it does, the form, and why or from when on."""
    for facts in ENGINES.values():
        for rule in facts.rules:
            yield facts.name, rule.verdict.value, rule.form, rule.detail


def _findings(form: ServedForm, engines: Iterable[Engine]) -> Iterator[tuple[Verdict, str]]:
    for facts in (ENGINES[engine] for engine in engines):
        for rule in facts.rules:
            if FORMS[rule.form](form):
                what = f"{facts.name} {rule.verdict.value} {rule.form}"
                yield rule.verdict, f"{what} ({rule.detail}; read in {facts.version})"

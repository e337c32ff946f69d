"""The jobs of the README on one tiny model, in this process: what each of them says."""

import tempfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from support.families import runs_alone, tiny_model
from support.tiny_tokenizer import save_with_tokenizer
from transformers import PreTrainedModel

from eagle_rpc import library
from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.answers.own import own_answerer
from eagle_rpc.config.choices import DType, Encoding
from eagle_rpc.config.schema import (
    DraftConfig,
    EvaluateConfig,
    RunConfig,
    SupervisionConfig,
    TargetConfig,
    TrainConfig,
)
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.evaluate import evaluate_draft
from eagle_rpc.supervision import SessionSettings, TokenBatch, VocabMapping
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

JOBS = ("supervise", "packed", "train", "export", "evaluate", "regenerate")
_DRAFT_VOCAB = 24
_LENGTH = 24


@dataclass
class Outcome:
    """What each job said: "yes", or why not."""

    family: str
    architecture: str
    said: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether all jobs run; packing is a choice."""
        return all(self.said.get(job, "").startswith("yes") for job in JOBS if job != "packed")


def save_tiny_family(family: str, directory: Path) -> str:
    """Writes a tiny model with a tokenizer; returns its class."""
    model = tiny_model(family)
    save_with_tokenizer(model, directory)
    return type(model).__name__


def try_family(family: str, *, dtype: DType = DType.float32) -> Outcome:
    """Runs every job on the family. Only the project's own errors are caught: any other one is a fault.

    Where an error names a setting that helps, it is followed, and the outcome says so.
    """
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "model"
        outcome = Outcome(family, save_tiny_family(family, directory))
        settings = _Settings(Path(root), TargetConfig(**_TARGET, model=str(directory), dtype=dtype))
        for _ in range(len(_ADVICE) + 1):
            outcome.said.clear()
            _run_jobs(settings, outcome.said)
            if outcome.whole or not settings.follow(outcome.said):
                break
        if outcome.whole and settings.followed:
            outcome.said["train"] = f"yes, with {' '.join(settings.followed)}"
        return outcome


def try_all(families: Iterable[str]) -> Iterator[Outcome]:
    """The outcomes of all families of which a tiny model can be built and runs in transformers itself."""
    for family in families:
        if runs_alone(family):
            yield try_family(family)


# What an error advises: words of the message, and the setting.
_ADVICE = {
    "supervision.encoding=logits": "supervision.encoding=logits",
    "draft.intermediate_size must be given": "draft.intermediate_size",
    "draft.num_attention_heads must be given": "draft.num_attention_heads",
}
_TARGET: dict[str, Any] = {"device": "cpu", "aux_layer_ids": [0, 1, 2], "max_length": 64}


@dataclass
class _Settings:
    root: Path
    target: TargetConfig
    supervision: SupervisionConfig = field(default_factory=SupervisionConfig)
    draft: DraftConfig = field(default_factory=lambda: DraftConfig(ttt_steps=2))
    followed: list[str] = field(default_factory=list)

    @property
    def run(self) -> RunConfig:
        return RunConfig(name="family", cache_dir=str(self.root / "cache"))

    def follow(self, said: dict[str, str]) -> bool:
        """Takes the advice of an error; whether there was any."""
        for words, setting in _ADVICE.items():
            if setting not in self.followed and any(words in text for text in said.values()):
                self.followed.append(setting)
                if setting == "supervision.encoding=logits":
                    self.supervision = SupervisionConfig(encoding=Encoding.logits)
                elif setting == "draft.intermediate_size":
                    self.draft = replace(self.draft, intermediate_size=64)
                else:
                    self.draft = replace(self.draft, num_attention_heads=4)
                return True
        return False


def _run_jobs(settings: _Settings, said: dict[str, str]) -> None:
    try:
        target = _train(settings, said)
    except EagleRpcError as error:
        said[next(job for job in JOBS if job not in said)] = _sentence(error, settings)
        return
    model = target.model
    for job, run in (("evaluate", _evaluate), ("regenerate", _regenerate)):
        try:
            said[job] = run(model, settings.root)
        except EagleRpcError as error:
            said[job] = _sentence(error, settings)


def _sentence(error: EagleRpcError, settings: _Settings) -> str:
    return str(error).splitlines()[0].replace(f"{settings.root}/", "")


def _train(settings: _Settings, said: dict[str, str]) -> HFEagle3TargetModel:
    target = HFEagle3TargetModel.load(settings.target, "cpu", cache_dir=settings.root / "cache")
    session = SessionSettings(encoding=settings.supervision.encoding.value)
    backend = ColocatedEagle3TargetModel(target, settings.target, session)
    vocab = backend.model_info().vocab_size
    mapping = VocabMapping.from_token_ids(torch.arange(3, 3 + _DRAFT_VOCAB), vocab)
    backend.open_session(mapping)
    list(backend.stream([_batch(vocab)]))
    said["supervise"] = "yes"
    try:
        list(backend.stream([_batch(vocab, packed=True)]))
        said["packed"] = "yes"
    except EagleRpcError as error:
        said["packed"] = str(error).splitlines()[0]
    training = library.DraftTraining(
        backend,
        mapping,
        target=settings.target,
        draft=settings.draft,
        train=TrainConfig(max_steps=1, device="cpu"),
        run=settings.run,
    )
    assert len(list(training.steps([_batch(vocab)]))) == 1
    said["train"] = "yes"
    training.export(settings.root / "draft", dtype=DType.float32)
    said["export"] = "yes"
    return target


def _evaluate(model: PreTrainedModel, root: Path) -> str:
    settings = EvaluateConfig(max_new_tokens=6, num_draft_tokens=3)
    result = evaluate_draft(model, library.load_draft(root / "draft"), [[5, 9, 17, 30, 8]], settings)
    return "yes" if result.identical_texts else "the text differs from the target's own"


def _regenerate(model: PreTrainedModel, root: Path) -> str:
    answerer = own_answerer(model, batch_size=2, max_new_tokens=3, stop_token_ids=[3])
    for key, prompt in (("a", [5, 9, 17, 30, 8]), ("b", [7, 40, 21])):
        answerer.submit(key, prompt)
    assert len(list(answerer.answers())) == 2
    return "yes" if isinstance(answerer, AnswerEngine) else "yes, by generate"


def _batch(vocab_size: int, *, packed: bool = False) -> TokenBatch:
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(5, vocab_size, (2, _LENGTH), generator=draw)
    ones_BT = torch.ones_like(ids_BT)
    segments_BT = (torch.arange(_LENGTH) >= _LENGTH // 3).long().expand_as(ids_BT) if packed else None
    return TokenBatch(input_ids=ids_BT, attention_mask=ones_BT, loss_mask=ones_BT, segment_ids=segments_BT)

"""The jobs of the README on one tiny model, in this process: what each of them says."""

import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
from support.families import NUM_LAYERS, tiny_model
from support.tiny_tokenizer import make_tiny_tokenizer

from eagle_rpc import library
from eagle_rpc.answers.own import own_answerer
from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import DraftConfig, EvaluateConfig, RunConfig, TargetConfig, TrainConfig
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.supervision import TokenBatch, VocabMapping
from eagle_rpc.target.loading import load_model

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


def save_tiny_family(family: str, directory: Path, dtype: torch.dtype = torch.float32) -> str:
    """Writes a tiny model with a tokenizer; returns its class."""
    model = tiny_model(family)
    model.to(dtype).save_pretrained(directory)
    tokenizer = make_tiny_tokenizer()
    tokenizer.save_pretrained(directory)
    return type(model).__name__


def try_family(family: str, *, dtype: DType = DType.float32) -> Outcome:
    """Runs every job on the family. Only the project's own errors are caught: any other one is a fault."""
    with tempfile.TemporaryDirectory() as root:
        directory = Path(root) / "model"
        outcome = Outcome(family, save_tiny_family(family, directory))
        target = TargetConfig(
            model=str(directory),
            dtype=dtype,
            device="cpu",
            aux_layer_ids=[0, NUM_LAYERS // 2 - 1, NUM_LAYERS - 2],
            max_length=64,
        )
        for job, run in (("supervise", _train), ("evaluate", _evaluate), ("regenerate", _regenerate)):
            try:
                run(target, Path(root), outcome.said)
            except EagleRpcError as error:
                outcome.said[_failed(job, outcome.said)] = str(error).splitlines()[0].replace(root + "/", "")
                if "export" not in outcome.said:
                    break
        return outcome


def _failed(job: str, said: dict[str, str]) -> str:
    return job if job != "supervise" else next(name for name in JOBS if name not in said)


def _train(target: TargetConfig, root: Path, said: dict[str, str]) -> None:
    backend = library.load_target(target, run=_run(root))
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
    settings = {"draft": DraftConfig(ttt_steps=2), "train": TrainConfig(max_steps=1, device="cpu")}
    training = library.DraftTraining(backend, mapping, target=target, run=_run(root), **settings)
    list(training.steps([_batch(vocab)]))
    said["train"] = "yes"
    training.export(root / "draft", dtype=DType.float32)
    said["export"] = "yes"


def _evaluate(target: TargetConfig, root: Path, said: dict[str, str]) -> None:
    draft = library.load_draft(root / "draft")
    settings = EvaluateConfig(max_new_tokens=8, num_draft_tokens=3, dtype=target.dtype)
    prompts = [[5, 9, 17, 30, 8], [7, 40, 21]]
    result = library.evaluate_draft(target, draft, prompts, settings=settings, run=_run(root))
    said["evaluate"] = "yes" if result.identical_texts else "DIFFERENT"


def _regenerate(target: TargetConfig, root: Path, said: dict[str, str]) -> None:
    model, _ = load_model(target, "cpu", cache_dir=root / "cache")
    answerer = own_answerer(model, batch_size=2, max_new_tokens=4, stop_token_ids=[3])
    for key, prompt in (("a", [5, 9, 17, 30, 8]), ("b", [7, 40, 21])):
        answerer.submit(key, prompt)
    assert len(list(answerer.answers())) == 2
    said["regenerate"] = "yes" if type(answerer).__name__ == "AnswerEngine" else "yes, by generate"


def _run(root: Path) -> RunConfig:
    return RunConfig(name="family", cache_dir=str(root / "cache"))


def _batch(vocab_size: int, *, packed: bool = False) -> TokenBatch:
    draw = torch.Generator().manual_seed(1)
    ids_BT = torch.randint(5, vocab_size, (2, _LENGTH), generator=draw)
    ones_BT = torch.ones_like(ids_BT)
    segments_BT = (torch.arange(_LENGTH) >= _LENGTH // 3).long().expand_as(ids_BT) if packed else None
    return TokenBatch(input_ids=ids_BT, attention_mask=ones_BT, loss_mask=ones_BT, segment_ids=segments_BT)

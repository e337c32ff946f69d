"""The package for programs: targets, supervision, training and evaluation of a draft in a few calls.

Arguments are sections of the configuration (`docs/configuration.md`); None: the defaults. Each call checks
them and raises `ConfigError` with all mistakes. Of `run`, `cache_dir` and `seed` count; the seed is that of
random targets and of drafts. A process can call `serve` or `connect` once, since torch joins RPC once.

Legend: H hidden, V target vocab.
"""

import contextlib
import math
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch

from eagle_rpc.client import RemoteEagle3TargetModel
from eagle_rpc.config import Config
from eagle_rpc.config.checks import check
from eagle_rpc.config.choices import (
    DraftLoss,
    DType,
    Encoding,
    ExportForm,
    InitVocab,
    JobName,
    MembershipKind,
    Optimiser,
    Precision,
    Quantization,
    Rows,
    Schedule,
)
from eagle_rpc.config.compose import from_sections
from eagle_rpc.config.schema import (
    DraftConfig,
    EvaluateConfig,
    JobConfig,
    RpcConfig,
    RunConfig,
    ServingConfig,
    SupervisionConfig,
    TargetConfig,
    TrainConfig,
)
from eagle_rpc.errors import ConfigError, TrainingDiverged
from eagle_rpc.evaluate import Evaluation
from eagle_rpc.evaluate import evaluate_draft as decode_prompts
from eagle_rpc.jobs.assembly import client_settings, expectation, make_draft, make_record, stored_draft
from eagle_rpc.jobs.elastic_worker import announced
from eagle_rpc.jobs.export import export_run
from eagle_rpc.jobs.serve import elastic_target
from eagle_rpc.process import stop_signals
from eagle_rpc.service.lifecycle import TargetLifecycle
from eagle_rpc.serving import ExportedDraft, load_export
from eagle_rpc.serving.export import EMBEDDING
from eagle_rpc.supervision import (
    Eagle3TargetBackend,
    Eagle3TargetBatch,
    ModelInfo,
    SessionSettings,
    StoredProbs,
    TargetExpectation,
    TokenBatch,
    VocabMapping,
)
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.engines import load_any_target
from eagle_rpc.target.loading import load_model
from eagle_rpc.target.model_files import load_target_shape
from eagle_rpc.topology import Role, Worker, resolve_device, resolve_devices
from eagle_rpc.train import TrainerGroup
from eagle_rpc.train.figures import figures_of
from eagle_rpc.train.learner import Learner, StepOutcome
from eagle_rpc.train.step_supervision import supervised

# Calls, and their results.
__all__ = ["DraftTraining", "connect", "evaluate_draft", "load_draft", "load_target", "serve"]
__all__ += ["Evaluation", "ExportedDraft", "StepFigures", "TargetServer"]
# Sections of the configuration, and choices of their settings.
__all__ += ["DraftConfig", "EvaluateConfig", "RpcConfig", "RunConfig", "SupervisionConfig", "TargetConfig"]
__all__ += ["DType", "DraftLoss", "Encoding", "Optimiser", "Precision", "Quantization", "Rows", "Schedule"]
__all__ += ["TrainConfig"]
# The contract between target and trainer.
__all__ += ["Eagle3TargetBackend", "Eagle3TargetBatch", "ModelInfo", "TokenBatch", "VocabMapping"]


class TargetServer:
    """A target that serves in threads of this process."""

    def __init__(self, life: TargetLifecycle) -> None:
        self._life = life

    def wait(self) -> None:
        """Waits for SIGTERM or Ctrl-C, in the main thread; a second one ends the process at once.

        Raises `NameTaken` if another process serves under this name, `ConnectionLost` if peers cannot
        connect.
        """
        with stop_signals() as self._life.stop:
            self._life.wait()


@contextlib.contextmanager
def serve(
    target: TargetConfig,
    *,
    rpc: RpcConfig | None = None,
    run: RunConfig | None = None,
    index: int = 0,
    host_registry: bool = True,
    devices_per_target: int = 1,
) -> Iterator[TargetServer]:
    """Serves a target while the body runs, then drains it for `rpc.drain_timeout` seconds at most.

    `index` (0 to 63) tells the replicas of one registry apart. `host_registry`, in place of that of `rpc`:
    whether this process runs the registry at `rpc.registry`, as one process has to. `devices_per_target` as in
    `TopologyConfig`: GPUs over which the layers are spread, from that of `target.device` on.

    Raises `ConfigError` also for a model that cannot be loaded, `UnsupportedTarget` for one without exact
    supervision, `NameTaken` for an index in use, `AccessRefused` for a token file that others may read,
    `WaitTimeout` after `rpc.start_timeout` without a registry.
    """
    config = _config(target=target, rpc=rpc, run=run)
    devices = _devices(config.target.device, devices_per_target)
    name, stop = f"target{index}", threading.Event()
    with elastic_target(config, name, devices, stop, hosts_registry=host_registry) as life, life.hosted():
        yield TargetServer(life)


@contextlib.contextmanager
def connect(
    run: RunConfig,
    *,
    rpc: RpcConfig | None = None,
    supervision: SupervisionConfig | None = None,
    device: str = "auto",
    index: int = 0,
) -> Iterator[RemoteEagle3TargetModel]:
    """All targets of the registry at `rpc.registry`, as one backend, while the body runs.

    Targets divide their time between runs by `run.name`; `index` tells the trainers of one run apart. Batches
    arrive on `device`, with the values of `train.device`.

    Raises `NameTaken` for an index in use, `AccessRefused` for another token than the registry's,
    `TargetMismatch` for targets that differ from each other, `TargetUnavailable` after
    `rpc.reconnect_deadline` without a target, `WaitTimeout` after `rpc.start_timeout` without a registry.
    """
    config = _config(rpc=rpc, run=run, supervision=supervision)
    me = Worker(f"trainer{index}", frozenset([Role.trainer]), index)
    place, stop = _device(device), threading.Event()
    with announced(config, me.name, Role.trainer, place, stop, when_superseded=stop.set) as membership:
        settings, any_target = client_settings(config, me), TargetExpectation()
        backend = RemoteEagle3TargetModel(
            membership, settings=settings, expected=any_target, device=place, stop=stop
        )
        with contextlib.closing(backend):
            membership.report(backend.status)
            yield backend


def load_target(
    target: TargetConfig,
    *,
    supervision: SupervisionConfig | None = None,
    run: RunConfig | None = None,
    devices_per_target: int = 1,
) -> ColocatedEagle3TargetModel:
    """The target in this process, without RPC: a backend with the bits of the remote one.

    `devices_per_target` as in `serve`; batches are on the last of these GPUs.

    Raises `ConfigError` also for a model that cannot be loaded, `UnsupportedTarget` for one without exact
    supervision.
    """
    config = _config(target=target, supervision=supervision, run=run)
    devices, files = _devices(config.target.device, devices_per_target), config.run
    model = load_any_target(config.target, *devices, cache_dir=files.cache_dir, seed=files.seed)
    encoding, rows = config.supervision.encoding.value, config.supervision.rows.value
    return ColocatedEagle3TargetModel(model, config.target, SessionSettings(encoding=encoding, rows=rows))


@dataclass(frozen=True, kw_only=True, slots=True)
class StepFigures:
    """One optimiser step, judged before its update. Lists have an entry for each of `draft.ttt_steps`."""

    step: int  # optimiser steps done, this one included
    loss: float  # mean over rows, weighted over the TTT steps
    accuracy: list[float]  # share of rows where draft and target prefer the same token
    simulated_acceptance_per_position: list[float]  # drafts accepted up to this guess, if each slot began one
    simulated_accept_length: float  # tokens per target call then, the target's own included
    supervised_tokens: int
    grad_norm: float  # before clipping
    learning_rate: float


class DraftTraining:
    """A draft in training on batches of the caller, in one process, without checkpoints.

    Opens a session with `mapping`, which gives the draft vocabulary also with `draft.init_from`, at the backend
    of `connect` or `load_target`. Its batches have to be on `train.device`. Of `train`, settings of the loop
    (epochs, batch size, validation, checkpoints, log) have no effect, except `max_steps`, which also shapes the
    learning rate.

    Raises `ConfigError` also for a draft that cannot work, `CheckpointError` for a `draft.init_from` that does
    not fit, `TargetMismatch` for a backend of another model than `target`, `InvalidRequest` for a mapping of
    another vocabulary.
    """

    def __init__(
        self,
        backend: Eagle3TargetBackend,
        mapping: VocabMapping,
        *,
        target: TargetConfig,
        draft: DraftConfig | None = None,
        train: TrainConfig | None = None,
        run: RunConfig | None = None,
    ) -> None:
        # The caller's mapping decides; rows of a stored head are mapped to it.
        draft = replace(draft or DraftConfig(), vocab_size=len(mapping), init_vocab=InitVocab.data)
        self._config = config = _config(target=target, draft=draft, train=train, run=run)
        shape = load_target_shape(config.target, cache_dir=config.run.cache_dir)
        stored = stored_draft(config, shape)
        expectation(config, shape, None).check(backend.model_info())
        backend.open_session(mapping)
        self._backend = backend
        self._record = make_record(config, shape, backend, mapping)
        device = _device(config.train.device)
        self.draft = make_draft(config, shape, backend, device, stored=stored, mapping=mapping)
        """The module in training, with fp32 weights."""
        steps = config.train.max_steps
        group, seed = TrainerGroup(), config.run.seed
        self._learner = Learner(self.draft, config.train, config.draft, group, steps, seed=seed)

    def steps(self, batches: Iterable[TokenBatch]) -> Iterator[StepFigures]:
        """Takes an optimiser step for each `train.accumulation` batches, until they or `train.max_steps` end.

        Asks the backend ahead, so it may take a few batches more. A second call continues the training.
        Raises the backend's errors, `ConfigError` for a `draft.loss` that the encoding does not allow, and
        `TrainingDiverged` for a loss or gradient norm that is not finite.
        """
        learner, train = self._learner, self._config.train
        with supervised(self._backend, batches) as stream:
            while learner.steps_done < train.max_steps and (first := next(stream, None)) is not None:
                if learner.steps_done == 0 and isinstance(first.targets, StoredProbs):
                    # Only a batch shows its encoding, and some losses need another one.
                    check(replace(self._config, supervision=SupervisionConfig(encoding=Encoding.probs)))
                outcome = learner.learn(chain([first], islice(stream, train.accumulation - 1)))
                yield self._figures(outcome)

    def _figures(self, outcome: StepOutcome) -> StepFigures:
        step, norm = self._learner.steps_done, float(outcome.grad_norm)
        figures: dict[str, Any] = figures_of(outcome.sums.on_host(), self._learner.step_weights)
        if not (math.isfinite(figures["loss"]) and math.isfinite(norm)):
            found = f"{figures['loss']} and {norm}"
            raise TrainingDiverged(f"loss and gradient norm must be finite, got {found} at step {step}")
        return StepFigures(step=step, grad_norm=norm, learning_rate=outcome.learning_rate, **figures)

    def export(
        self,
        directory: str | Path,
        *,
        dtype: DType = DType.bfloat16,
        forms: Sequence[ExportForm] = (ExportForm.plain,),
    ) -> list[Path]:
        """Writes the draft as vLLM and SGLang load it, in place of an earlier export; returns the files.

        A second form goes to `directory`-FORM. Raises `ConfigError` if a directory holds other files.
        """
        weights = self._learner.draft_weights()
        embedding_VH = weights.get(EMBEDDING, self.draft.embed_tokens.weight)
        settings = ServingConfig(dir=str(directory), dtype=dtype, forms=list(forms))
        step = self._learner.steps_done
        return export_run(weights, self._record, embedding_VH, settings, step=step, validation=None)


def load_draft(directory: str | Path) -> ExportedDraft:
    """An exported draft; its `model()` is a torch module. Raises `CheckpointError` for a damaged one."""
    return load_export(Path(directory))


def evaluate_draft(
    target: TargetConfig,
    draft: ExportedDraft,
    prompts: Sequence[Sequence[int]],
    *,
    settings: EvaluateConfig | None = None,
    run: RunConfig | None = None,
) -> Evaluation:
    """What decoding of prompts (token ids) with the draft accepts, target and draft in `settings.dtype`.

    Of `settings`, `draft`, `prompts` and `num_prompts` have no effect. Raises `ConfigError` also without
    prompts or for one beyond the target's context, `TargetMismatch` for a draft of another target.
    """
    config = _config(target=target, evaluate=settings, run=run)
    asked, files = config.evaluate, config.run
    target, place = replace(config.target, dtype=asked.dtype), _device(config.target.device)
    model, tokenizer = load_model(target, place, cache_dir=files.cache_dir, seed=files.seed)
    return decode_prompts(
        model,
        draft,
        prompts,
        asked,
        tokenizer=tokenizer,
    )


def _device(setting: str) -> torch.device:
    return torch.device(resolve_device(setting))


def _devices(setting: str, devices_per_target: int) -> tuple[str, ...]:
    if devices_per_target < 1:
        raise ConfigError(f"devices_per_target must be at least 1, got {devices_per_target}")
    return resolve_devices(setting, devices_per_target)


def _config(*, target: TargetConfig | None = None, rpc: RpcConfig | None = None, **sections: Any) -> Config:
    """The checked configuration. The job has to be given, though no call here reads it."""
    if target is None or target.random:
        target = replace(target or TargetConfig(), model="random")
    rpc = replace(rpc or RpcConfig(), membership=MembershipKind.elastic)
    job = JobConfig(name=JobName.evaluate)
    given = {name: section for name, section in sections.items() if section is not None}
    return from_sections(job=job, target=target, rpc=rpc, **given)

"""Trackers that the figures of a run go to beside `metrics.jsonl`, each through its own library.

A run that goes on from a checkpoint goes on in the trackers as well. Where they send figures is the matter of
their own variables (`WANDB_MODE`, `MLFLOW_TRACKING_URI`, `TRACKIO_DIR`, ...).
"""

import importlib
import importlib.util
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from eagle_rpc.config.choices import TrackerName
from eagle_rpc.errors import ConfigError
from eagle_rpc.process.files import replaced_file

_PROJECT = "eagle_rpc"


@dataclass(frozen=True, kw_only=True, slots=True)
class TrackedRun:
    """What trackers are told of a run."""

    name: str
    directory: Path
    settings: Mapping[str, Any]  # the configuration as JSON has it
    last_step: int = 0  # the step that the run goes on from


class Tracker(Protocol):
    """Takes the figures of one step after the other."""

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        """Figures by name, such as `validation/loss`."""

    def close(self) -> None:
        """Sends what is left."""


def open_trackers(names: Sequence[TrackerName], run: TrackedRun) -> list[Tracker]:
    """A tracker for each name."""
    return [_TRACKERS[name](run) for name in names]


def require_installed(names: Sequence[TrackerName]) -> None:
    """Raises `ConfigError` for the first tracker whose library is not there; loads none."""
    for name in names:
        require_library(f"report.trackers={name.value}", name.value, extra=name.value)


def require_library(setting: str, library: str, *, extra: str) -> None:
    """Raises `ConfigError` if the library that a setting needs, of this extra, is not there; loads none."""
    try:
        found = importlib.util.find_spec(library)
    except ModuleNotFoundError:  # of the package around it
        found = None
    if found is None:
        raise ConfigError(f"{setting} needs its library: pip install 'eagle-rpc[{extra}]'")


class _TensorBoard:
    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second that only a trainer should pay

        self._writer = SummaryWriter(str(run.directory / "tensorboard"), purge_step=run.last_step + 1)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        for name, value in figures.items():
            self._writer.add_scalar(name, value, step)
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    def __init__(self, run: TrackedRun) -> None:
        library = importlib.import_module("wandb")
        self._run = library.init(
            project=_PROJECT,
            name=run.name,
            id=_kept(run, "wandb", lambda: uuid.uuid4().hex[:8]),
            resume="allow",
            dir=str(run.directory),
            config=dict(run.settings),
        )
        # Its own counter takes no step twice, and a run that goes on may repeat some.
        self._run.define_metric("*", step_metric="step")

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log({**figures, "step": step})

    def close(self) -> None:
        self._run.finish()


class _MLflow:
    def __init__(self, run: TrackedRun) -> None:
        library = importlib.import_module("mlflow")
        self._client = library.tracking.MlflowClient()
        experiment = library.set_experiment(_PROJECT).experiment_id
        self._id = _kept(
            run, "mlflow", lambda: self._client.create_run(experiment, run_name=run.name).info.run_id
        )
        self._client.update_run(self._id, status="RUNNING")
        self._entities, self._time = library.entities, library.utils.time.get_current_time_millis
        if not run.last_step:
            for name, value in flat(run.settings).items():
                self._client.log_param(self._id, name, value)

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        now = self._time()
        metrics = [self._entities.Metric(name, value, now, step) for name, value in figures.items()]
        self._client.log_batch(self._id, metrics=metrics)

    def close(self) -> None:
        self._client.set_terminated(self._id)


class _Trackio:
    def __init__(self, run: TrackedRun) -> None:
        self._run = importlib.import_module("trackio").init(
            project=_PROJECT, name=run.name, resume="allow", config=flat(run.settings), embed=False
        )

    def write(self, step: int, figures: Mapping[str, float]) -> None:
        self._run.log(dict(figures), step=step)

    def close(self) -> None:
        self._run.finish()


_TRACKERS: Mapping[TrackerName, Callable[[TrackedRun], Tracker]] = {
    TrackerName.tensorboard: _TensorBoard,
    TrackerName.wandb: _Wandb,
    TrackerName.mlflow: _MLflow,
    TrackerName.trackio: _Trackio,
}


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"train.batch_size": 4, ...}`"""
    found = dict[str, Any]()
    for name, value in settings.items():
        path = f"{prefix}{name}"
        found |= flat(value, f"{path}.") if isinstance(value, Mapping) else {path: value}
    return found


def _kept(run: TrackedRun, tracker: str, make: Callable[[], str]) -> str:
    """The tracker's id of this run, kept in its directory; a new one for a run that begins."""
    path = run.directory / f"{tracker}.id"
    if run.last_step and path.is_file():
        return path.read_text(encoding="utf-8").strip()
    with replaced_file(path) as fresh:
        fresh.write_text(identity := make(), encoding="utf-8")
    return identity

"""The directory of a run: its paths, and the lock that admits one run at a time."""

import contextlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import filelock

from eagle_rpc.config.choices import Resume
from eagle_rpc.config.schema import Config
from eagle_rpc.errors import ConfigError

_LOCK, _HOLDER = ".lock", ".lock.holder"


@dataclass(frozen=True, slots=True)
class RunDirectory:
    """Paths inside `run.dir`. Reading them creates nothing."""

    path: Path

    @classmethod
    def of(cls, config: Config) -> "RunDirectory":
        """The directory that `run.dir` names."""
        return cls(Path(config.run.dir))

    @property
    def config(self) -> Path:
        return self.path / "config.yaml"

    @property
    def metrics(self) -> Path:
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.path / "checkpoints"

    @property
    def target_embedding(self) -> Path:
        """The target's token embedding, which exports need and checkpoints leave out."""
        return self.path / "checkpoints" / "target_embedding.safetensors"

    @property
    def export(self) -> Path:
        return self.path / "export"

    @property
    def loss_plot(self) -> Path:
        return self.path / "plots" / "loss.png"

    @property
    def acceptance_plot(self) -> Path:
        return self.path / "plots" / "acceptance.png"

    @property
    def evaluation(self) -> Path:
        return self.path / "evaluation.json"

    @property
    def training(self) -> Path:
        """The summary of a training, for the report."""
        return self.path / "training.json"

    @property
    def verification(self) -> Path:
        return self.path / "verify.json"

    def log_file(self, worker_name: str) -> Path:
        return self.path / "logs" / f"{worker_name}.log"

    @contextlib.contextmanager
    def claimed(self, resume: Resume) -> Iterator[None]:
        """Locks the directory while the body runs; the lock ends with the process, also if it is killed.

        Raises `ConfigError` at once if another process holds the lock, or if the directory holds a trained
        run and `resume` is `never`.
        """
        self.path.mkdir(parents=True, exist_ok=True)
        lock = filelock.FileLock(self.path / _LOCK)
        try:
            lock.acquire(blocking=False)
        except filelock.Timeout:
            raise ConfigError(
                f"run.dir must not be in use, {self.path} is held by {self._holder()}"
            ) from None
        try:
            self._require_usable(resume)
            holder = f"process {os.getpid()} on {socket.gethostname()}"
            (self.path / _HOLDER).write_text(holder, encoding="utf-8")
            yield
        finally:
            lock.release()

    def _require_usable(self, resume: Resume) -> None:
        if resume is Resume.never and (found := self._trained()):
            raise ConfigError(
                f"run.dir must hold no trained run with train.resume=never, {self.path} holds "
                f"{', '.join(found)}: choose another run.name, or continue with train.resume=auto"
            )

    def _trained(self) -> list[str]:
        """The names of what training or a later job has left here. Logs, settings and answers do not count."""
        steps = self.checkpoints.glob("step_*") if self.checkpoints.is_dir() else ()
        metrics = self.metrics.exists() and self.metrics.stat().st_size > 0
        files = [*sorted(steps)[:1], *([self.metrics] if metrics else ())]
        files += [file for file in (self.export, self.evaluation) if file.exists()]
        return [str(file.relative_to(self.path)) for file in files]

    def _holder(self) -> str:
        try:
            return (self.path / _HOLDER).read_text(encoding="utf-8")
        except OSError:
            return "another process"

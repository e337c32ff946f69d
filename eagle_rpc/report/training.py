"""What one trainer tells of the training: the first writes and shows, the others are silent."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Protocol

from eagle_rpc.report.metrics_log import Figure, MetricsLog
from eagle_rpc.report.progress import TrainingProgress

Figures = Mapping[str, Figure]


class TrainingReport(Protocol):
    """Where the training loop sends its figures."""

    def advance(self, figures: Callable[[], Figures]) -> None:
        """One optimiser step is done; `figures` is called only if they are shown now."""

    def write(self, step: int, figures: Figures) -> None:
        """Keeps figures of the steps up to `step`."""

    def close(self) -> None:
        """Nothing more will come."""


class WrittenReport:
    """Metrics on disk beside a progress bar; goes on after `first_step` steps, later figures are dropped."""

    def __init__(
        self, metrics_path: Path, tensorboard_dir: Path, *, total_steps: int, first_step: int
    ) -> None:
        self._metrics = MetricsLog(metrics_path, tensorboard_dir, last_step=first_step)
        self._progress = TrainingProgress(total_steps, first_step)

    def advance(self, figures: Callable[[], Figures]) -> None:
        self._progress.advance(figures)

    def write(self, step: int, figures: Figures) -> None:
        self._metrics.write(step, figures)

    def close(self) -> None:
        self._progress.close()
        self._metrics.close()


class SilentReport:
    """For all trainers but the first."""

    def advance(self, figures: Callable[[], Figures]) -> None:
        pass

    def write(self, step: int, figures: Figures) -> None:
        pass

    def close(self) -> None:
        pass

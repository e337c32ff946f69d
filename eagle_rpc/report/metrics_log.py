"""The metrics of a run on disk: `metrics.jsonl`, one JSON object a line, and TensorBoard."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eagle_rpc.process.files import replaced_file

Figure = float | int | Sequence[float]
Figures = Mapping[str, Figure]


class MetricsLog:
    """Appends figures to both; first drops the lines of an earlier run after `last_step`.

    The operating system has a line when `write` returns, so a kill of the process loses none.
    """

    def __init__(self, metrics_path: Path, tensorboard_dir: Path, *, last_step: int = 0) -> None:
        from torch.utils.tensorboard import SummaryWriter  # half a second that only a trainer should pay

        truncate_after(metrics_path, last_step)
        metrics_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = metrics_path.open("a", encoding="utf-8")
        self._tensorboard = SummaryWriter(str(tensorboard_dir), purge_step=last_step + 1)

    def write(self, step: int, figures: Figures) -> None:
        """One line `{"step": step, ...}`. A list becomes one TensorBoard curve per element."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        for name, value in figures.items():
            if isinstance(value, Sequence):
                for position, element in enumerate(value):
                    self._tensorboard.add_scalar(f"{name}/{position}", element, step)
            else:
                self._tensorboard.add_scalar(name, value, step)
        self._tensorboard.flush()

    def close(self) -> None:
        self._file.close()
        self._tensorboard.close()


def read_metrics(metrics_path: Path) -> Iterator[dict[str, Any]]:
    """The lines of a metrics file, without an incomplete last line, which a kill may leave."""
    for line in metrics_path.read_text(encoding="utf-8").splitlines(keepends=True):
        if line.endswith("\n"):
            yield json.loads(line)


def truncate_after(metrics_path: Path, step: int) -> None:
    """Drops the lines of later steps and an incomplete last line; does nothing if there is no file."""
    if not metrics_path.exists():
        return
    kept = [json.dumps(line) + "\n" for line in read_metrics(metrics_path) if line["step"] <= step]
    with replaced_file(metrics_path) as fresh:
        fresh.write_text("".join(kept), encoding="utf-8")

"""The metrics of a run: `metrics.jsonl`, one JSON object a line, and trackers."""

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from eagle_rpc.process.files import replaced_file
from eagle_rpc.report.trackers import Tracker

Figure = float | int | Sequence[float]
Figures = Mapping[str, Figure]


class MetricsLog:
    """Appends figures to the file, and hands them to trackers; first drops the lines after `last_step`.

    The operating system has a line when `write` returns, so a kill of the process loses none.
    """

    def __init__(self, metrics_path: Path, trackers: Sequence[Tracker] = (), *, last_step: int = 0) -> None:
        truncate_after(metrics_path, last_step)
        metrics_path.parent.mkdir(parents=True, exist_ok=True)
        self._file = metrics_path.open("a", encoding="utf-8")
        self._trackers = trackers

    def write(self, step: int, figures: Figures) -> None:
        """One line `{"step": step, ...}`. Trackers get one curve per element of a list."""
        self._file.write(json.dumps({"step": step, **figures}) + "\n")
        self._file.flush()
        curves = dict[str, float]()
        for name, value in figures.items():
            if isinstance(value, Sequence):
                curves |= {f"{name}/{position}": element for position, element in enumerate(value)}
            else:
                curves[name] = value
        for tracker in self._trackers:
            tracker.write(step, curves)

    def close(self) -> None:
        self._file.close()
        for tracker in self._trackers:
            tracker.close()


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

"""The two plots of a run, and that of a sweep. matplotlib is imported when one is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eagle_rpc.errors import DataError
from eagle_rpc.report.metrics_log import read_metrics
from eagle_rpc.report.sweep_table import SweptResult

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRAINING, _VALIDATION, _DECODING = "#4c78a8", "#e45756", "#54a24b"
_DPI = 150


def plot_loss(metrics_path: Path, output: Path) -> None:
    """Loss and accept length over optimiser steps. Raises `DataError` without a training line."""
    if not metrics_path.is_file():
        raise DataError(f"{metrics_path} must be the metrics.jsonl of a run, which is absent")
    lines = list(read_metrics(metrics_path))
    if not any("loss" in line for line in lines):
        raise DataError(
            f"{metrics_path} must hold the loss of at least one step, got {len(lines)} lines without one"
        )
    figure = _figure(7.0, 6.0)
    loss_axes, accept_axes = figure.subplots(2, 1, sharex=True)
    both = {"training": ("", _TRAINING), "validation": ("validation/", _VALIDATION)}
    for label, (prefix, color) in both.items():
        _draw_curve(loss_axes, lines, f"{prefix}loss", label, color)
        _draw_curve(accept_axes, lines, f"{prefix}simulated_accept_length", f"{label}, simulated", color)
    _draw_curve(accept_axes, lines, "validation/accept_length", "validation, decoding", _DECODING)
    loss_axes.set_ylabel("loss (nats a token)")
    loss_axes.legend(frameon=False)
    accept_axes.set_ylabel("accept length\n(tokens a target call)")
    accept_axes.legend(frameon=False)
    accept_axes.set_xlabel("optimiser step")
    loss_axes.set_title("Draft training")
    _save(figure, output)


def plot_acceptance(acceptance_per_position: Sequence[float], accept_length: float, output: Path) -> None:
    """Share of drafts whose guesses up to each position were accepted, as bars."""
    figure = _figure(1.6 + 1.0 * max(4, len(acceptance_per_position)), 4.0)
    axes = figure.subplots()
    positions = [str(position + 1) for position in range(len(acceptance_per_position))]
    bars = axes.bar(positions, [100 * share for share in acceptance_per_position], width=0.6, color=_TRAINING)
    axes.bar_label(bars, fmt="%.1f %%", padding=3)
    axes.set_ylim(0, 108)
    axes.set_yticks(range(0, 101, 20))
    axes.set_xlabel("position of the guess")
    axes.set_ylabel("accepted (% of drafts)")
    axes.set_title(f"Accept length {accept_length:.2f} tokens a target call")
    axes.xaxis.grid(False)
    _save(figure, output)


def plot_sweep(results: Sequence[SweptResult], output: Path) -> None:
    """Accept length of each run against supervised tokens and seconds of training: evaluations with their
    intervals, and validations on the way as lines.
    """
    figure = _figure(10.0, 4.5)
    by_tokens, by_seconds = figure.subplots(1, 2, sharey=True)
    for number, one in enumerate(results):
        color = f"C{number % 10}"
        label = ", ".join(f"{name.rpartition('.')[2]} {value}" for name, value in one.values.items())
        if one.validations:
            by_tokens.plot(*zip(*one.validations, strict=True), color=color, linewidth=1.0, alpha=0.5)
        for axes, cost in ((by_tokens, one.supervised_tokens), (by_seconds, one.train_seconds)):
            if cost is None or one.accept_length is None:
                continue
            low, high = one.interval or (one.accept_length, one.accept_length)
            error = [[one.accept_length - low], [high - one.accept_length]]
            axes.errorbar(cost, one.accept_length, error, fmt="o", color=color, capsize=3, label=label)
    by_tokens.set_xlabel("supervised tokens trained")
    by_tokens.set_ylabel("accept length (tokens a target call)")
    by_seconds.set_xlabel("seconds of training")
    if by_seconds.get_legend_handles_labels()[1]:
        figure.legend(
            *by_seconds.get_legend_handles_labels(), loc="outside lower center", frameon=False, ncols=2
        )
    figure.suptitle("Evaluations with 95 % intervals; lines are validations")
    _save(figure, output)


def _draw_curve(axes: Axes, lines: list[dict[str, Any]], key: str, label: str, color: str) -> None:
    points = [(line["step"], line[key]) for line in lines if key in line]
    if points:
        # A single point has no line.
        marker = "o" if key.startswith("validation/") or len(points) == 1 else None
        columns = zip(*points, strict=True)
        axes.plot(*columns, color=color, linewidth=1.4, marker=marker, markersize=4, label=label)


def _figure(width: float, height: float) -> Figure:
    """Size in inches. Not from pyplot: its state is global, and its backend may need a display."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=_DPI, layout="constrained")


def _save(figure: Figure, output: Path) -> None:
    for axes in figure.axes:
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(axis="y", alpha=0.3)
        axes.set_axisbelow(True)
    output.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(output)

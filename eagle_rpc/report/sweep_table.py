"""The table of a sweep, on the terminal, in Markdown and as CSV, and figures over seeds."""

import csv
import io
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console
from rich.table import Table

from eagle_rpc.process.files import replaced_file

_SEED = "run.seed"
# Two-sided 95 % quantiles of Student's t by degrees of freedom from 1 on; of more, the last, which is wider.
_T_95 = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228)

Range = Sequence[float] | None
"""Lower and upper end of a 95 % interval; null without one."""


@dataclass(kw_only=True, slots=True)
class SweptResult:
    """One run of a sweep. What it has not come to is null."""

    values: Mapping[str, str]
    """The swept settings."""
    outcome: str
    """`finished`, or what happened."""
    accept_length: float | None = None
    """Of the evaluation, in tokens a target call."""
    interval: Range = None
    """Over prompts."""
    gain: float | None = None
    """Accept length minus that of the first run with an evaluation."""
    gain_interval: Range = None
    """Over the prompts that both runs read."""
    validations: list[tuple[int, float]] = field(default_factory=list)
    """Supervised tokens trained so far, and the accept length of a validation."""
    supervised_tokens: int | None = None
    """Tokens trained on, repetitions included."""
    train_seconds: float | None = None
    """Of `job=train`, start and validations included."""


@dataclass(frozen=True, kw_only=True, slots=True)
class OverSeeds:
    """Runs that differ in their seed alone."""

    values: Mapping[str, str]
    num_seeds: int
    mean: float
    interval: tuple[float, float] | None
    """95 % of Student's t over seeds; null for one seed."""


def over_seeds(results: Sequence[SweptResult]) -> list[OverSeeds]:
    """Means of accept lengths over `run.seed`; empty if it was not swept."""
    groups: dict[tuple[tuple[str, str], ...], list[float]] = {}
    for one in results:
        if _SEED in one.values and one.accept_length is not None:
            others = tuple((name, value) for name, value in one.values.items() if name != _SEED)
            groups.setdefault(others, []).append(one.accept_length)
    return [
        OverSeeds(values=dict(values), num_seeds=len(of), mean=statistics.fmean(of), interval=_t_interval(of))
        for values, of in groups.items()
    ]


def _t_interval(values: Sequence[float]) -> tuple[float, float] | None:
    if len(values) < 2:
        return None
    quantile = _T_95[min(len(values) - 2, len(_T_95) - 1)]
    half = quantile * statistics.stdev(values) / math.sqrt(len(values))
    mean = statistics.fmean(values)
    return mean - half, mean + half


def write_csv(results: Sequence[SweptResult], path: Path) -> None:
    """A line for each run, in one piece; numbers are whole, intervals have two columns."""
    ranges = ("interval", "gain_interval")
    plain = ("accept_length", "gain", "supervised_tokens", "train_seconds", "outcome")
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    names = list(results[0].values)
    ends = [f"{name}_{end}" for name in ranges for end in ("low", "high")]
    table.writerow([*names, *plain[:-1], *ends, "best_validation", plain[-1]])
    for one in results:
        figures = [getattr(one, name) for name in plain[:-1]]
        bounds = [value for name in ranges for value in (getattr(one, name) or (None, None))]
        table.writerow([*one.values.values(), *figures, *bounds, _best(one), one.outcome])
    _write(path, text.getvalue())


def write_markdown(results: Sequence[SweptResult], path: Path) -> None:
    """The tables of the terminal, in one piece."""
    tables = [_markdown(*_runs(results))]
    if means := over_seeds(results):
        tables.append(_markdown(*_means(means)))
    _write(path, "\n".join(tables))


def print_table(results: Sequence[SweptResult], console: Console) -> None:
    """A line for each run; where seeds were swept, a second table of means."""
    tables = [_runs(results)]
    if means := over_seeds(results):
        tables.append(_means(means))
    for header, rows in tables:
        table = Table(*header, box=None, pad_edge=False, header_style="bold")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    console.print("tokens a target call, with 95 % intervals over prompts; gain over the first run")


def _runs(results: Sequence[SweptResult]) -> tuple[list[str], list[list[str]]]:
    names = list(results[0].values)
    header = [*names, "accept length", "gain", "best validation", "supervised tokens", "seconds", "outcome"]
    rows = [
        [
            *one.values.values(),
            _figure(one.accept_length, one.interval),
            _figure(one.gain, one.gain_interval, sign="+"),
            _figure(_best(one)),
            "" if one.supervised_tokens is None else f"{one.supervised_tokens:,}",
            "" if one.train_seconds is None else f"{one.train_seconds:.0f}",
            one.outcome,
        ]
        for one in results
    ]
    return header, rows


def _means(means: Sequence[OverSeeds]) -> tuple[list[str], list[list[str]]]:
    header = [*means[0].values, "seeds", "mean accept length, 95 % interval over seeds"]
    return header, [
        [*one.values.values(), str(one.num_seeds), _figure(one.mean, one.interval)] for one in means
    ]


def _best(one: SweptResult) -> float | None:
    return max((accept_length for _, accept_length in one.validations), default=None)


def _figure(value: float | None, interval: Range = None, *, sign: str = "") -> str:
    if value is None:
        return ""
    ends = "" if interval is None else f" [{interval[0]:{sign}.3f}, {interval[1]:{sign}.3f}]"
    return f"{value:{sign}.3f}{ends}"


def _markdown(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)


def _write(path: Path, text: str) -> None:
    with replaced_file(path) as fresh:
        fresh.write_text(text, encoding="utf-8")

"""The charts of a report as plotly's figures. The page adds the colours of text and grid by its own theme."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Chart = dict[str, Any]
Trace = dict[str, Any]
Lines = Sequence[Mapping[str, Any]]
Slice = Mapping[str, Any]

# Told apart on white and on black, also by people who see few colours.
_COLOURS = ("#4c8bd0", "#e07b39", "#3fa66b", "#b46bd1", "#c9a227", "#7f8fa3", "#d1556f")


def over_steps(lines: Lines, curves: Mapping[str, str], unit: str) -> Chart:
    """`curves`: key of a metric by its name on the chart."""
    traces = [
        _curve(lines, key, name, _COLOURS[number])
        for number, (name, key) in enumerate(curves.items())
        if any(key in line for line in lines)
    ]
    return _chart(traces, x="optimiser step", y=unit)


def runs_over_steps(runs: Mapping[str, Lines], key: str, unit: str) -> Chart:
    """One metric of several runs."""
    pairs = zip(runs.items(), _cycle(len(runs)), strict=True)
    traces = [_curve(lines, key, name, colour) for (name, lines), colour in pairs]
    return _chart(traces, x="optimiser step", y=unit)


def _curve(lines: Lines, key: str, name: str, colour: str) -> Trace:
    points = [(line["step"], line[key]) for line in lines if key in line]
    few = len(points) < 20
    return {
        "type": "scatter",
        "mode": "lines+markers" if few else "lines",
        "name": name,
        "x": [step for step, _ in points],
        "y": [value for _, value in points],
        "line": {"color": colour, "width": 1.8},
        "hovertemplate": "%{y:.3f}",
    }


def bars(
    groups: Mapping[str, Sequence[tuple[str, float, Sequence[float] | None]]],
    *,
    x: str,
    y: str,
    percent: bool = False,
) -> Chart:
    """Bars side by side: of each group, a label, a value and its interval."""
    scale = 100 if percent else 1
    traces: list[Trace] = []
    for (name, rows), colour in zip(groups.items(), _cycle(len(groups)), strict=True):
        values = [scale * value for _, value, _ in rows]
        above = [scale * (between[1] if between else value) - scale * value for _, value, between in rows]
        below = [scale * value - scale * (between[0] if between else value) for _, value, between in rows]
        trace: Trace = {
            "type": "bar",
            "name": name,
            "x": [label for label, _, _ in rows],
            "y": values,
            "marker": {"color": colour},
            "hovertemplate": "%{y:.1f} %" if percent else "%{y:.3f}",
        }
        if any(above) or any(below):
            bounds = {"array": above, "arrayminus": below, "symmetric": False}
            trace["error_y"] = {"type": "data", "thickness": 1.2, "width": 4, **bounds}
        traces.append(trace)
    chart = _chart(traces, x=x, y=y)
    chart["layout"] |= {"barmode": "group", "bargap": 0.35}
    chart["layout"]["xaxis"]["type"] = "category"
    return chart


def slices(groups: Mapping[str, Mapping[str, Slice]], x: str) -> Chart:
    """Accept length of slices of an evaluation: by run, then by the name of the slice."""
    rows = {
        run: [(name, one["accept_length"], one["accept_length_interval"]) for name, one in of_run.items()]
        for run, of_run in groups.items()
    }
    return bars(rows, x=x, y="accept length")


def positions(evaluations: Mapping[str, Mapping[str, Any]]) -> Chart:
    """Share of the drafts whose guesses up to each position were accepted, by run."""
    groups = {}
    for run, one in evaluations.items():
        shares = one["acceptance_per_position"]
        # Files of earlier versions have no intervals.
        intervals = one.get("acceptance_per_position_intervals") or [None] * len(shares)
        groups[run] = [
            (str(position), share, between)
            for position, (share, between) in enumerate(zip(shares, intervals, strict=True), start=1)
        ]
    return bars(groups, x="position of the guess", y="accepted, % of the drafts", percent=True)


def shares_of_time(workers: Mapping[str, Mapping[str, float]]) -> Chart:
    """Where the seconds of each worker went, stacked to 100 %."""
    kinds = list(dict.fromkeys(kind for times in workers.values() for kind in times))
    colours = dict(zip(kinds, _cycle(len(kinds)), strict=True))
    traces = [
        {
            "type": "bar",
            "orientation": "h",
            "name": kind,
            "y": list(workers),
            "x": [100 * times.get(kind, 0.0) / max(sum(times.values()), 1e-9) for times in workers.values()],
            "customdata": [times.get(kind, 0.0) for times in workers.values()],
            "marker": {"color": colours[kind]},
            "hovertemplate": "%{x:.1f} %, %{customdata:.0f} s",
        }
        for kind in kinds
    ]
    chart = _chart(traces, x="% of the time", y="")
    # On a narrow page the legend has a line for each kind.
    height = 120 + 34 * len(workers) + 20 * len(kinds)
    chart["layout"] |= {"barmode": "stack", "hovermode": "closest", "height": height}
    chart["layout"]["legend"]["traceorder"] = "normal"
    chart["layout"]["yaxis"] |= {"autorange": "reversed", "type": "category"}
    chart["layout"]["xaxis"]["range"] = [0, 100]
    return chart


def coverage(by_size: Iterable[tuple[int, float]], draft_vocab_size: int, covered: float) -> Chart:
    """Share of the predicted tokens inside draft vocabularies of several sizes, and this one."""
    sizes, shares = zip(*by_size, strict=True)
    curve = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": "most frequent tokens",
        "x": sizes,
        "y": [100 * share for share in shares],
        "line": {"color": _COLOURS[0], "width": 1.8},
        "hovertemplate": "%{y:.2f} %",
    }
    own = {
        "type": "scatter",
        "mode": "markers",
        "name": "this draft",
        "x": [draft_vocab_size],
        "y": [100 * covered],
        "marker": {"color": _COLOURS[1], "size": 12, "symbol": "diamond"},
        "hovertemplate": "%{y:.2f} %",
    }
    chart = _chart([curve, own], x="draft.vocab_size", y="% of the predicted tokens")
    chart["layout"]["xaxis"] |= {
        "type": "log",
        "tickvals": sizes,
        "ticktext": [f"{size:,}" for size in sizes],
    }
    chart["layout"]["xaxis"]["tickangle"] = -40
    # No axis beyond 100 %, also where every size covers all.
    least = min(99.0, 100 * min(*shares, covered))
    chart["layout"]["yaxis"]["range"] = [100 - 1.08 * (100 - least), 100 + 0.05 * (100 - least)]
    return chart


def _cycle(count: int) -> list[str]:
    return [_COLOURS[number % len(_COLOURS)] for number in range(count)]


def _chart(traces: list[Trace], *, x: str, y: str) -> Chart:
    layout = {
        "height": 330,
        "margin": {"l": 10, "r": 10, "t": 10, "b": 10},
        "paper_bgcolor": "rgba(0,0,0,0)",
        "plot_bgcolor": "rgba(0,0,0,0)",
        "hovermode": "x unified",
        "showlegend": len(traces) > 1,
        "legend": {"orientation": "h", "x": 0, "y": 1.02, "yanchor": "bottom"},
        "xaxis": {"title": {"text": x}, "automargin": True, "zeroline": False},
        "yaxis": {"title": {"text": y}, "automargin": True, "zeroline": False},
    }
    return {"data": traces, "layout": layout}

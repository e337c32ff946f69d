"""The results of `many_gpus.py` as Markdown: a table for each part, from the file that keeps all runs."""

from collections.abc import Iterator, Mapping
from typing import Any

import processes  # It puts `support` on the path.
from support.reporting import table

__all__ = ["processes", "report"]

Entry = Mapping[str, Any]
Cells = tuple[str, ...]

_TITLES = {
    1: "Targets and trainers",
    2: "One target over several cards",
    3: "Tensors between pairs of cards, all pairs at once",
    4: "Trainers of a large draft",
}
_HEADERS: dict[int, Cells] = {
    1: (
        "run",
        "trained tokens/s",
        "trainers wait",
        "targets idle",
        "of the slower half",
        "of cards x one card's half",
    ),
    2: ("run", "tokens/s", "share of the ceiling", "beside tensor parallelism", "trainers wait"),
    3: ("run", "bytes", "RPC, GB/s", "RPC, slowest pair", "NCCL or gloo, GB/s", "copies, GB/s"),
    4: ("run", "tokens/s", "share of the ceiling", "supervised", "peak, GiB"),
}


def report(content: Mapping[str, Any]) -> str:
    """The whole page."""
    named = ("device", "cards", "cores", "python", "torch", "transformers", "nccl", "date")
    machine = ", ".join(f"{name} {content[name]}" for name in named if content.get(name) is not None)
    lines = ["# Several GPUs of one host", "", machine, "", f"    {content['command']}", ""]
    if content["nccl"] is None:
        lines += ["On a CPU processes take the places of cards: these figures say nothing about GPUs.", ""]
    if content["environment"]:
        settings = ", ".join(f"`{name}={value}`" for name, value in content["environment"].items())
        lines += [f"Set by the machine: {settings}.", ""]
    for part, title in _TITLES.items():
        entries = [entry for entry in content["runs"].values() if entry["part"] == part]
        if entries:
            lines += [f"## {part}. {title}", "", table(_HEADERS[part], _rows(part, entries)), ""]
            lines += _without_figures(entries)
    return "\n".join(lines)


def _without_figures(entries: list[Entry]) -> list[str]:
    missing = [f"- {entry['name']}: {entry['why']}" for entry in entries if "figures" not in entry]
    return ["Not measured:", "", *missing, ""] if missing else []


def _rows(part: int, entries: list[Entry]) -> Iterator[Cells]:
    done = {entry["name"]: entry["figures"] for entry in entries if "figures" in entry}
    for name, figures in done.items():
        if part == 1:
            yield _topology_row(name, figures, done.get("1 x 1"))
        elif part == 2:
            yield _divided_row(name, figures, done)
        elif part == 3:
            for row in figures["sizes"]:
                speeds = (
                    "rpc_gb_per_second",
                    "rpc_slowest_pair",
                    "collective_gb_per_second",
                    "copies_gb_per_second",
                )
                yield (name, f"{row['bytes']:,}", *(f"{row[speed]:.2f}" for speed in speeds))
        else:
            rate, share = f"{figures['tokens_per_second']:,.0f}", f"{figures['share_of_ceiling']:.0%}"
            yield name, rate, share, f"{figures['supervised_share']:.0%}", f"{figures['peak_gib']:.1f}"


def _topology_row(name: str, figures: Entry, one: Entry | None) -> Cells:
    rate = f"{figures['tokens_per_second']:,.0f}"
    if "optimiser_steps" in figures:
        later = figures["tokens_per_second_later"]
        told = (
            f"{figures['optimiser_steps']} steps in {figures['seconds']:.0f} s, "
            f"killed after {_seconds(figures['killed_after'])}, serving again after "
            f"{_seconds(figures['serving_again_after'])}, longest wait {figures['longest_look']:.1f} s"
        )
        return name, f"{rate}, then {later or 0:,.0f}", told, "", "", ""
    return (
        name,
        rate,
        _shares(figures["trainer_wait_shares"]),
        _shares(figures["target_idle_shares"]),
        f"{figures['of_the_slower_half']:.2f}",
        _efficiency(figures, one),
    )


def _efficiency(figures: Entry, one: Entry | None) -> str:
    """Against what the slower half's cards would give if each gave what one gives alone; needs the 1 x 1 run."""
    if one is None:
        return "without 1 x 1"
    halves = figures["targets"] * one["target_alone"], figures["trainers"] * one["trainers_alone"]
    return f"{figures['tokens_per_second'] / min(halves):.2f}"


def _divided_row(name: str, figures: Entry, done: Mapping[str, Entry]) -> Cells:
    if "trainer_wait_shares" in figures:
        waits = _shares(figures["trainer_wait_shares"])
        return name, f"{figures['tokens_per_second']:,.0f}", "", "", waits
    if figures.get("system") == "tensor_parallel":
        return name, f"{figures['tokens_per_second']:,.0f}", f"{figures['share_of_ceiling']:.0%}", "1", ""
    rate = figures["served_tokens_per_second"]
    peer = done.get(f"tensor parallelism over {figures['devices']} cards")
    beside = f"{rate / peer['tokens_per_second']:.2f}" if peer else ""
    return name, f"{rate:,.0f}", f"{figures['served_share_of_shape_ceiling']:.0%}", beside, ""


def _seconds(seconds: float | None) -> str:
    return "never" if seconds is None else f"{seconds:.0f} s"


def _shares(shares: list[float]) -> str:
    return ", ".join(f"{share:.0%}" for share in shares)

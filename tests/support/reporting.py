"""The machine and Markdown tables, for the reports of fault tests and benchmarks."""

import platform
from collections.abc import Iterable, Sequence
from pathlib import Path


def processor() -> str:
    """The CPU's name."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A Markdown table; line breaks and bars in cells are replaced."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([" ".join(str(cell).split()).replace("|", "/") for cell in line] for line in lines)
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)

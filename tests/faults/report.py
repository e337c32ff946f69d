"""What an experiment found: lines for people, a file for machines."""

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil

from faults.checks import Check

_PACKAGES = ("torch", "transformers")


@dataclass
class Report:
    """Tables, checks and the record they come from."""

    title: str
    notes: list[str] = field(default_factory=list)
    tables: list[str] = field(default_factory=list)
    checks: list[Check] = field(default_factory=list)
    record: dict[str, Any] = field(default_factory=dict)

    @property
    def holds(self) -> bool:
        return all(check.holds for check in self.checks)

    def markdown(self) -> str:
        bars = table(
            ("bar", "met", "found"),
            [(check.name, "yes" if check.holds else "NO", check.found) for check in self.checks],
        )
        command = shlex.join(["python", "benchmarks/faults.py", *sys.argv[1:]])
        return (
            "\n\n".join([f"## {self.title}", f"    {command}", machine(), *self.notes, bars, *self.tables])
            + "\n"
        )

    def write(self, directory: Path) -> None:
        """`report.md` and `report.json`."""
        checks = [asdict(check) for check in self.checks]
        (directory / "report.md").write_text(self.markdown(), encoding="utf-8")
        (directory / "report.json").write_text(
            json.dumps({"checks": checks, **self.record}, indent=1) + "\n", encoding="utf-8"
        )


def machine() -> str:
    names = [
        line.split(":")[1].strip()
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    packages = ", ".join(f"{package} {version(package)}" for package in _PACKAGES)
    return (
        f"{names[0] if names else platform.machine()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"Linux {platform.release()}; Python {platform.python_version()}, {packages}; load average {os.getloadavg()[2]:.1f} at the end."
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(
        "| " + " | ".join(" ".join(str(cell).split()).replace("|", "/") for cell in line) + " |"
        for line in lines
    )


def spread(values: Sequence[float]) -> str:
    """Median and largest, in seconds."""
    return f"{statistics.median(values):.2f}, {max(values):.2f}" if values else "none"


def mebibytes(number: float) -> str:
    return f"{number / 2**20:.1f} MiB"

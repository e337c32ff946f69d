"""The result of a fault test as text and as JSON."""

import json
import os
import platform
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
from support.reporting import processor, table

from faults.checks import Check


@dataclass
class Report:
    """Checks, tables and the record behind them."""

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
            ("check", "holds", "found"),
            [(check.name, "yes" if check.holds else "NO", check.found) for check in self.checks],
        )
        command = shlex.join(["python", "-m", "tests.faults", *sys.argv[1:]])
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
    packages = ", ".join(f"{package} {version(package)}" for package in ("torch", "transformers"))
    return (
        f"{processor()}, {psutil.cpu_count()} cores, {psutil.virtual_memory().total / 2**30:.0f} GiB, "
        f"Linux {platform.release()}; Python {platform.python_version()}, {packages}; "
        f"load average {os.getloadavg()[2]:.1f} at the end."
    )


def spread(values: Sequence[float]) -> str:
    """Median and largest, in seconds."""
    return f"{statistics.median(values):.2f}, {max(values):.2f}" if values else "none"


def mebibytes(number: float) -> str:
    return f"{number / 2**20:.1f} MiB"

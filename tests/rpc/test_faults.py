"""The short form of `benchmarks/faults.py`: one fault of each kind, and a start and a stop of each mode."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.rpc, pytest.mark.slow, pytest.mark.timeout(900)]

FAULTS = Path(__file__).parents[2] / "benchmarks" / "faults.py"


def report_of(directory: Path, *arguments: str) -> dict[str, Any]:
    """What an experiment found; how long things took, and how much memory, is for long runs to tell."""
    output = directory / "output"
    done = subprocess.run(
        [sys.executable, str(FAULTS), *arguments, "--output", str(output)],
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert (output / "report.json").exists(), done.stdout + done.stderr
    report = json.loads((output / "report.json").read_text())
    assert [check for check in report["checks"] if not check["holds"] and not check["is_figure"]] == [], (
        done.stdout
    )
    return report


def test_training_under_every_kind_of_fault_ends_with_the_bits_of_an_undisturbed_run(tmp_path: Path):
    few = ["--faults", "1", "--faults-per-run", "21", "--steps-per-fault", "30"]
    report = report_of(tmp_path, "run", "--minutes", "0", "--seed", "7", *few)
    assert (
        len({hit["kind"] for hit in report["hits"]}) >= 12
    )  # a quick trainer may finish before the last ones
    assert len(report["checks"]) >= 8


def test_every_mode_ends_when_it_is_told_to_and_leaves_nothing_behind(tmp_path: Path):
    report = report_of(tmp_path, "cycles", "--count", "8", "--seed", "3")
    assert len({cycle["mode"] for cycle in report["cycles"]}) == 6

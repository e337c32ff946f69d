"""The short form of `python -m tests.faults`: one fault of each kind, and a start and a stop in each mode."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from faults.kinds import KINDS

pytestmark = [pytest.mark.rpc, pytest.mark.slow, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def report_of(directory: Path, *arguments: str) -> dict[str, Any]:
    """The report of a fault test. Checks of times and memory are left to long runs."""
    output = directory / "output"
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults", *arguments, "--output", str(output)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert (output / "report.json").exists(), done.stdout + done.stderr
    report = json.loads((output / "report.json").read_text())
    failed = [check for check in report["checks"] if not check["holds"] and not check["is_figure"]]
    assert failed == [], done.stdout
    return report


def test_training_under_every_kind_of_fault_ends_with_the_bits_of_an_undisturbed_run(tmp_path: Path):
    few = ["--faults", "1", "--faults-per-run", str(len(KINDS)), "--steps-per-fault", "30"]
    report = report_of(tmp_path, "run", "--minutes", "0", "--seed", "7", *few)
    # A fast trainer may finish before the last faults.
    assert len({hit["kind"] for hit in report["hits"]}) >= 12
    assert len(report["checks"]) >= 8


def test_training_under_kills_of_stages_of_a_target_ends_with_the_bits_of_one_process(tmp_path: Path):
    few = ["--faults", "2", "--faults-per-run", "2", "--steps-per-fault", "40"]
    report = report_of(tmp_path, "run", "--stages", "2", "--minutes", "0", *few)
    assert {hit["victim"] for hit in report["hits"]} == {"target0", "target0.1"}


def test_a_rolling_restart_of_all_targets_loses_no_batch_and_changes_no_bit(tmp_path: Path):
    few = ["--targets", "2", "--trainers", "4", "--steps-per-restart", "4"]
    report = report_of(tmp_path, "rolling", *few)
    assert {"every target restarted once", "each step once, in order"} <= {
        check["name"] for check in report["checks"]
    }


def test_targets_and_trainers_that_come_and_go_for_a_minute_end_as_promised(tmp_path: Path):
    report = report_of(tmp_path, "soak", "--minutes", "1", "--pause", "2", "--guest-steps", "3")
    assert sum(report["events"].values()) >= 3
    assert set(report["samples"]) == {"registry", "target0", "steady trainer"}


def test_every_mode_ends_after_its_signal_and_leaves_nothing_behind(tmp_path: Path):
    report = report_of(tmp_path, "cycles", "--count", "8", "--seed", "3")
    assert len({cycle["mode"] for cycle in report["cycles"]}) == 6

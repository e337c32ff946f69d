"""`benchmarks/many_gpus.py` on a CPU, where processes take the places of cards: that it runs and keeps its results."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.rpc, pytest.mark.timeout(900)]

ROOT = Path(__file__).parents[2]


def measured(out: Path, *arguments: str) -> tuple[dict[str, Any], str]:
    """The runs in its file of results, and what it printed."""
    words = ["--out", str(out), "--device", "cpu", "--shapes", "small", "--cards", "2", *arguments]
    done = subprocess.run(
        [sys.executable, "benchmarks/many_gpus.py", *words],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=840,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((out / "many_gpus.json").read_text())["runs"], done.stdout


def test_pairs_are_measured_once_and_runs_that_need_more_cards_say_so(tmp_path: Path):
    runs, _ = measured(tmp_path, "--parts", "3", "4")
    sizes = runs["3: 1 pair"]["figures"]["sizes"]
    names = [f"{way}_gb_per_second" for way in ("rpc", "collective", "copies")]
    assert [row["bytes"] for row in sizes] == [2**10, 2**16]
    assert all(row[name] > 0 for row in sizes for name in names)
    assert runs["3: 4 pairs at once"]["why"] == "needs 8 GPUs, this machine has 2"
    assert "fused step" in runs["4: 1 trainer, 1x32, sharding none"]["why"]
    page = (tmp_path / "many_gpus.md").read_text()
    assert "| 1 pair | 1,024 |" in page and "- 4 pairs at once: needs 8 GPUs" in page
    again, printed = measured(tmp_path, "--parts", "3")
    assert again == runs and "1 pair:" not in printed


def test_a_run_for_which_no_time_is_left_is_told(tmp_path: Path):
    runs, _ = measured(tmp_path, "--parts", "1", "--minutes", "0")
    assert runs["1: 1 x 1"]["why"] == "no time was left: the same command goes on with it"


@pytest.mark.slow
def test_a_target_and_a_trainer_and_a_target_over_two_cards_are_measured(tmp_path: Path):
    runs, _ = measured(tmp_path, "--parts", "1", "2", "--minutes", "13")
    one = runs["1: 1 x 1"]["figures"]
    assert min(one[name] for name in ("tokens_per_second", "target_alone", "trainers_alone")) > 0
    assert len(one["trainer_wait_shares"]) == len(one["target_idle_shares"]) == 1
    assert runs["2: a target over 2 cards, bf16"]["figures"]["served_tokens_per_second"] > 0
    assert runs["2: tensor parallelism over 2 cards"]["figures"]["tokens_per_second"] > 0
    assert runs["2: training, a target over 2 cards x 1"]["why"] == "needs 3 GPUs, this machine has 2"

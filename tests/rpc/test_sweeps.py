"""`--multirun` as a person types it: real targets, trainers and evaluations of tiny models."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkout import make_checkout
from support.tiny_model import save_tiny_model, write_prompts

pytestmark = [pytest.mark.rpc, pytest.mark.slow, pytest.mark.timeout(1800)]

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A directory with a model and prompts, and the overrides that name them."""
    directory = tmp_path_factory.mktemp("sweeps")
    model = save_tiny_model(directory / "model")
    prompts = write_prompts(directory / "prompts.jsonl", 12)
    return directory, [
        "run.name=swept",
        "target=hf",
        f"target.model={model}",
        "target.dtype=float32",
        "draft.vocab_size=64",
        "draft.ttt_steps=2",
        "data.max_length=128",
        "data.validation_share=0.2",
        "data.prompt_source=files",
        "train.batch_size=2",
        "train.autocast=null",
        "train.max_steps=2",
        "train.log_every=1",
        "regenerate.max_new_tokens=12",
        "regenerate.dtype=float32",
        f"regenerate.prompts={prompts}",
        f"evaluate.prompts={prompts}",
        "evaluate.num_prompts=3",
        "evaluate.max_new_tokens=10",
    ]


def run(command: list[str], directory: Path, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *words],
        cwd=directory,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )


def rows(directory: Path) -> list[dict[str, str]]:
    with (directory / "runs/swept/sweep.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_sweep_through_launch_sh_reports_a_broken_run_and_goes_on_with_it(
    workplace: tuple[Path, list[str]],
):
    directory, overrides = workplace
    launch = ["bash", str(make_checkout(directory / "checkout", f'exec {sys.executable} "$@"') / "launch.sh")]
    # A file where the second run's draft is to be written breaks its export.
    broken = directory / "runs/swept/learning_rate=0.0003/export"
    broken.parent.mkdir(parents=True)
    broken.write_text("in the way")
    swept = ["--multirun", *overrides, "train.learning_rate=1e-3,3e-4"]
    first = run(launch, directory, *swept)
    assert first.returncode == 1, first.stderr
    whole, failed = rows(directory)
    assert whole["outcome"] == "finished" and failed["outcome"].startswith("job=export: "), failed
    assert float(whole["accept_length"]) >= 1 and int(whole["supervised_tokens"]) > 0
    assert (directory / "runs/swept/plots/sweep.png").read_bytes().startswith(b"\x89PNG")
    answers = (directory / "runs/swept/answers.jsonl").read_bytes()
    assert len(answers.splitlines()) == 12

    checkpoint = broken.parent / "checkpoints/step_2/draft.safetensors"
    trained = checkpoint.stat().st_mtime_ns
    broken.unlink()
    second = run(launch, directory, *swept)
    assert second.returncode == 0, second.stderr
    assert "finished earlier" in second.stderr and "job=train" not in second.stderr
    assert [row["outcome"] for row in rows(directory)] == ["finished"] * 2
    assert checkpoint.stat().st_mtime_ns == trained
    assert (directory / "runs/swept/answers.jsonl").read_bytes() == answers
    tokens = {path.name for path in (directory / ".cache/eagle_rpc/tokens").iterdir() if path.is_dir()}
    assert len(tokens) == 1, "both runs read one cache of tokens"


def test_under_torchrun_the_first_worker_starts_the_workers_of_each_run(workplace: tuple[Path, list[str]]):
    directory, overrides = workplace
    shutil.rmtree(directory / "runs/swept", ignore_errors=True)
    torchrun = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=2",
        "-m",
        "eagle_rpc",
    ]
    swept = ["--multirun", *overrides, "run.seed=0,1"]
    done = run(torchrun, directory, *swept)
    assert done.returncode == 0, done.stderr
    assert [row["outcome"] for row in rows(directory)] == ["finished"] * 2
    for seed in (0, 1):
        record = json.loads((directory / f"runs/swept/seed={seed}/sweep_run.json").read_text())
        assert record["finished"] == ["regenerate", "train", "export", "evaluate"]
    assert "mean accept length" in (directory / "runs/swept/sweep.md").read_text()

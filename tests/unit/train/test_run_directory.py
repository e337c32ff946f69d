import subprocess
import sys
from pathlib import Path

import pytest

from eagle_rpc.config.choices import Resume
from eagle_rpc.errors import ConfigError
from eagle_rpc.process.rundir import RunDirectory


def test_a_fresh_directory_is_made_and_may_hold_logs(tmp_path):
    run = RunDirectory(tmp_path / "runs" / "first")
    run.log_file("target0").parent.mkdir(parents=True)
    run.log_file("target0").write_text("ready\n")
    with run.claimed(Resume.never):
        assert run.path.is_dir()


@pytest.mark.parametrize(
    "name", ["checkpoints/step_4/checkpoint.json", "metrics.jsonl", "export/config.json"]
)
def test_a_trained_run_is_refused_unless_resuming(tmp_path: Path, name: str):
    run = RunDirectory(tmp_path)
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("{}\n")
    held = "/".join(name.split("/")[:-1]) or name
    refusal = rf"run\.dir must hold no trained run with train\.resume=never, .* holds {held}: choose another"
    with pytest.raises(ConfigError, match=refusal), run.claimed(Resume.never):
        pass
    with run.claimed(Resume.auto):
        pass


def test_a_command_that_failed_before_it_trained_may_be_repeated(tmp_path: Path):
    """Also after the answers were written, under any name."""
    run = RunDirectory(tmp_path)
    for file in (run.config, run.metrics, run.log_file("trainer0"), tmp_path / "my_answers.jsonl"):
        file.parent.mkdir(exist_ok=True)
        file.write_text("" if file == run.metrics else "left behind\n")
    run.checkpoints.mkdir()
    run.target_embedding.write_bytes(b"")
    (run.path / "tensorboard").mkdir()
    with run.claimed(Resume.never):
        pass


def test_a_claim_ends_with_its_body_and_leaves_nothing_that_counts(tmp_path):
    claims = 0
    for _ in range(2):
        with RunDirectory(tmp_path).claimed(Resume.never):
            claims += 1
    assert claims == 2


HOLDER = """
import sys
from pathlib import Path
from eagle_rpc.config.choices import Resume
from eagle_rpc.process.rundir import RunDirectory
with RunDirectory(Path(sys.argv[1])).claimed(Resume.never):
    print("claimed", flush=True)
    sys.stdin.read()
"""


def test_a_directory_in_use_is_refused_with_its_holder_until_that_is_killed(tmp_path):
    arguments = [sys.executable, "-c", HOLDER, str(tmp_path)]
    with subprocess.Popen(arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == "claimed\n"
        with (
            pytest.raises(ConfigError, match=f"held by process {holder.pid} on "),
            RunDirectory(tmp_path).claimed(Resume.auto),
        ):
            pass
        holder.kill()
        holder.wait(timeout=30)
    with RunDirectory(tmp_path).claimed(Resume.auto):
        pass


def test_names_are_those_that_users_know():
    run = RunDirectory(Path("runs/smollm2"))
    assert str(run.log_file("trainer0")) == "runs/smollm2/logs/trainer0.log"
    assert str(run.loss_plot) == "runs/smollm2/plots/loss.png"
    assert str(run.evaluation) == "runs/smollm2/evaluation.json"

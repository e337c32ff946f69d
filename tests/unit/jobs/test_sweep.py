"""`--multirun` with jobs that write what real ones write, and fail where they are told to."""

import json
import threading
from pathlib import Path

import pytest

from eagle_rpc.config.sweeps import read_sweep
from eagle_rpc.errors import ConfigError, WaitTimeout
from eagle_rpc.jobs import sweep as job
from eagle_rpc.process.files import replaced_file

ACCEPTED = {"0.001": [3, 1], "0.0003": [4, 2]}


class Jobs:
    """Stands for the child processes: `started` has their jobs and runs, `failing` those that fail."""

    def __init__(self) -> None:
        self.started: list[tuple[str, str]] = []
        self.failing: dict[tuple[str, str], str] = {}
        self.stop_at: tuple[str, str] | None = None

    def __call__(
        self, command: list[str], what: str, *, log: Path, seconds: float, stop: threading.Event
    ) -> int:
        assert "--nproc-per-node=2" in command if what == "job=train" else "--nproc-per-node=2" not in command
        name, directory = what.removeprefix("job="), log.parent
        directory.mkdir(parents=True, exist_ok=True)
        self.started.append((name, directory.name))
        reason = self.failing.get(self.started[-1])
        if reason == "timeout":
            raise WaitTimeout("gave up waiting")
        with log.open("a") as output:
            output.write(f"12:00:00 {name} error: {reason}\n" if reason else f"{name} is done\n")
        if name == "regenerate":
            Path("runs/swept/answers.jsonl").touch()
        if self.started[-1] == self.stop_at:
            stop.set()
        if name == "train":
            lines = [{"step": 1, "supervised_tokens": 50}, {"step": 2, "supervised_tokens": 30}]
            lines.append({"step": 2, "validation/accept_length": 1.5})
            (directory / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        if name == "evaluate":
            accepted = next(value for rate, value in ACCEPTED.items() if f"={rate}" in directory.name)
            with replaced_file(directory / "evaluation.json") as fresh:
                fresh.write_text(json.dumps(evaluation(accepted)))
        return 1 if reason else 0


def evaluation(accepted: list[int]) -> dict[str, object]:
    prompts = [
        {"prompt": str(number), "num_drafts": 4, "accepted_per_position": [count, 0]}
        for number, count in enumerate(accepted)
    ]
    length = 1 + sum(accepted) / 8
    return {
        "accept_length": length,
        "accept_length_interval": [length - 0.1, length + 0.1],
        "prompts": prompts,
    }


@pytest.fixture
def jobs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Jobs:
    jobs = Jobs()
    monkeypatch.setattr(job, "run_child", jobs)
    monkeypatch.chdir(tmp_path)
    return jobs


def run(*words: str) -> int:
    return job.run(read_sweep(["--multirun", "run.name=swept", "train.learning_rate=1e-3,3e-4", *words]))


FIRST, SECOND = "learning_rate=0.001", "learning_rate=0.0003"
PATH = ("regenerate", "train", "export", "evaluate")


def test_each_run_takes_the_whole_path_and_the_target_answers_once(jobs: Jobs, capsys: pytest.CaptureFixture):
    assert run() == 0
    assert jobs.started == [*((name, FIRST) for name in PATH), *((name, SECOND) for name in PATH[1:])]
    said = capsys.readouterr().out
    assert "1.500 [1.400, 1.600]" in said and "wrote runs/swept/plots/sweep.png" in said
    table = Path("runs/swept/sweep.csv").read_text().splitlines()
    assert table[0].startswith("train.learning_rate,accept_length,gain,supervised_tokens,train_seconds")
    assert table[1].startswith("0.001,1.5,,80,") and table[2].startswith("0.0003,1.75,0.25,80,")
    assert "+0.250 [+0.250, +0.250]" in Path("runs/swept/sweep.md").read_text()
    assert Path("runs/swept/plots/sweep.png").read_bytes().startswith(b"\x89PNG")


def test_a_run_that_fails_is_reported_and_the_others_go_on(jobs: Jobs, capsys: pytest.CaptureFixture):
    jobs.failing = {("train", FIRST): "TrainingDiverged: the loss must be finite"}
    assert run() == 1
    assert jobs.started[-1] == ("evaluate", SECOND) and ("export", FIRST) not in jobs.started
    assert "job=train: TrainingDiverged: the loss must be finite" in capsys.readouterr().out
    rows = Path("runs/swept/sweep.csv").read_text().splitlines()
    assert rows[1].endswith(",job=train: TrainingDiverged: the loss must be finite")
    assert rows[2].endswith(",finished")


def test_the_same_command_skips_what_is_finished_and_goes_on_with_a_broken_run(jobs: Jobs):
    jobs.failing = {("export", SECOND): "timeout"}
    assert run() == 1
    jobs.started, jobs.failing = [], {}
    assert run() == 0
    assert jobs.started == [("export", SECOND), ("evaluate", SECOND)]
    jobs.started = []
    assert run() == 0 and jobs.started == []
    # One more value is one more run.
    assert run("draft.num_layers=1") == 0 and jobs.started == []


def test_answers_that_fail_are_not_asked_again_for_the_next_run(jobs: Jobs):
    jobs.failing = {("regenerate", FIRST): "ConfigError: no such model"}
    assert run() == 1
    assert jobs.started == [("regenerate", FIRST)]
    rows = Path("runs/swept/sweep.csv").read_text().splitlines()
    assert all(row.endswith("job=regenerate: ConfigError: no such model") for row in rows[1:])


def test_a_stop_ends_the_sweep_with_its_table_and_the_same_command_goes_on(jobs: Jobs):
    jobs.stop_at = ("train", FIRST)
    assert run() == 1
    assert jobs.started == [("regenerate", FIRST), ("train", FIRST)]
    rows = Path("runs/swept/sweep.csv").read_text().splitlines()
    assert rows[1].endswith("job=train: stopped; the same command goes on") and rows[2].endswith(",not run")
    jobs.started, jobs.stop_at = [], None
    assert run() == 0
    assert jobs.started == [(name, one) for one in (FIRST, SECOND) for name in PATH[1:]]


def test_finished_runs_of_other_settings_are_refused_before_anything_runs(jobs: Jobs):
    run()
    jobs.started = []
    with pytest.raises(ConfigError) as caught:
        run("evaluate.num_prompts=99")
    assert "2 mistakes in the sweep" in str(caught.value)
    assert f"runs/swept/{FIRST} must be a run of the same settings" in str(caught.value)
    assert "got evaluate.num_prompts=16, now 99: name the sweep by another run.name" in str(caught.value)
    assert jobs.started == []
    # How and where a run computes makes no other run of it.
    assert run("run.threads=3", "train.device=cpu") == 0 and jobs.started == []


def test_one_job_may_be_swept_alone(jobs: Jobs):
    assert run("job=train", "data=chats", "data.train_path=chats.jsonl") == 0
    assert jobs.started == [("train", FIRST), ("train", SECOND)]
    assert Path("runs/swept/sweep.csv").read_text().splitlines()[1].startswith("0.001,,,80,")


def test_under_torchrun_the_first_worker_runs_the_sweep(jobs: Jobs, monkeypatch: pytest.MonkeyPatch):
    from support.processes import torchrun_environment

    def worker(rank: int, size: int) -> int:
        for name, value in torchrun_environment(rank, size, 1).items():
            monkeypatch.setenv(name, value)
        return run()

    assert worker(1, 2) == 0 and jobs.started == []
    assert worker(0, 2) == 0 and len(jobs.started) == 7
    with pytest.raises(ConfigError, match=rf"--nproc-per-node must be 2 for {FIRST}, got 3"):
        worker(0, 3)
    monkeypatch.setenv("GROUP_WORLD_SIZE", "2")
    with pytest.raises(ConfigError, match="must run under one torchrun agent, got 2"):
        run()

"""`launch.sh` and the questions that it asks of the composed configuration."""

import subprocess
import sys
from pathlib import Path

import pytest
from support.checkout import make_checkout

from eagle_rpc.config.choices import JobName
from eagle_rpc.config.compose import load
from eagle_rpc.config.launch import jobs, num_workers


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([], 2),
        (["topology=1x2"], 3),
        (["topology.trainers=3"], 4),
        (["topology=2x2", "topology.targets=5"], 7),
        (["topology=single"], 1),
        (["topology.trainers=3", "rpc=elastic"], 3),
    ],
)
def test_the_composed_configuration_says_how_many_workers_train(overrides: list[str], expected: int):
    assert num_workers(load(*overrides)) == expected


def test_answers_are_asked_for_only_if_training_reads_them():
    own = ["data=chats", "data.train_path=chats.jsonl"]
    assert [job.name for job in jobs(load(), [])] == ["regenerate", "train", "export", "evaluate"]
    assert [job.name for job in jobs(load(*own), own)] == ["train", "export", "evaluate"]
    assert jobs(load("job=export"), ["job=export"]) == [JobName.export]


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of `launch.sh` whose Python writes the jobs that it starts to `started` and runs none."""
    checkout = tmp_path / "checkout"
    return make_checkout(
        checkout,
        f'[ "$2" != eagle_rpc.config.launch ] || exec {sys.executable} "$@"\n'
        f'echo "$PWD: $*" >> {checkout}/started',
    )


def launch(checkout: Path, *words: str) -> subprocess.CompletedProcess[str]:
    directory = checkout.parent / "elsewhere"
    directory.mkdir(exist_ok=True)
    command = ["bash", "../checkout/launch.sh", *words]
    return subprocess.run(command, cwd=directory, capture_output=True, text=True, timeout=60, check=False)


def started(checkout: Path, *words: str) -> list[str]:
    """Command lines of the jobs that `launch.sh` starts, all of them in the caller's directory."""
    done = launch(checkout, *words)
    assert done.returncode == 0, done.stderr
    directories, commands = zip(
        *(line.split(": ", 1) for line in (checkout / "started").read_text().splitlines()), strict=True
    )
    assert set(directories) == {str(checkout.parent / "elsewhere")}
    return list(commands)


def test_the_whole_path_of_the_embedded_model(checkout: Path):
    regenerate, train, export, evaluate = started(checkout, "train.max_steps=2", "topology.trainers=3")
    settings = "train.resume=auto experiment=smollm2 train.max_steps=2 topology.trainers=3"
    assert regenerate == f"-m eagle_rpc job=regenerate {settings}"
    assert "--nproc-per-node=4" in train and train.endswith(f"-m eagle_rpc job=train {settings}")
    assert [export, evaluate] == [f"-m eagle_rpc job={job} {settings}" for job in ("export", "evaluate")]


def test_the_tour_takes_every_stage_by_its_own_limits(checkout: Path):
    regenerate, train, *further = started(checkout, "experiment=tour")
    assert regenerate == "-m eagle_rpc job=regenerate train.resume=auto experiment=tour"
    assert "--nproc-per-node=2" in train and "experiment=smollm2" not in train
    assert [command.split()[2] for command in further] == ["job=export", "job=evaluate"]


@pytest.mark.parametrize(
    "own",
    [
        ["regenerate.prompts=prompts.jsonl"],
        ["target=hf", "target.model=somewhere"],
        ["target.model=somewhere"],
        ["data=chats", "data.train_path=chats.jsonl"],
        ["data.train_path=chats.jsonl"],
        ["++data.train_path=chats.jsonl"],
        ["experiment=smollm2_long"],
    ],
)
def test_own_prompts_target_or_data_keep_the_embedded_limits_away(checkout: Path, own: list[str]):
    for command in started(checkout, "run.name=mine", *own, "train.max_steps=2"):
        assert "experiment=smollm2 " not in command and " ".join(own) in command


def test_jobs_of_one_run_get_the_same_settings_one_by_one(checkout: Path):
    started(checkout, "job=regenerate", "regenerate.num_prompts=8")
    regenerate, train = started(checkout, "regenerate.num_prompts=8", "job=train")
    assert regenerate == "-m eagle_rpc job=regenerate experiment=smollm2 regenerate.num_prompts=8"
    assert train.endswith("-m eagle_rpc job=train experiment=smollm2 regenerate.num_prompts=8")
    assert started(checkout, "job=status")[-1] == "-m eagle_rpc job=status"


def test_a_sweep_starts_its_jobs_itself_with_the_settings_of_a_run(checkout: Path):
    assert started(checkout, "--multirun", "train.max_steps=1,2") == [
        "-m eagle_rpc --multirun experiment=smollm2 train.max_steps=1,2"
    ]
    own = ["data=chats", "data.train_path=chats.jsonl", "job=train", "train.max_steps=1,2", "-m"]
    expected = "-m eagle_rpc --multirun job=train data=chats data.train_path=chats.jsonl train.max_steps=1,2"
    assert started(checkout, *own)[-1] == expected


def test_help_and_unknown_words_print_the_usage_and_start_nothing(checkout: Path):
    for words in (["--help"], ["-h"], ["job=train", "--help"]):
        done = launch(checkout, *words)
        assert done.returncode == 0 and done.stdout.startswith("usage: launch.sh")
    for word in ("trian", "--cfg"):
        done = launch(checkout, word)
        assert done.returncode == 2 and f"{word} is neither a command nor an override" in done.stderr
        assert "usage: launch.sh" in done.stderr
    assert not (checkout / "started").exists()


def test_a_mistake_is_reported_before_any_job_starts(checkout: Path):
    done = launch(checkout, "train.max_step=2")
    assert done.returncode == 1
    assert done.stderr == "ConfigError: train.max_step is not a setting; did you mean train.max_steps?\n"
    assert not (checkout / "started").exists()


def test_help_worker_count_and_checks_import_nothing_heavy():
    code = "import sys, eagle_rpc.__main__, eagle_rpc.config.launch; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60
    )
    assert not {"torch", "transformers", "numpy"} & set(done.stdout.split())

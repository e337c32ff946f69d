"""The program as a person types it: whole processes, torchrun included."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from support.processes import free_port
from support.tiny_model import save_tiny_model, write_prompts
from support.waiting import until

pytestmark = pytest.mark.rpc

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
WAIT = 120.0
PYTHON = [sys.executable, "-m", "eagle_rpc"]
SMALL = [
    "target=hf",
    "target.dtype=float32",
    "draft.vocab_size=64",
    "draft.ttt_steps=2",
    "data.max_length=128",
    "data.validation_share=0.2",
    "train.batch_size=2",
    "train.autocast=null",
    "train.log_every=1",
    "train.checkpoint_every=2",
    "train.validate_every=0",
    "regenerate.max_new_tokens=12",
    "regenerate.dtype=float32",
    "evaluate.num_prompts=3",
    "evaluate.max_new_tokens=10",
]


def torchrun(workers: int) -> list[str]:
    return [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={workers}",
        "-m",
        "eagle_rpc",
    ]


def run(
    command: list[str], directory: Path, *overrides: str, timeout: float = 150
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*command, *overrides],
        cwd=directory,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[str]]:
    """A directory with a model, prompts and the target's answers, and the overrides that name them."""
    directory = tmp_path_factory.mktemp("workplace")
    model = save_tiny_model(directory / "model")
    prompts = write_prompts(directory / "prompts.jsonl", 12)
    overrides = [
        *SMALL,
        f"target.model={model}",
        "data.prompt_source=files",
        f"regenerate.prompts={prompts}",
        "regenerate.output=answers.jsonl",
        f"evaluate.prompts={prompts}",
    ]
    done = run(PYTHON, directory, "job=regenerate", "run.name=answers", *overrides)
    assert done.returncode == 0, done.stderr
    assert len((directory / "answers.jsonl").read_text().splitlines()) == 12
    return directory, overrides


def test_the_whole_path_from_answers_to_accept_length(workplace: tuple[Path, list[str]]):
    directory, overrides = workplace
    named = ["run.name=path", *overrides]
    trained = run(torchrun(2), directory, "job=train", "topology=1x1", "train.max_steps=4", *named)
    assert trained.returncode == 0, trained.stderr
    assert "target0 serving LlamaForCausalLM" in trained.stderr and "trainer0" in trained.stderr
    for job in ("export", "evaluate"):
        done = run(PYTHON, directory, f"job={job}", *named)
        assert done.returncode == 0, done.stderr
    run_dir = directory / "runs" / "path"
    found = {str(path.relative_to(run_dir)) for path in run_dir.rglob("*") if path.is_file()}
    assert {
        "config.yaml",
        "metrics.jsonl",
        "logs/target0.log",
        "logs/trainer0.log",
        "checkpoints/step_4/draft.safetensors",
        "export/config.json",
        "export/model.safetensors",
        "evaluation.json",
        "plots/loss.png",
        "plots/acceptance.png",
        "training.json",
        "report.html",
    } <= found
    assert any(name.startswith("tensorboard/") for name in found)
    training = json.loads((run_dir / "training.json").read_text())
    assert [one["name"] for one in training["trainers"]] == ["trainer0"]
    assert [(one["name"], one["passes"] >= 4) for one in training["targets"]] == [("target0", True)]
    page = (run_dir / "report.html").read_text()
    assert "Where the time went" in page and "By position of the guess" in page and 'class="p' in page
    (run_dir / "report.html").unlink()
    assert run(PYTHON, directory, "job=report", *named).returncode == 0
    assert (run_dir / "report.html").read_text() == page
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert evaluation["identical_texts"] is True
    assert evaluation["accept_length"] >= 1 and len(evaluation["acceptance_per_position"]) == 3
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()][
        :4
    ] == [1, 2, 3, 4]


def test_a_run_trains_on_the_answers_that_it_asked_for(workplace: tuple[Path, list[str]]):
    directory, overrides = workplace
    same = ["topology=single", "run.name=own", "train.max_steps=2", *overrides]
    same.remove("regenerate.output=answers.jsonl")
    for job in ("regenerate", "train"):
        done = run(PYTHON, directory, f"job={job}", *same)
        assert done.returncode == 0, done.stderr
    assert "runs/own/answers.jsonl: 12 chats" in done.stderr


def test_one_process_that_calls_itself_trains_as_well_and_logs_json_where_it_is_told_to(
    workplace: tuple[Path, list[str]],
):
    directory, overrides = workplace
    training = ["job=train", "topology=single", "train.max_steps=2", "run.name=single", *overrides]
    done = run(PYTHON, directory, *training, "run.log_format=json")
    assert done.returncode == 0, done.stderr
    said = [json.loads(line) for line in done.stderr.splitlines()]
    assert {one["worker"] for one in said} == {"single0"}
    kept = (directory / "runs/single/logs/single0.log").read_text().splitlines()
    assert said[0]["message"].startswith("loading PyTorch") and said[1:] == [
        json.loads(line) for line in kept
    ]
    assert (directory / "runs/single/checkpoints/step_2").is_dir()


def test_a_draft_starts_from_an_exported_one_and_resumes(workplace: tuple[Path, list[str]]):
    directory, overrides = workplace
    shared = ["topology=single", *overrides]
    for job in (["job=train", "train.max_steps=2"], ["job=export", "serving.dtype=float32"]):
        done = run(PYTHON, directory, *job, "run.name=general", *shared)
        assert done.returncode == 0, done.stderr
    warm = ["job=train", "run.name=domain", *shared, "draft.init_from=runs/general/export"]
    refused = run(PYTHON, directory, *warm, "draft.vocab_size=48")
    assert refused.returncode == 1 and "Traceback" not in refused.stderr
    rule = "draft.vocab_size must be 64 with draft.init_from=runs/general/export, got 48"
    assert rule in refused.stderr.splitlines()[-1]
    for steps in (2, 4):
        done = run(PYTHON, directory, *warm, f"train.max_steps={steps}", "train.resume=auto")
        assert done.returncode == 0, done.stderr
        assert "runs/general/export; 64 of 64 rows of its head are from there" in done.stderr
    facts = json.loads((directory / "runs/domain/checkpoints/latest/checkpoint.json").read_text())
    assert facts["step"] == 4 and len(facts["init_digest"]) == 64
    narrow = [*warm, "run.name=narrow", "draft.vocab_size=48", "draft.init_vocab=data", "train.max_steps=1"]
    done = run(PYTHON, directory, *narrow)
    assert done.returncode == 0 and " of 48 rows of its head are from there" in done.stderr


@pytest.mark.slow
def test_two_trainers_that_share_out_their_state_write_the_checkpoint_of_two_that_each_hold_all(
    workplace: tuple[Path, list[str]],
):
    directory, overrides = workplace
    # Unclipped, since the norm of gradients in parts is summed up in another order.
    settings = [
        "topology=1x2",
        "train.max_steps=3",
        "train.accumulation=2",
        "train.max_grad_norm=1e9",
        *overrides,
    ]
    written = []
    for sharding in ("none", "state"):
        named = [f"run.name=sharding_{sharding}", f"train.sharding={sharding}", *settings]
        trained = run(torchrun(3), directory, "job=train", *named)
        assert trained.returncode == 0, trained.stderr
        checkpoint = directory / f"runs/sharding_{sharding}/checkpoints/step_3"
        written.append(
            [(checkpoint / name).read_bytes() for name in ("draft.safetensors", "optimiser.safetensors")]
        )
    assert written[0] == written[1]
    exported = run(PYTHON, directory, "job=export", *named)
    assert exported.returncode == 0, exported.stderr


def test_training_killed_and_resumed_ends_with_the_same_weights(workplace: tuple[Path, list[str]]):
    directory, overrides = workplace
    settings = ["job=train", "topology=1x1", "train.max_steps=60", *overrides]
    alone = run(torchrun(2), directory, "run.name=alone", *settings)
    assert alone.returncode == 0, alone.stderr
    killed = ["run.name=killed", "train.resume=auto", *settings]
    for step in (5, 15, 25):
        kill_at_step(directory, killed, directory / "runs/killed/metrics.jsonl", step)
    finished = run(torchrun(2), directory, *killed)
    assert finished.returncode == 0, finished.stderr
    for name in ("draft.safetensors", "optimiser.safetensors"):
        straight, resumed = (
            directory / "runs" / name_of_run / "checkpoints/step_60" / name
            for name_of_run in ("alone", "killed")
        )
        assert straight.read_bytes() == resumed.read_bytes(), name


def kill_at_step(directory: Path, overrides: list[str], metrics: Path, step: int) -> None:
    """Starts a run and kills its launcher when it has logged `step`; its workers must end by themselves."""
    with (directory / f"killed_{step}.log").open("w") as log:
        launcher = subprocess.Popen(
            [*torchrun(2), *overrides], cwd=directory, env=ENVIRONMENT, stdout=log, stderr=log
        )
        until_logged(launcher, metrics, step, Path(log.name))
        workers = until(
            lambda: both if len(both := children_of(launcher.pid)) == 2 else None,
            "both workers run",
            seconds=WAIT,
        )
        launcher.send_signal(signal.SIGKILL)
        launcher.wait(10)
    until(lambda: not any(map(is_alive, workers)), f"workers {workers} end like their launcher", seconds=WAIT)


def test_torchrun_restarts_a_static_job_after_a_kill_and_the_weights_come_out_the_same(
    workplace: tuple[Path, list[str]],
):
    directory, overrides = workplace
    settings = ["job=train", "topology=1x1", "train.max_steps=60", "train.resume=auto", *overrides]
    restarting = [*torchrun(2)[:3], "--max-restarts=1", *torchrun(2)[3:]]
    metrics = directory / "runs/restarted/metrics.jsonl"
    with (directory / "restarted.log").open("w") as log:
        launcher = subprocess.Popen(
            [*restarting, "run.name=restarted", *settings],
            cwd=directory,
            env=ENVIRONMENT,
            stdout=log,
            stderr=log,
        )
        until_logged(launcher, metrics, 4, Path(log.name))
        trainer = next(
            pid
            for pid in children_of(launcher.pid)
            if b"ROLE_RANK=1\0" in Path(f"/proc/{pid}/environ").read_bytes()
        )
        os.kill(trainer, signal.SIGKILL)
        assert launcher.wait(150) == 0, (directory / "restarted.log").read_text()
    undisturbed = run(torchrun(2), directory, "run.name=undisturbed", *settings)
    assert undisturbed.returncode == 0, undisturbed.stderr
    for name in ("draft.safetensors", "optimiser.safetensors"):
        kept = [
            (directory / "runs" / one / "checkpoints/step_60" / name).read_bytes()
            for one in ("restarted", "undisturbed")
        ]
        assert kept[0] == kept[1], name


def until_logged(launcher: subprocess.Popen, metrics: Path, step: int, log: Path) -> None:
    """Until the run that `launcher` started has logged `step`."""

    def logged() -> bool:
        assert launcher.poll() is None, log.read_text()
        return metrics.exists() and f'"step": {step},' in metrics.read_text()

    until(logged, f"step {step} is logged", seconds=WAIT, seen=log.read_text)


def is_alive(pid: int) -> bool:
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        return "zombie" not in Path(f"/proc/{pid}/status").read_text()
    return False


def children_of(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def test_help_teaches_jobs_groups_and_examples(tmp_path: Path):
    done = run(PYTHON, tmp_path, "--help")
    assert done.returncode == 0 and done.stderr == ""
    for text in ("jobs (job=NAME", "topology    1x1, 1x2", "examples:", "--cfg job"):
        assert text in done.stdout
    composed = run(PYTHON, tmp_path, "--cfg", "job", "train.max_steps=7")
    assert composed.returncode == 0 and "max_steps: 7" in composed.stdout


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.batch_size=0"], "ConfigError: train.batch_size must be positive, got 0"),
        (["topology=2x2"], "needs 4 workers, got 1: start it with torchrun --nproc-per-node=4"),
        (
            ["train.batchsize=1"],
            "ConfigError: train.batchsize is not a setting; did you mean train.batch_size?",
        ),
    ],
)
def test_mistakes_end_with_code_1_and_one_clear_message(tmp_path: Path, overrides: list[str], message: str):
    done = run(PYTHON, tmp_path, *overrides)
    assert done.returncode == 1
    assert message in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("workers", [1, 3])
def test_a_directory_of_a_trained_run_is_refused_before_workers_join(
    workplace: tuple[Path, list[str]], workers: int
):
    directory, overrides = workplace
    (directory / "runs/occupied").mkdir(parents=True, exist_ok=True)
    (directory / "runs/occupied/metrics.jsonl").write_text('{"step": 1}\n')
    topology = "topology=single" if workers == 1 else "topology=1x2"
    command = PYTHON if workers == 1 else launcher(workers)
    done = run(command, directory, "job=train", topology, "run.name=occupied", *overrides)
    assert done.returncode == 1
    assert "run.dir must hold no trained run with train.resume=never" in done.stderr.splitlines()[-1]
    assert "joined" not in done.stderr


def launcher(workers: int) -> list[str]:
    """What `launch.sh` starts for `job=train`."""
    return [PYTHON[0], "-m", "eagle_rpc.process.launcher", *torchrun(workers)[3:]]


@pytest.mark.parametrize("start", [launcher, torchrun])
def test_a_job_of_several_workers_ends_with_the_message_of_the_one_that_failed(
    workplace: tuple[Path, list[str]], start: Callable[[int], list[str]]
):
    directory, overrides = workplace
    wrong = ["job=train", "run.name=wrong", *overrides, "data.train_path=nowhere.jsonl"]
    done = run(start(2), directory, *wrong)
    lines = done.stderr.splitlines()
    assert done.returncode == 1
    # torchrun ends its report with a line of its own.
    last = lines[-1] if start is launcher else lines[-2]
    assert "nowhere.jsonl" in last and "Error: " in last
    if start is launcher:
        assert last.startswith("launch: ") and "torch" not in done.stderr and "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_goes_on_and_is_exported_where_only_its_checkpoint_was_copied_to(
    workplace: tuple[Path, list[str]],
):
    directory, overrides = workplace
    shared = ["topology=single", *overrides]
    first = run(PYTHON, directory, "job=train", "run.name=origin", "train.max_steps=4", *shared)
    assert first.returncode == 0, first.stderr
    checkpoints = directory / "runs/copy/checkpoints"
    for step in ("step_2", "step_4"):
        shutil.copytree(directory / "runs/origin/checkpoints" / step, checkpoints / step)
    export = ["job=export", "run.name=copy", *overrides]
    refused = run(PYTHON, directory, *export)
    assert refused.returncode == 1 and "train.resume=auto once more" in refused.stderr.splitlines()[-1]
    # The same chats under another path.
    shutil.copy(directory / "answers.jsonl", directory / "elsewhere.jsonl")
    moved = ["train.max_steps=6", "train.resume=auto", "data.train_path=elsewhere.jsonl"]
    resumed = run(PYTHON, directory, "job=train", "run.name=copy", *shared, *moved)
    assert resumed.returncode == 0 and "resuming from runs/copy/checkpoints/step_4" in resumed.stderr
    weights = checkpoints / "step_6/draft.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    damaged = run(PYTHON, directory, *export, "serving.checkpoint=latest")
    assert "serving.checkpoint=runs/copy/checkpoints/step_4" in damaged.stderr.splitlines()[-1]
    older = run(PYTHON, directory, *export, "serving.checkpoint=runs/copy/checkpoints/step_4")
    assert older.returncode == 0, older.stderr


def test_a_directory_that_cannot_be_used_ends_with_its_setting_and_no_traceback(
    workplace: tuple[Path, list[str]],
):
    directory, overrides = workplace
    (directory / "a file").touch()
    for setting in ("run.dir", "run.cache_dir"):
        wrong = ["job=train", "topology=single", "run.name=unusable", *overrides, f"{setting}=a file/below"]
        done = run(PYTHON, directory, *wrong)
        assert done.returncode == 1 and "Traceback" not in done.stderr
        assert f"{setting} must be usable, got a file/below: Not a directory" in done.stderr.splitlines()[-1]


def test_a_plan_starts_nothing_and_names_workers_and_bytes(workplace: tuple[Path, list[str]]):
    directory, overrides = workplace
    done = run(PYTHON, directory, "job=plan", "topology=1x2", "run.name=planned", *overrides)
    assert done.returncode == 0, done.stderr
    workers = [line.split()[:2] for line in done.stdout.splitlines()[1:4]]
    assert workers == [["target0", "target"], ["trainer0", "trainer"], ["trainer1", "trainer"]]
    # Four hidden states of 32 fp32 values, and 12 bytes of row index, log-normaliser and argmax.
    assert f"{4 * 32 * 4 + 12} bytes a supervised token" in done.stdout
    weights = next((directory / "model").glob("*.safetensors")).stat().st_size
    assert f"{weights / 4e6:.1f} M parameters" in done.stdout
    assert not (directory / "runs/planned").exists()


def test_agents_with_role_names_find_each_other_in_either_order(workplace: tuple[Path, list[str]]):
    directory, overrides = workplace
    rendezvous = [
        "--nnodes=2",
        "--nproc-per-node=1",
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{free_port()}",
        "--rdzv-id=roles",
    ]
    job = ["-m", "eagle_rpc", "job=train", "train.max_steps=2", "run.name=roles", *overrides]
    agents = []
    # The trainer's agent first: it gets rank 0.
    for role in ("trainer", "target"):
        command = [sys.executable, "-m", "torch.distributed.run", *rendezvous, "--role", role, *job]
        agents.append(
            subprocess.Popen(
                command,
                cwd=directory,
                env=ENVIRONMENT,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
        )
    outputs = [agent.communicate(timeout=150)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], "\n".join(outputs)
    assert "trainer0 joined target0, trainer0" in outputs[0] and "target0 serving" in outputs[1]
    assert (directory / "runs/roles/checkpoints/step_2").is_dir()


def test_a_worker_that_never_comes_ends_the_others_with_a_reason(tmp_path: Path):
    alone = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "2",
        "ROLE_NAME": "default",
        "ROLE_RANK": "0",
        "ROLE_WORLD_SIZE": "2",
        "GROUP_WORLD_SIZE": "1",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "TORCHELASTIC_MAX_RESTARTS": "0",
        "TORCHELASTIC_RUN_ID": "alone",
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
    }
    done = subprocess.run(
        [*PYTHON, "rpc.start_timeout=4"],
        cwd=tmp_path,
        env={**ENVIRONMENT, **alone},
        capture_output=True,
        text=True,
        timeout=100,
        check=False,
    )
    assert done.returncode == 1
    assert "target0" in done.stderr and "gave up waiting for trainer0 to start, 4 of 4 s" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(660)
def test_verification_finds_every_bit_equal(tmp_path: Path):
    done = run(PYTHON, tmp_path, "job=verify", timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "runs/verify/verify.json").read_text())
    assert [(row["topology"], row["encoding"]) for row in rows] == [
        (topology, encoding)
        for topology in ("1x1", "1x2", "2x2")
        for encoding in ("probs", "logits", "hidden")
    ]
    assert all(row["rows"] > 0 and all(row["equal"].values()) for row in rows)


@contextlib.contextmanager
def started(directory: Path, *overrides: str) -> Iterator[subprocess.Popen[str]]:
    """A job in the background, ended with the body if it has not ended by then."""
    log = directory / f"{overrides[0]}.log"
    with log.open("w") as output:
        process = subprocess.Popen(
            [*PYTHON, *overrides], cwd=directory, env=ENVIRONMENT, stdout=output, stderr=output, text=True
        )
        try:
            yield process
        finally:
            process.kill()
            process.wait(10)


def status_until(
    directory: Path, registry: list[str], holds: Callable[[dict[str, Any]], bool]
) -> dict[str, Any]:
    """The first status of the service, as JSON, that `holds`."""
    looks: list[subprocess.CompletedProcess[str]] = []

    def as_expected() -> dict[str, Any] | None:
        looks.append(run(PYTHON, directory, "job=status", "job.status_json=true", *registry))
        if looks[-1].returncode == 0 and holds(seen := json.loads(looks[-1].stdout)):
            return seen
        return None

    return until(
        as_expected,
        "the service is as expected",
        seconds=150,
        seen=lambda: looks[-1].stdout + looks[-1].stderr,
    )


def test_a_service_outlives_the_trainers_of_other_directories_and_everything_ends_when_told(
    workplace: tuple[Path, list[str]], tmp_path: Path
):
    directory, overrides = workplace
    registry = [f"rpc.registry=127.0.0.1:{free_port()}", f"rpc.token_file={tmp_path}/token"]
    answers = f"regenerate.output={directory}/answers.jsonl"
    training = ["job=train", "rpc=elastic", *overrides, *registry, answers]
    with started(tmp_path, "job=registry", *registry) as directory_of_workers:
        status_until(tmp_path, registry, lambda seen: True)
        with started(tmp_path, "job=serve", *overrides, *registry) as target:
            first = run(PYTHON, tmp_path, *training, "run.name=first", "train.max_steps=3", "topology=1x1")
            assert first.returncode == 0, first.stderr
            assert "connected to target0" in first.stderr
            endless = [
                *training,
                "run.name=endless",
                "train.max_steps=1000000",
                "train.checkpoint_every=1000000",
            ]
            with started(tmp_path, *endless) as trainer:
                status_until(
                    tmp_path,
                    registry,
                    lambda seen: any((one["status"] or {}).get("step", 0) > 2 for one in seen["trainers"]),
                )
                trainer.send_signal(signal.SIGTERM)
                assert trainer.wait(60) == 0
            assert list((tmp_path / "runs/endless/checkpoints").glob("step_*")), (
                "a trainer that is told to stop keeps its steps"
            )
            status_until(
                tmp_path, registry, lambda seen: seen["trainers"] == [] and len(seen["targets"]) == 1
            )
            target.send_signal(signal.SIGINT)
            assert target.wait(60) == 0
        directory_of_workers.send_signal(signal.SIGTERM)
        assert directory_of_workers.wait(30) == 0


def test_a_service_gives_the_answers_of_the_own_engine_to_a_process_without_a_model(
    workplace: tuple[Path, list[str]], tmp_path: Path
):
    directory, overrides = workplace
    service = [f"rpc.registry=127.0.0.1:{free_port()}", f"rpc.token_file={tmp_path}/token"]
    ask = ["job=regenerate", "rpc=elastic", "regenerate.backend=service", *overrides, *service]
    with started(tmp_path, "job=serve", "rpc.host_registry=true", *overrides, *service) as target:
        status_until(tmp_path, service, lambda seen: bool(seen["targets"]))
        done = run(PYTHON, tmp_path, *ask, "run.name=asked")
        assert done.returncode == 0, done.stderr
        assert "parameters" not in done.stderr, "no model is loaded"
        own, asked = ((place / "answers.jsonl").read_text() for place in (directory, tmp_path))
        assert sorted(asked.splitlines()) == sorted(own.splitlines())
        other = run(PYTHON, tmp_path, *ask, "run.name=other", "regenerate.dtype=bfloat16")
        assert other.returncode == 1
        assert "dtype must be bfloat16, the target has float32" in other.stderr
        target.send_signal(signal.SIGTERM)
        assert target.wait(60) == 0


def test_a_service_without_a_registry_names_it_and_gives_up(tmp_path: Path):
    nowhere = [
        f"rpc.registry=127.0.0.1:{free_port()}",
        f"rpc.token_file={tmp_path}/token",
        "rpc.start_timeout=1",
    ]
    (tmp_path / "token").touch(mode=0o600)
    (tmp_path / "token").write_text("ab" * 32)
    done = run(PYTHON, tmp_path, "job=serve", "target=tiny", *nowhere)
    assert done.returncode == 1
    assert "ConnectionLost: the registry at 127.0.0.1:" in done.stderr and "Traceback" not in done.stderr

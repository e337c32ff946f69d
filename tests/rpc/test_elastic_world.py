"""torchrun's elastic world size: trainers join a run and leave it, and each sample of the epoch counts once."""

import json
import os
import signal
import sys
from collections import Counter
from pathlib import Path

import pytest
from support.elastic import Registry, Worker, serve_as_a_job, service_config
from support.processes import Command, Process, ended_at_last, free_port
from support.recording_trainer import STEPS_OF_THREE
from support.tiny_model import save_tiny_model
from support.waiting import until

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig

pytestmark = pytest.mark.rpc

NUM_CHATS = 26
PATIENCE = 240.0
PROGRAM = Path(__file__).parents[1] / "support" / "recording_trainer.py"


def write_chats(path: Path) -> None:
    chats = [
        [
            {"role": "user", "content": f"What is {number}?"},
            {"role": "assistant", "content": f"It is {number}."},
        ]
        for number in range(NUM_CHATS)
    ]
    path.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))


def agent(name: str, workers: int, port: int, overrides: list[str]) -> Command:
    """A torchrun that trains with its `workers` and those of the other agent, if there is one."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nnodes=1:2", f"--nproc-per-node={workers}"]
    meeting = [
        "--rdzv-backend=c10d",
        f"--rdzv-endpoint=127.0.0.1:{port}",
        "--rdzv-id=run",
        "--max-restarts=2",
    ]
    fast = ["--rdzv-conf=last_call_timeout=1,keep_alive_interval=1", "--local-addr=127.0.0.1"]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # With a store that starts share, torch does not tell a new agent where it is.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return Command(name, [*torchrun, *meeting, *fast, str(PROGRAM), *overrides], environment)


def trained(directory: Path) -> list[tuple[int, tuple[int, ...]]]:
    """The number of trainers and the token ids of each sequence that a trainer has learnt from."""
    lines = [line for path in directory.glob("trained-*.jsonl") for line in path.read_text().splitlines()]
    return [(size, tuple(ids)) for size, ids in map(json.loads, lines)]


def wait_in(first: Process, directory: Path, size: int) -> bool:
    """Whether one of `size` trainers waits to be told to stop."""
    assert first.alive, first.end_of_log(60)
    return (directory / f"waiting-{size}").exists()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_third_trainer_joins_two_and_leaves_again_and_each_chat_is_trained_on_once(
    registry: Registry, tmp_path: Path
):
    model = save_tiny_model(tmp_path / "model")
    write_chats(tmp_path / "chats.jsonl")
    target_config = TargetConfig(model=str(model), dtype=DType.float32, device="cpu")
    target = Worker(serve_as_a_job, "target0", service_config(registry, tmp_path, target_config))
    overrides = [
        *["job=train", "rpc=elastic", "run.name=grown", "train.resume=auto", "train.max_epochs=1"],
        *["train.max_steps=1000", "train.batch_size=1", "train.accumulation=1", "train.autocast=null"],
        *[
            "train.checkpoint_every=1000",
            "train.validate_every=0",
            "data=chats",
            "data.train_path=chats.jsonl",
        ],
        *["data.validation_share=0", "data.max_length=64", "draft.vocab_size=64", "draft.ttt_steps=2"],
        *["target=hf", f"target.model={model}", "target.dtype=float32", f"rpc.registry={registry.address}"],
        *[f"rpc.token_file={registry.token_file}", f"run.shared_dir={tmp_path}"],
    ]
    port, agents = free_port(), list[Process]()

    def start(name: str, workers: int) -> None:
        command = agent(name, workers, port, overrides)
        agents.append(command.start(log=tmp_path / f"{name}.log", directory=tmp_path))

    def until_waiting(size: int) -> None:
        until(lambda: wait_in(agents[0], tmp_path, size), f"{size} trainers train", seconds=PATIENCE)

    with ended_at_last(lambda: agents):
        start("first", 2)
        until_waiting(2)
        start("second", 1)
        until_waiting(3)
        agents[1].send(signal.SIGTERM)
        assert agents[1].ends(PATIENCE), agents[1].end_of_log(60)
        assert agents[0].ends(PATIENCE) and agents[0].poll() == 0, agents[0].end_of_log(60)
    target.end()
    found = trained(tmp_path)
    assert Counter(ids for _, ids in found) == Counter({ids: 1 for _, ids in found})
    assert len(found) == NUM_CHATS
    sizes = Counter(size for size, _ in found)
    assert sizes == {2: NUM_CHATS - 3 * STEPS_OF_THREE, 3: 3 * STEPS_OF_THREE}

"""torchrun's elastic world size: trainers join a run that trains, and each sample of the epoch counts once."""

import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.elastic import Registry, Worker, serve_target
from support.processes import Command, Process, ended_at_last, free_port
from support.recording_trainer import STEPS_OF_TWO
from support.tiny_model import save_tiny_model
from support.waiting import until

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig

pytestmark = pytest.mark.rpc

NUM_CHATS = 26
PATIENCE = 240.0
PROGRAM = Path(__file__).parents[1] / "support" / "recording_trainer.py"


@pytest.fixture
def registry(tmp_path: Path) -> Iterator[Registry]:
    made = Registry(tmp_path)
    yield made
    made.end()


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
    fast = ["--rdzv-conf=last_call_timeout=1", "--local-addr=127.0.0.1"]
    environment = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    # With a store that starts share, torch does not tell a new agent where it is.
    environment["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    return Command(name, [*torchrun, *meeting, *fast, str(PROGRAM), *overrides], environment)


def trained(directory: Path) -> list[tuple[int, tuple[int, ...]]]:
    """The number of trainers and the token ids of each sequence that a trainer has learnt from."""
    lines = [line for path in directory.glob("trained-*.jsonl") for line in path.read_text().splitlines()]
    return [(size, tuple(ids)) for size, ids in map(json.loads, lines)]


def two_train(first: Process, directory: Path) -> bool:
    assert first.alive, first.end_of_log(60)
    return len(trained(directory)) >= 2 * (STEPS_OF_TWO - 1)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_third_trainer_joins_two_from_their_checkpoint_on_and_each_chat_is_trained_on_once(
    registry: Registry, tmp_path: Path
):
    model = save_tiny_model(tmp_path / "model")
    write_chats(tmp_path / "chats.jsonl")
    target_config = TargetConfig(model=str(model), dtype=DType.float32, device="cpu")
    target = Worker(serve_target, "target0", target_config, registry.address, registry.token)
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
    with ended_at_last(lambda: agents):
        target.receive()
        agents.append(
            agent("first", 2, port, overrides).start(log=tmp_path / "first.log", directory=tmp_path)
        )
        until(lambda: two_train(agents[0], tmp_path), "two trainers train", seconds=PATIENCE)
        agents.append(
            agent("second", 1, port, overrides).start(log=tmp_path / "second.log", directory=tmp_path)
        )
        for one in agents:
            assert one.ends(PATIENCE) and one.poll() == 0, one.end_of_log(60)
    target.end()
    found = trained(tmp_path)
    sizes = Counter(size for size, _ in found)
    assert sizes[2] == 2 * STEPS_OF_TWO and sizes.keys() == {2, 3}
    # The last step of three trainers reaches into the next epoch.
    chats = Counter(ids for _, ids in found)
    surplus = sum(chats.values()) - NUM_CHATS
    assert 0 <= surplus < 3
    assert len(chats) == NUM_CHATS and sorted(chats.values(), reverse=True)[: surplus + 1][-1] == 1

"""The trainers of a host share one copy of embedding and head rows: processes of their own over real RPC."""

import hashlib
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from support.elastic import WAIT, Link, Registry, Worker, remote_target, serve_target
from support.tiny_target import TINY_LLAMA, tiny_mapping, tiny_target_config

from eagle_rpc.client.host_copies import HostCopies
from eagle_rpc.client.replica import Replica
from eagle_rpc.supervision import DraftHead

pytestmark = pytest.mark.rpc

NUM_TRAINERS = 8
CONFIG = tiny_target_config(random={**TINY_LLAMA, "hidden_size": 256})


def take_and_hold(link: Link, name: str, shared_dir: Path | None, address: str, token: bytes) -> None:
    """A trainer that takes embedding and head rows, says what it has and asked for, and leaves when told to."""
    asked = asked_of_targets()
    with remote_target(name, address, token, shared_dir=shared_dir) as backend:
        backend.open_session(tiny_mapping())
        held = {"embedding": backend.input_embeddings(), "head": backend.output_embeddings().weight}
        bits = {part: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for part, tensor in held.items()}
        link.send((bits, mapped_files(shared_dir), asked))
        link.receive()
    link.send("left")


def asked_of_targets() -> list[str]:
    """Will have the names of the calls of this process that fetch embedding and head rows."""
    asked: list[str] = []

    def counted(name: str) -> Any:
        method = getattr(Replica, name)

        def call(self: Replica) -> Any:
            asked.append(name)
            return method(self)

        return call

    for name in ("input_embeddings", "output_embeddings"):
        setattr(Replica, name, counted(name))
    return asked


def mapped_files(directory: Path | None) -> dict[str, int]:
    """The inode of each file of `directory` that this process maps, with the bytes that are its alone."""
    found: dict[str, int] = {}
    inode: str | None = None
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split()
        if "-" in words[0] and not words[0].endswith(":"):
            inside = directory is not None and len(words) > 5 and words[5].startswith(str(directory))
            inode = words[4] if inside else None
        elif inode and words[0] in ("Private_Dirty:", "Anonymous:"):
            found[inode] = found.get(inode, 0) + int(words[1]) * 1024
    return found


@pytest.fixture
def workers() -> Iterator[list[Worker]]:
    started: list[Worker] = []
    yield started
    for worker in started:
        worker.end()


@pytest.fixture
def target(registry: Registry, workers: list[Worker]) -> Worker:
    workers.append(Worker(serve_target, "target0", CONFIG, registry.address, registry.token))
    workers[0].receive()
    return workers[0]


@pytest.fixture
def start(registry: Registry, workers: list[Worker]) -> Any:
    def start_trainer(number: int, shared_dir: Path | None) -> Worker:
        name = f"trainer{number}"
        workers.append(Worker(take_and_hold, name, shared_dir, registry.address, registry.token))
        return workers[-1]

    return start_trainer


def files_in(directory: Path) -> list[Path]:
    return [path for path in directory.rglob("*") if path.is_file()]


def test_eight_trainers_map_one_copy_that_one_of_them_has_fetched(target: Worker, start: Any, tmp_path: Path):
    shared = tmp_path / "shared"
    shared.mkdir()
    own_bits, _, _ = start(NUM_TRAINERS, None).receive()
    trainers = [start(number, shared) for number in range(NUM_TRAINERS)]
    said = [trainer.receive() for trainer in trainers]
    assert [bits for bits, _, _ in said] == [own_bits] * NUM_TRAINERS
    inodes = {inode for _, files, _ in said for inode in files}
    assert len(inodes) == 2 and all(set(files) == inodes for _, files, _ in said)
    assert [sum(files.values()) for _, files, _ in said] == [0] * NUM_TRAINERS
    asked = [name for _, _, names in said for name in names]
    assert sorted(asked) == ["input_embeddings", "output_embeddings"]
    # A trainer that comes later maps the same.
    late_bits, late_files, late_asked = start(NUM_TRAINERS + 1, shared).receive()
    assert (late_bits, set(late_files), late_asked) == (own_bits, inodes, [])


def test_the_last_trainer_that_leaves_removes_the_copy(target: Worker, start: Any, tmp_path: Path):
    trainers = [start(number, tmp_path) for number in range(2)]
    for trainer in trainers:
        trainer.receive()
    (own,) = tmp_path.glob("eagle_rpc-*")
    assert len(list(own.iterdir())) == 2 and own.stat().st_mode & 0o077 == 0
    for trainer, left in zip(trainers, (2, 0), strict=True):
        trainer.send("leave")
        assert trainer.receive() == "left"
        assert len(list(own.glob("*"))) == left
    assert not own.exists()


def test_copies_of_trainers_that_were_killed_are_used_again_or_removed(
    target: Worker, start: Any, tmp_path: Path
):
    killed = start(0, tmp_path)
    bits, _, _ = killed.receive()
    os.kill(killed.process.pid, signal.SIGKILL)
    killed.process.join(WAIT)
    (own,) = tmp_path.glob("eagle_rpc-*")
    stale = own / "0123456789abcdef"
    stale.mkdir()
    (stale / "lock").touch()
    (stale / ".tensors.safetensors.new").write_bytes(b"half of it")
    heir = start(1, tmp_path)
    assert heir.receive()[0] == bits and not stale.exists()
    heir.send("leave")
    assert heir.receive() == "left"
    assert files_in(own) == []


def take_slowly(link: Link, directory: Path) -> None:
    def fetch() -> dict[str, torch.Tensor]:
        link.send("fetching")
        link.receive()
        raise AssertionError("the test kills this process")

    HostCopies(directory, patience=WAIT, stop=threading.Event()).take("it", ["key"], fetch)


def test_a_trainer_does_not_wait_beyond_its_bound_nor_for_one_that_was_killed(
    workers: list[Worker], tmp_path: Path
):
    workers.append(Worker(take_slowly, tmp_path))
    assert workers[0].receive() == "fetching"
    mine = {"weight": torch.arange(6.0)}
    impatient = HostCopies(tmp_path, patience=0.1, stop=threading.Event())
    assert impatient.take("it", ["key"], lambda: mine) is mine
    os.kill(workers[0].process.pid, signal.SIGKILL)
    patient = HostCopies(tmp_path, patience=WAIT, stop=threading.Event())
    shared = patient.take("it", ["key"], lambda: mine)["weight"]
    assert shared is not mine["weight"] and torch.equal(shared, mine["weight"])
    patient.release()
    assert files_in(tmp_path) == [] and torch.equal(shared, mine["weight"])


def test_a_head_with_all_its_fields_goes_into_a_copy_and_back(tmp_path: Path):
    head = DraftHead(weight=torch.randn(3, 4), bias=torch.randn(3), scale=0.1, soft_cap=1 / 3)
    copies = HostCopies(tmp_path, patience=WAIT, stop=threading.Event())
    back = DraftHead.of_tensors(copies.take("the head", ["head"], head.to_tensors))
    copies.release()
    assert (back.scale, back.soft_cap) == (head.scale, head.soft_cap)
    assert torch.equal(back.weight, head.weight) and torch.equal(back.bias, head.bias)


def test_where_the_directory_is_not_the_users_alone_each_trainer_has_its_own(
    target: Worker, start: Any, tmp_path: Path
):
    (tmp_path / f"eagle_rpc-{os.getuid()}").mkdir(mode=0o755)
    _, files, asked = start(0, tmp_path).receive()
    assert len(asked) == 2 and files == {} and files_in(tmp_path / f"eagle_rpc-{os.getuid()}") == []

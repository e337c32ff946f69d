"""Prompts that the targets of a service answer over real RPC, while targets are killed and drain."""

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from support.elastic import (
    Link,
    Registry,
    Worker,
    client_settings,
    joined,
    remote_target,
    serve_tiny_target,
)
from support.tiny_target import VOCAB_SIZE, tensors_of, tiny_batch, tiny_mapping, tiny_target_config
from support.waiting import until

from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.client.answering import AnsweringTargets
from eagle_rpc.supervision import AnswerPrompt, AnswerSettings, TargetExpectation
from eagle_rpc.target.model import HFEagle3TargetModel

pytestmark = pytest.mark.rpc

NUM_PROMPTS = 60
MAX_NEW_TOKENS = 24
SECONDS = 60.0


def prompts() -> list[list[int]]:
    draw = torch.Generator().manual_seed(1)
    lengths = torch.randint(1, 30, (NUM_PROMPTS,), generator=draw).tolist()
    return [torch.randint(0, VOCAB_SIZE, (length,), generator=draw).tolist() for length in lengths]


@pytest.fixture(scope="module")
def own_engine() -> tuple[int, dict[str, Any]]:
    """A stop token, and the answers with it of an engine in this process."""
    model = HFEagle3TargetModel.load(tiny_target_config(), "cpu", cache_dir="unused", seed=0).model
    free = _answers(model, ())
    stop = free["0"][0][MAX_NEW_TOKENS // 2]
    expected = _answers(model, (stop,))
    assert {truncated for _, truncated in expected.values()} == {True, False}
    return stop, expected


def _answers(model: Any, stop: tuple[int, ...]) -> dict[str, Any]:
    engine = AnswerEngine(model, batch_size=8, max_new_tokens=MAX_NEW_TOKENS, stop_token_ids=stop)
    for number, ids in enumerate(prompts()):
        engine.submit(str(number), ids)
    return {answer.key: (answer.said_ids, answer.truncated) for answer in engine.answers()}


@pytest.fixture
def start(registry: Registry) -> Iterator[Any]:
    workers: list[Worker] = []

    def start_one(function: Any, *args: Any) -> Worker:
        workers.append(Worker(function, *args, registry.address, registry.token))
        return workers[-1]

    yield start_one
    for worker in workers:
        worker.end()


def ask_all(link: Link, name: str, stop: int, num_targets: int, address: str, token: bytes) -> None:
    """Asks once so many targets serve. Sends each answer when the test asks for it, with the client's view of its
    targets; then None.
    """
    settings = AnswerSettings(max_new_tokens=MAX_NEW_TOKENS, max_length=60, stop_token_ids=(stop,))
    with joined(name, "trainer", address, token) as membership:
        targets = AnsweringTargets(
            membership,
            settings=client_settings(name, prefetch=8),
            expected=TargetExpectation(),
            stop=threading.Event(),
        )
        with contextlib.closing(targets):
            until(
                lambda: [one["state"] for one in targets.status()["targets"]] == ["serving"] * num_targets,
                f"{num_targets} targets serve",
                seconds=SECONDS,
            )
            for number, ids in enumerate(prompts()):
                targets.submit(AnswerPrompt(key=str(number), token_ids=torch.tensor(ids), settings=settings))
            for prompt, answer in targets.answers():
                link.receive()
                link.send((prompt.key, answer.token_ids.tolist(), answer.truncated, targets.status()))
            link.receive()
            link.send(None)


def receive_answers(asker: Worker, count: int) -> list[Any]:
    answers = []
    for _ in range(count):
        asker.send("next")
        answers.append(asker.receive())
    return answers


def check_all(asker: Worker, before: list[Any], expected: dict[str, Any]) -> dict[str, Any]:
    """All prompts are answered, each once, as by the own engine. Returns the last view of the targets."""
    answers = before + receive_answers(asker, NUM_PROMPTS - len(before))
    assert {key: (ids, truncated) for key, ids, truncated, _ in answers} == expected
    assert len(answers) == len(expected)
    assert receive_answers(asker, 1) == [None]
    return answers[-1][-1]


def two_targets_under_way(start: Any, stop: Any) -> tuple[Worker, Worker, list[Any]]:
    """The first of two targets, who asks both, and the first answers."""
    targets = [start(serve_tiny_target, f"target{number}") for number in range(2)]
    for target in targets:
        target.receive()
    asker = start(ask_all, "asker0", stop, 2)
    return targets[0], asker, receive_answers(asker, 6)


def test_two_targets_give_the_answers_of_the_own_engine_and_one_may_be_killed(start: Any, own_engine: Any):
    stop, expected = own_engine
    first, asker, before = two_targets_under_way(start, stop)
    # A target that is stopped keeps the requests that it is given.
    os.kill(first.process.pid, signal.SIGSTOP)
    while not any(one["outstanding"] for one in before[-1][-1]["targets"] if one["name"] == "target0"):
        before += receive_answers(asker, 1)
    first.process.kill()
    status = check_all(asker, before, expected)
    assert [one["name"] for one in status["targets"]] == ["target1"]
    assert status["failovers"] > 0


def test_a_target_that_drains_hands_its_prompts_to_the_other_one(start: Any, own_engine: Any):
    stop, expected = own_engine
    first, asker, before = two_targets_under_way(start, stop)
    first.send("drain")
    check_all(asker, before, expected)
    assert first.receive() == "drained"


def test_a_sole_target_that_returns_answers_the_rest(start: Any, own_engine: Any):
    stop, expected = own_engine
    target = start(serve_tiny_target, "target0")
    target.receive()
    asker = start(ask_all, "asker0", stop, 1)
    before = receive_answers(asker, 6)
    target.process.kill()
    start(serve_tiny_target, "target0").receive()
    check_all(asker, before, expected)


def stream_all(link: Link, name: str, address: str, token: bytes) -> None:
    with remote_target(name, address, token) as backend:
        backend.open_session(tiny_mapping())
        for batch in backend.stream(tiny_batch(seed) for seed in range(1000)):
            if link.receive() == "end":
                return
            link.send({key: tensor.tolist() for key, tensor in tensors_of(batch).items()})


def test_supervision_has_the_same_bits_beside_answers(start: Any, own_engine: Any):
    stop, expected = own_engine
    start(serve_tiny_target, "target0").receive()
    trainer = start(stream_all, "trainer0")
    alone = receive_answers(trainer, 8)
    again = start(stream_all, "trainer1")
    asker = start(ask_all, "asker0", stop, 1)
    before, beside = [], []
    for _ in range(8):
        before += receive_answers(asker, 2)
        beside += receive_answers(again, 1)
    assert beside == alone
    check_all(asker, before, expected)

"""Prompts that all targets answer, seen from the process that asks."""

import contextlib
import threading
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest
import torch
from fake_membership import SETTINGS, FakeMembership, FakeTarget
from support.tiny_target import tiny_target_config
from support.waiting import until

from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.answers.service import ServiceAnswerer
from eagle_rpc.client import ClientSettings
from eagle_rpc.client.answering import AnsweringTargets
from eagle_rpc.errors import InvalidRequest, TargetFailed, TargetUnavailable, UnsupportedTarget
from eagle_rpc.rpc.envelope import Failure
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import AnswerPrompt, AnswerSettings, TargetExpectation
from eagle_rpc.target.model import HFEagle3TargetModel

ASKED = AnswerSettings(max_new_tokens=6, max_length=30, stop_token_ids=(4,))
PROMPTS = [list(range(1, 2 + number % 20)) for number in range(25)]

soon = partial(until, seconds=20.0)


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    model = HFEagle3TargetModel.load(tiny_target_config(), "cpu", cache_dir="unused", seed=0).model
    engine = AnswerEngine(model, batch_size=8, max_new_tokens=6, stop_token_ids=(4,))
    for number, ids in enumerate(PROMPTS):
        engine.submit(str(number), ids)
    return {answer.key: answer for answer in engine.answers()}


@pytest.fixture
def targets_of() -> Iterator[Callable[..., AnsweringTargets]]:
    with contextlib.ExitStack() as stack:

        def connect(*targets: FakeTarget, stop: Any = None, **changes: Any) -> AnsweringTargets:
            made = AnsweringTargets(
                FakeMembership(*targets),
                settings=ClientSettings(**{**SETTINGS, **changes}),
                expected=TargetExpectation(),
                stop=stop or threading.Event(),
            )
            return stack.enter_context(contextlib.closing(made))

        yield connect


def asked(targets: AnsweringTargets) -> ServiceAnswerer:
    """All prompts are submitted."""
    answerer = ServiceAnswerer(targets, ASKED)
    for number, ids in enumerate(PROMPTS):
        answerer.submit(str(number), ids)
    return answerer


def check(answerer: ServiceAnswerer, expected: dict[str, Any]) -> None:
    answers = list(answerer.answers())
    assert {answer.key: answer for answer in answers} == expected
    assert len(answers) == len(expected), "each once"
    assert answerer.num_generated == sum(len(answer.said_ids) for answer in answers)


def until_both_serve(targets: AnsweringTargets) -> None:
    soon(
        lambda: [one["state"] for one in targets.status()["targets"]] == ["serving", "serving"],
        "both targets serve",
    )


def test_all_targets_answer_and_the_ids_are_those_of_the_own_engine(
    targets_of: Any, server: TargetModelServer, expected: dict[str, Any]
):
    both = FakeTarget("target0", server), FakeTarget("target1", server)
    counts = {target.name: 0 for target in both}
    for target in both:
        target.refuse = lambda method, name=target.name: counts.update(
            {name: counts[name] + (method == "answer")}
        )
    targets = targets_of(*both)
    until_both_serve(targets)
    check(asked(targets), expected)
    assert sum(counts.values()) == len(PROMPTS) and min(counts.values()) >= SETTINGS["prefetch"]


def test_prompts_may_be_submitted_while_answers_come(
    targets_of: Any, server: TargetModelServer, expected: dict[str, Any]
):
    answerer = ServiceAnswerer(targets_of(FakeTarget("target0", server)), ASKED)
    answerer.submit("0", PROMPTS[0])
    found = {}
    for answer in answerer.answers():
        found[answer.key] = answer
        if len(found) < len(PROMPTS):
            answerer.submit(str(len(found)), PROMPTS[len(found)])
    assert found == expected


def test_a_silent_target_that_answers_late_doubles_no_answer(
    targets_of: Any, server: TargetModelServer, expected: dict[str, Any]
):
    silent, other = FakeTarget("target0", server), FakeTarget("target1", server)
    targets = targets_of(silent, other, heartbeat_misses=4)
    until_both_serve(targets)
    answerer = asked(targets)
    answers = answerer.answers()
    found = [next(answers)]
    silent.hold()
    found += [next(answers) for _ in range(len(PROMPTS) // 2)]
    silent.release()
    found += answers
    assert len(found) == len(expected) and {answer.key: answer for answer in found} == expected


@pytest.mark.parametrize("code", ["draining", "failed", "out_of_memory", "expired", "unknown_session"])
def test_a_prompt_that_one_target_does_not_answer_is_asked_at_another(
    targets_of: Any, server: TargetModelServer, expected: dict[str, Any], code: str
):
    ill, other = FakeTarget("target0", server), FakeTarget("target1", server)
    targets = targets_of(ill, other)
    until_both_serve(targets)
    ill.refuse = lambda method: Failure(code, "not now") if method == "answer" else None
    check(asked(targets), expected)


def test_a_busy_target_is_asked_again_when_it_says(
    targets_of: Any, server: TargetModelServer, expected: dict[str, Any]
):
    target, refusals = FakeTarget("target0", server), iter([Failure("busy", "full", 0.01)] * 10)
    target.refuse = lambda method: next(refusals, None) if method == "answer" else None
    check(asked(targets_of(target)), expected)


def test_refusals_that_no_other_target_would_change_are_raised(targets_of: Any, server: TargetModelServer):
    targets = targets_of(FakeTarget("target0", server))
    targets.submit(AnswerPrompt(key="long", token_ids=torch.zeros(60, dtype=torch.int64), settings=ASKED))
    with pytest.raises(InvalidRequest, match="target0: token_ids must have shape"):
        list(targets.answers())


def test_a_prompt_that_fails_everywhere_is_an_error(targets_of: Any, server: TargetModelServer):
    target = FakeTarget("target0", server)
    target.refuse = lambda method: Failure("failed", "always") if method == "answer" else None
    with pytest.raises(TargetFailed, match="always"):
        list(asked(targets_of(target)).answers())


def test_targets_that_answer_no_prompts_are_refused_at_the_start(targets_of: Any):
    target = HFEagle3TargetModel.load(tiny_target_config(), "cpu", cache_dir="unused", seed=0)
    mute = TargetModelServer(target, tiny_target_config())
    with contextlib.closing(mute), pytest.raises(UnsupportedTarget, match="answers no prompts"):
        targets_of(FakeTarget("target0", mute))


def test_answers_end_when_told_to_stop_or_when_no_target_comes_back(
    targets_of: Any, server: TargetModelServer
):
    stop = threading.Event()
    answers = asked(targets_of(FakeTarget("target0", server), stop=stop)).answers()
    next(answers)
    stop.set()
    with pytest.raises(TargetUnavailable, match=r"told to stop while [0-9]+ prompts"):
        list(answers)
    lost = FakeTarget("target0", server)
    answers = asked(targets_of(lost, reconnect_deadline=1.0)).answers()
    next(answers)
    lost.die()
    with pytest.raises(TargetUnavailable, match=r"rpc\.reconnect_deadline"):
        list(answers)

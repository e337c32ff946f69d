"""Prompts that a target answers between its forward passes."""

import dataclasses
import threading

import pytest
import torch
from answer_calls import SETTINGS, ScriptedAnswering, prompt, said
from server_calls import SELECTED, WAIT, ask, error_of, open_session, send, try_to_open
from support.families import tiny_model

from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.errors import (
    RequestExpired,
    TargetBusy,
    TargetDraining,
    TargetFailed,
    TargetOutOfMemory,
    UnknownSession,
    UnsupportedTarget,
)
from eagle_rpc.jobs.answering import EngineAnswering
from eagle_rpc.supervision import SessionSpec
from eagle_rpc.target.model import HFEagle3TargetModel


def greedy_answers(model, prompts, stop):
    engine = AnswerEngine(model, batch_size=4, max_new_tokens=8, stop_token_ids=stop)
    for number, ids in enumerate(prompts):
        engine.submit(str(number), ids)
    return {answer.key: (answer.said_ids, answer.truncated) for answer in engine.answers()}


def test_answers_equal_those_of_the_own_engine_while_supervision_flows(any_model, serve_answers):
    draw = torch.Generator().manual_seed(0)
    prompts = [torch.randint(3, 97, (n,), generator=draw).tolist() for n in (1, 9, 4, 20, 3, 3, 7)]
    stop = (greedy_answers(any_model, prompts, ())["1"][0][4],)
    expected = greedy_answers(any_model, prompts, stop)
    assert {truncated for _, truncated in expected.values()} == {True, False}
    server = serve_answers(EngineAnswering(any_model), HFEagle3TargetModel(any_model), max_answers=8)
    asking, training = open_session(server, answers=True, encoding="logits"), open_session(server)
    before = ask(server, training)
    futures = [prompt(server, asking, ids, stop_token_ids=stop) for ids in prompts]
    during = [send(server, training) for _ in range(4)]
    for number, future in enumerate(futures):
        answer = future.result(WAIT)
        assert (answer.token_ids.tolist(), answer.truncated) == expected[str(number)]
    for future in during:
        assert future.result(WAIT).values.equal(before.values)


def test_sampled_answers_depend_on_seed_and_key_alone(model, serve_answers):
    server = serve_answers(EngineAnswering(model))
    session = open_session(server, answers=True)
    sampled = {"temperature": 2.0, "stop_token_ids": ()}
    first = [said(prompt(server, session, key="a", **sampled)) for _ in range(2)]
    assert first[0] == first[1]
    assert said(prompt(server, session, key="b", **sampled)) != first[0]
    assert said(prompt(server, session, key="a", seed=1, **sampled)) != first[0]


def test_a_session_for_answers_gets_their_credits_and_is_counted(serve_answers, answering):
    server = serve_answers(answering, max_answers=7)
    opened = try_to_open(server, answers=True)
    assert opened.credits == 7
    assert said(prompt(server, opened.id, (5, 9))) == [9, 9, 9]
    assert server.drain(WAIT)
    status = server.status()
    assert (status["answer_tokens"], status["prompts_waiting"], status["prompts_running"]) == (3, 0, 0)
    assert status["requests"] == {"ok": 1} and status["sessions"][0]["tokens"] == 3


def test_a_target_without_an_engine_says_so_when_it_is_asked_and_serves_on(serve, model):
    server = serve(HFEagle3TargetModel(model))
    error = error_of(server.open_session, SessionSpec(selected_token_ids=SELECTED, answers=True))
    assert isinstance(error, UnsupportedTarget) and "answers no prompts" in str(error)
    session = open_session(server)
    assert isinstance(error_of(prompt, server, session), UnsupportedTarget)
    ask(server, session)


def test_a_model_that_the_engine_cannot_decode_is_refused_with_the_reason(serve_answers):
    server = serve_answers(EngineAnswering(tiny_model("bloom")))
    spec = SessionSpec(selected_token_ids=SELECTED, answers=True)
    for _ in range(2):
        error = error_of(server.open_session, spec)
        assert isinstance(error, UnsupportedTarget) and "BloomForCausalLM" in str(error)
    ask(server, open_session(server))


def test_a_supervision_request_waits_for_one_slice_only(model, serve_answers, clock):
    answering = ScriptedAnswering(clock, repeats=5)
    order = []
    server = serve_answers(answering)
    session = open_session(server, encoding="logits")
    answering.opened.clear()
    answer = prompt(server, session)
    assert answering.started.wait(WAIT)
    supervision = [send(server, session) for _ in range(3)]
    for future in (answer, *supervision):
        future.add_done_callback(lambda done: (order.append(done), answering.log.append("done")))
    answering.opened.set()
    said(answer)
    # A slice is one step here: each pass comes between two steps.
    assert order == [*supervision, answer]
    steps = answering.log[answering.log.index("step") :]
    assert steps == ["step", "done"] * 3 + ["step", "step", "done"]


def test_prompts_of_other_settings_wait_for_the_decoder_and_runs_take_turns(serve_answers, answering):
    server = serve_answers(answering, max_answers=4, max_answer_tokens=80)
    one, other = (open_session(server, run=run, encoding="logits") for run in "ab")
    answering.opened.clear()
    first = prompt(server, one, key="a0")
    assert answering.started.wait(WAIT)
    futures = [prompt(server, one, key="a1"), prompt(server, one, key="a2")]
    futures += [prompt(server, other, key="b0", seed=1), prompt(server, other, key="b1")]
    answering.opened.set()
    for future in (first, *futures):
        said(future)
    assert server.drain(WAIT)
    log = [entry for entry in answering.log if entry != "step"]
    changed = dataclasses.replace(SETTINGS, seed=1)
    # Two rows of 40 tokens fit into 80.
    assert log == [(SETTINGS, 2), "a0", "a1", (changed, 2), "b0", (SETTINGS, 2), "a2", "b1"]


def test_rows_are_as_many_as_their_tokens_allow(serve_answers, answering):
    server = serve_answers(answering, max_answers=3, max_answer_tokens=60)
    session = open_session(server, encoding="logits")
    for max_length, rows in ((40, 1), (30, 2), (10, 3)):
        said(prompt(server, session, (5,), max_length=max_length))
        settings = dataclasses.replace(SETTINGS, max_length=max_length)
        assert [entry for entry in answering.log if isinstance(entry, tuple)][-1] == (settings, rows)


def test_a_full_desk_refuses_and_says_when_to_ask_again(serve_answers, answering):
    server = serve_answers(answering, max_answers=2, max_answer_tokens=40)
    answering.opened.clear()
    one, other = (open_session(server, run="a", encoding="logits") for _ in range(2))
    futures = [prompt(server, one)]
    assert answering.started.wait(WAIT)
    futures += [prompt(server, one)]
    busy = error_of(prompt, server, one)
    assert isinstance(busy, TargetBusy) and "target.max_answers" in str(busy) and busy.retry_after > 0
    futures += [prompt(server, other)]
    assert isinstance(error_of(prompt, server, other), TargetBusy)
    answering.opened.set()
    for future in futures:
        said(future)
    assert server.throughput.requests == {"ok": 3, "busy": 2}


def test_prompts_are_cancelled_expire_and_end_with_their_session_at_any_time(serve_answers, answering, clock):
    server = serve_answers(answering, max_answer_tokens=120)
    answering.opened.clear()
    running = {}
    for why in ("cancelled", "expired", "closed"):
        session = open_session(server, run=why, encoding="logits")
        late = 5.0 if why == "expired" else WAIT
        running[why] = (
            session,
            [prompt(server, session, request_id=str(n), seconds_left=late) for n in range(2)],
        )
        assert answering.started.wait(WAIT)
    assert server.cancel(running["cancelled"][0], ["0", "1", "2"]) == 2
    clock.now += 6.0
    server.expire()
    server.disconnect(running["closed"][0])
    for why, error in (
        ("cancelled", RequestExpired),
        ("expired", RequestExpired),
        ("closed", UnknownSession),
    ):
        for future in running[why][1]:
            assert isinstance(future.exception(WAIT), error), why
    answering.opened.set()
    assert said(prompt(server, running["cancelled"][0], (5, 9))) == [9, 9, 9]


def test_a_draining_target_finishes_answers_that_it_has_begun_and_hands_the_others_back(
    serve_answers, answering
):
    server = serve_answers(answering, max_answers=2, max_answer_tokens=40)
    session = open_session(server, encoding="logits")
    answering.opened.clear()
    begun = prompt(server, session)
    assert answering.started.wait(WAIT)
    waiting = prompt(server, session)
    drained = threading.Thread(target=server.drain, args=(WAIT,))
    drained.start()
    assert isinstance(waiting.exception(WAIT), TargetDraining)
    assert not begun.done() and isinstance(error_of(prompt, server, session), TargetDraining)
    answering.opened.set()
    drained.join(WAIT)
    assert said(begun) == [7, 7, 7]


def test_answers_that_outlast_the_drain_are_handed_back_when_the_server_is_closed(serve_answers, answering):
    server = serve_answers(answering)
    session = open_session(server, encoding="logits")
    answering.opened.clear()
    begun = prompt(server, session)
    assert answering.started.wait(WAIT)
    assert not server.drain(0.01)
    closing = threading.Thread(target=server.close)
    closing.start()
    assert isinstance(begun.exception(WAIT), TargetDraining)
    answering.opened.set()
    closing.join(WAIT)


@pytest.mark.parametrize(
    ("fault", "error"),
    [
        (RuntimeError("broken"), TargetFailed),
        (torch.OutOfMemoryError("no room"), TargetOutOfMemory),
        (UnsupportedTarget("sinks"), UnsupportedTarget),
    ],
)
def test_a_step_that_fails_ends_its_answers_and_the_target_serves_on(serve_answers, answering, fault, error):
    server = serve_answers(answering)
    session = open_session(server, encoding="logits")
    answering.fault = fault
    assert isinstance(error_of(prompt, server, session), error)
    answering.fault = None
    assert said(prompt(server, session, (5, 9))) == [9, 9, 9]
    ask(server, session)


def test_a_prompt_that_is_sent_again_takes_the_place_of_one_that_waits(serve_answers, answering):
    server = serve_answers(answering, max_answer_tokens=40)
    session = open_session(server, encoding="logits")
    answering.opened.clear()
    running = prompt(server, session, request_id="x")
    assert answering.started.wait(WAIT)
    waiting = prompt(server, session, request_id="x")
    again = prompt(server, session, (5, 9), request_id="x")
    assert isinstance(waiting.exception(WAIT), RequestExpired)
    answering.opened.set()
    assert (said(running), said(again)) == ([7, 7, 7], [9, 9, 9])

"""Prompts that a target answers between its forward passes."""

import dataclasses
import math
import threading

import pytest
import torch
from server_calls import SELECTED, WAIT, ask, config, error_of, open_session, send, try_to_open

from eagle_rpc.answers.engine import AnswerEngine
from eagle_rpc.errors import (
    InvalidRequest,
    RequestExpired,
    StaleIncarnation,
    TargetBusy,
    TargetDraining,
    TargetFailed,
    TargetOutOfMemory,
    UnknownSession,
    UnsupportedTarget,
)
from eagle_rpc.jobs.answering import EngineAnswering
from eagle_rpc.service.answering import SLICE_SECONDS, Decoded
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import AnswerPrompt, AnswerRequest, AnswerSettings, PromptAnswer, SessionSpec
from eagle_rpc.target.model import HFEagle3TargetModel

SETTINGS = AnswerSettings(max_new_tokens=8, max_length=40, stop_token_ids=(2,))


class ScriptedAnswering:
    """Says the last token of a prompt `repeats` times, one a step; a test may hold its steps."""

    def __init__(self, clock=None, *, repeats=3):
        self.clock, self.repeats = clock, repeats
        self.log = []
        self.dropped = []
        self.fault = None
        self.started, self.opened = threading.Event(), threading.Event()
        self.opened.set()

    def check(self):
        if self.fault is not None:
            raise self.fault

    def decoder(self, settings, num_rows):
        self.log.append((settings, num_rows))
        return ScriptedDecoder(self)


class ScriptedDecoder:
    def __init__(self, owner):
        self.owner, self.left, self.ids = owner, {}, {}

    def submit(self, key, token_ids, *, draws):
        assert key not in self.left
        self.left[key], self.ids[key] = self.owner.repeats, token_ids[-1]
        self.owner.log.append(draws)

    def step(self):
        self.owner.started.set()
        assert self.owner.opened.wait(WAIT)
        self.owner.check()
        if self.owner.clock is not None:
            self.owner.clock.now += SLICE_SECONDS
        self.owner.log.append("step")
        self.left = {key: left - 1 for key, left in self.left.items()}
        done = [key for key, left in self.left.items() if left == 0]
        for key in done:
            del self.left[key]
        return [Decoded(key, [self.ids[key]] * self.owner.repeats, True) for key in done]

    def drop(self, keys):
        self.owner.dropped += keys
        for key in keys:
            self.left.pop(key, None)


@pytest.fixture
def answering():
    made = ScriptedAnswering()
    yield made
    made.opened.set()


@pytest.fixture
def serve_answers(model, clock):
    servers = []

    def start(answering, target=None, **changes):
        target = target or HFEagle3TargetModel(model)
        servers.append(TargetModelServer(target, config(**changes), answering=answering, clock=clock))
        return servers[-1]

    yield start
    for server in servers:
        assert server.close()


_ids = iter(range(10**9))


def prompt_request(
    server, session, ids=(5, 6, 7), *, request_id=None, seconds_left=WAIT, key="a", **settings
):
    return AnswerRequest(
        session=session,
        incarnation=server.model_info().incarnation,
        request_id=request_id or f"p{next(_ids)}",
        prompt=AnswerPrompt(
            key=key, token_ids=torch.tensor(ids), settings=dataclasses.replace(SETTINGS, **settings)
        ),
        seconds_left=seconds_left,
    )


def prompt(server, session, *args, **fields):
    """The future of an answer."""
    return server.answer(prompt_request(server, session, *args, **fields))


def said(future):
    return future.result(WAIT).token_ids.tolist()


def greedy_answers(model, prompts, stop):
    engine = AnswerEngine(model, batch_size=4, max_new_tokens=8, stop_token_ids=stop)
    for number, ids in enumerate(prompts):
        engine.submit(str(number), ids)
    return {answer.key: (answer.said_ids, answer.truncated) for answer in engine.answers()}


def test_answers_equal_those_of_the_own_engine_while_supervision_flows(any_model, serve_answers):
    prompts = [torch.randint(3, 97, (length,)).tolist() for length in (1, 9, 4, 20, 3, 3, 7)]
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
    assert server.num_requests == {"ok": 3, "busy": 2}


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


HOSTILE = {
    "max_length": [0, 1, 65, 2**70, True, None, "40", 8.0],
    "max_new_tokens": [0, -1, 40, True, None, 8.0],
    "top_k": [-1, 98, True, None],
    "seed": [2**63, 1.0, None],
    "temperature": [-0.1, math.inf, math.nan, "1", None, True],
    "top_p": [0, -1, 1.1, math.nan, None],
    "stop_token_ids": [[2], None, (97,), (-1,), (2.0,), ((2,),), (True,), tuple(range(65))],
}


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, all_ in HOSTILE.items() for value in all_]
)
def test_settings_that_break_their_rule_are_refused_by_name(serve_answers, answering, name, value):
    server = serve_answers(answering)
    session = open_session(server, encoding="logits")
    error = error_of(prompt, server, session, **{name: value})
    assert isinstance(error, InvalidRequest) and str(error).startswith(name), error


@pytest.mark.parametrize(
    "ids",
    [
        torch.zeros(0, dtype=torch.int64),
        torch.zeros(33, dtype=torch.int64),
        torch.zeros(1, 3, dtype=torch.int64),
        torch.zeros((), dtype=torch.int64),
        torch.tensor([1.0]),
        torch.tensor([-1]),
        torch.tensor([97]),
        torch.eye(3, dtype=torch.int64).to_sparse(),
        torch.zeros(3, dtype=torch.int64, device="meta"),
        [5, 6],
        None,
    ],
    ids=str,
)
def test_prompts_that_are_no_ids_of_the_target_are_refused(serve_answers, answering, ids):
    server = serve_answers(answering)
    request = prompt_request(server, open_session(server, encoding="logits"))
    request.prompt = dataclasses.replace(request.prompt, token_ids=ids)
    error = error_of(server.answer, request)
    assert isinstance(error, InvalidRequest) and str(error).startswith("token_ids"), error


def test_requests_of_other_shapes_are_refused_and_counted(serve_answers, answering):
    server = serve_answers(answering)
    session = open_session(server, encoding="logits")
    good = prompt_request(server, session)
    changed = [
        ({"request_id": "x" * 200}, InvalidRequest),
        ({"incarnation": "another"}, StaleIncarnation),
        ({"incarnation": 7}, InvalidRequest),
        ({"session": "nobody"}, UnknownSession),
        ({"session": ["nobody"]}, UnknownSession),
        ({"prompt": [1, 2]}, InvalidRequest),
        ({"prompt": dataclasses.replace(good.prompt, key="two\nlines")}, InvalidRequest),
        ({"prompt": dataclasses.replace(good.prompt, settings={})}, InvalidRequest),
        ({"seconds_left": -1}, InvalidRequest),
    ]
    for fields, error in changed:
        assert isinstance(error_of(server.answer, dataclasses.replace(good, **fields)), error), fields
    for value in (None, 7, "request", good.prompt):
        assert isinstance(error_of(server.answer, value), InvalidRequest)
    assert sum(server.num_requests.values()) == len(changed) + 4
    assert isinstance(server.answer(good).result(WAIT), PromptAnswer)


def test_the_stored_prompt_is_no_view_of_a_larger_message(serve_answers, answering):
    server = serve_answers(answering, max_answers=1)
    session = open_session(server, encoding="logits")
    answering.opened.clear()
    large = torch.full((10_000,), 5)
    request = prompt_request(server, session)
    request.prompt = dataclasses.replace(request.prompt, token_ids=large[:3])
    answer = server.answer(request)
    assert answering.started.wait(WAIT)
    (work,) = server._answers._running.values()
    assert work.request.token_ids.untyped_storage().nbytes() == 3 * 8
    answering.opened.set()
    assert said(answer) == [5, 5, 5]

"""A stage behind the first one, without transport: what it answers, to whom, and when it gives up."""

import threading

import pytest
import torch
from server_calls import error_of, open_session, request
from support.tiny_target import TINY_LLAMA, tiny_batch, tiny_mapping, tiny_target_config

from eagle_rpc.errors import (
    ConnectionLost,
    RequestExpired,
    StaleIncarnation,
    TargetDraining,
    TargetFailed,
    TargetOutOfMemory,
)
from eagle_rpc.service.stage_server import StageServer
from eagle_rpc.supervision import StagePass
from eagle_rpc.target.model import HFEagle3TargetModel

SECONDS = 60.0
CHAIN, NEXT = "a" * 32, "b" * 32


class Call:
    """A call to the next stage that has ended."""

    def __init__(self, error):
        self._error = error

    def when_done(self, callback):
        callback()

    def result(self):
        if self._error is not None:
            raise self._error


class NextStage:
    """The link to the next stage."""

    def __init__(self):
        self.taken, self.error = [], None

    def call(self, method, chain, number, hidden, *, what, timeout):
        assert method == "take"
        self.taken.append((chain, number, hidden))
        return Call(self.error)


def stage(number, count):
    return HFEagle3TargetModel.load(tiny_target_config(), "cpu", cache_dir="unused", stage=(number, count))


@pytest.fixture
def behind():
    return NextStage()


@pytest.fixture
def server(behind, clock):
    """The second of three stages, in a chain."""
    made = StageServer(
        stage(1, 3),
        tiny_target_config(),
        incarnation="1" * 32,
        connect_next=lambda incarnation: behind,
        pass_seconds=SECONDS,
        clock=clock,
    )
    made.join_chain(CHAIN, ["1" * 32, NEXT]).result(SECONDS)
    yield made
    made.close()


def pass_of(tokens, *, chain=CHAIN, number=0, seconds=SECONDS):
    return StagePass(
        chain=chain,
        number=number,
        tokens=tokens,
        encoding="hidden",
        rows="loss_mask",
        selected_token_ids=tiny_mapping().selected_token_ids,
        seconds_left=seconds,
    )


def hidden_of(tokens):
    return torch.randn(*tokens.shape, TINY_LLAMA["hidden_size"], generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("hidden_first", [False, True])
def test_a_stage_answers_with_its_captured_states_and_hands_its_hidden_states_on(
    server, behind, hidden_first
):
    tokens = tiny_batch(0)
    if hidden_first:
        server.take(CHAIN, 0, [hidden_of(tokens)])
    answer = server.begin(pass_of(tokens))
    if not hidden_first:
        server.take(CHAIN, 0, [hidden_of(tokens)])
    share = answer.result(SECONDS)
    assert share.aux.shape == (int(tokens.attention_mask.sum()), TINY_LLAMA["hidden_size"])
    assert share.values is None
    ((chain, number, (handed_on,)),) = behind.taken
    assert (chain, number, handed_on.shape) == (CHAIN, 0, (*tokens.shape, TINY_LLAMA["hidden_size"]))


def test_passes_of_another_chain_are_refused(server):
    with pytest.raises(StaleIncarnation, match="chain cccccccc, this stage belongs to aaaaaaaa"):
        server.begin(pass_of(tiny_batch(0), chain="c" * 32))
    with pytest.raises(StaleIncarnation):
        server.take("c" * 32, 0, [])


def test_a_new_chain_ends_the_passes_of_the_old_one(server):
    waiting = server.begin(pass_of(tiny_batch(0)))
    server.join_chain("d" * 32, ["1" * 32, NEXT]).result(SECONDS)
    with pytest.raises(TargetDraining, match="joins another chain"):
        waiting.result(SECONDS)
    assert server.beat().chain == "d" * 32


def test_a_pass_in_which_a_stage_before_failed_is_handed_on_as_failed(server, behind):
    answer = server.begin(pass_of(tiny_batch(0)))
    server.take(CHAIN, 0, None)
    with pytest.raises(TargetFailed, match="a stage before this one has failed"):
        answer.result(SECONDS)
    assert behind.taken == [(CHAIN, 0, None)]


def test_a_next_stage_that_cannot_be_reached_is_told_as_a_lost_target(server, behind):
    behind.error = ConnectionLost("target0.2 is gone")
    tokens = tiny_batch(0)
    answer = server.begin(pass_of(tokens))
    server.take(CHAIN, 0, [hidden_of(tokens)])
    with pytest.raises(TargetDraining, match=r"next stage cannot be reached: target0\.2 is gone"):
        answer.result(SECONDS)


def test_hidden_states_that_do_not_come_end_the_request_at_its_deadline(server, clock):
    late = server.begin(pass_of(tiny_batch(0), seconds=5.0))
    clock.now += 6.0
    with pytest.raises(RequestExpired, match="did not come in time"):
        late.result(SECONDS)
    assert server.is_idle


def test_too_little_memory_ends_one_pass_and_not_the_stage(server, behind, monkeypatch):
    tokens, run = tiny_batch(0), HFEagle3TargetModel.run_stage
    full = threading.Event()
    full.set()

    def short(self, *arguments):
        if full.is_set():
            full.clear()
            raise torch.OutOfMemoryError("full")
        return run(self, *arguments)

    monkeypatch.setattr(HFEagle3TargetModel, "run_stage", short)
    answers = []
    for number in range(2):
        answers.append(server.begin(pass_of(tokens, number=number)))
        server.take(CHAIN, number, [hidden_of(tokens)])
    with pytest.raises(TargetOutOfMemory):
        answers[0].result(SECONDS)
    assert answers[1].result(SECONDS).aux is not None
    assert [hidden is None for _, _, hidden in behind.taken] == [True, False]


def test_a_stage_that_is_told_to_end_says_so_in_its_next_heartbeat(server):
    assert not server.beat().draining
    server.draining = True
    assert server.beat().draining and server.status()["draining"]


def test_a_server_that_is_paused_hands_requests_back_until_it_is_resumed(serve, model):
    server = serve(HFEagle3TargetModel(model))
    session = open_session(server)
    server.pause("target0.1 is gone")
    refused = error_of(server.generate, request(server, session))
    assert str(refused) == "the target takes no requests for now: target0.1 is gone"
    assert isinstance(refused, TargetDraining)
    assert server.heartbeat(session).draining and server.status()["paused"] == "target0.1 is gone"
    server.resume()
    assert server.generate(request(server, session)).result(SECONDS).num_bytes > 0
    assert not server.heartbeat(session).draining

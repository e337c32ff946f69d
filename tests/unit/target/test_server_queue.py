"""The server while its forward thread is busy, or fails."""

import threading

import pytest
import torch
from server_calls import SELECTED, WAIT, ask, open_session, tokens_of

from eagle_rpc.supervision import GenerateRequest, Ok, SessionSpec
from eagle_rpc.target.model import HFEagle3TargetModel


class GatedTarget:
    """Waits in its forward until told, so that requests queue up; may raise instead of answering."""

    def __init__(self, target):
        self._target = target
        self.started, self.opened = threading.Event(), threading.Event()
        self.raises = None
        self.num_forwards = 0

    def generate_batch(self, *args, **packing):
        self.num_forwards += 1
        self.started.set()
        assert self.opened.wait(WAIT)
        if self.raises is not None:
            raise self.raises
        return self._target.generate_batch(*args, **packing)

    def __getattr__(self, name):
        return getattr(self._target, name)


@pytest.fixture
def gated(model):
    return GatedTarget(HFEagle3TargetModel(model))


def request(session, seconds_left=WAIT):
    return GenerateRequest(session=session, request_id="r", tokens=tokens_of(), seconds_left=seconds_left)


def test_a_full_queue_is_busy_and_expired_requests_are_not_run(serve, gated):
    server = serve(gated, max_queued_requests=2)
    session = open_session(server)
    first = server.generate(request(session))
    assert gated.started.wait(WAIT)
    expired, last = server.generate(request(session, 1e-9)), server.generate(request(session))
    assert server.generate(request(session)).wait().code == "busy"
    gated.opened.set()
    assert isinstance(first.wait(), Ok)
    assert expired.wait().code == "expired"
    assert isinstance(last.wait(), Ok)
    assert gated.num_forwards == 2


def test_drain_finishes_what_waits_and_refuses_the_rest(serve, gated):
    server = serve(gated)
    session = open_session(server)
    waiting = [server.generate(request(session)) for _ in range(3)]
    assert server.drain(1e-9) == Ok(False)
    assert server.generate(request(session)).wait().code == "draining"
    assert server.open_session(SessionSpec(selected_token_ids=SELECTED)).code == "draining"
    gated.opened.set()
    assert server.drain(WAIT) == Ok(True)
    assert all(isinstance(future.wait(), Ok) for future in waiting)


def test_disconnect_drops_what_waits_of_that_session_only(serve, gated):
    server = serve(gated)
    leaving, staying = open_session(server), open_session(server)
    running = server.generate(request(leaving))
    assert gated.started.wait(WAIT)
    dropped, kept = server.generate(request(leaving)), server.generate(request(staying))
    server.disconnect(leaving)
    assert dropped.wait().code == "unknown_session"
    gated.opened.set()
    assert isinstance(running.wait(), Ok)
    assert isinstance(kept.wait(), Ok)


@pytest.mark.parametrize(
    ("error", "code"), [(torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"), (ValueError("shapes"), "failed")]
)
def test_a_failing_forward_costs_one_request(serve, gated, error, code):
    server = serve(gated)
    session = open_session(server)
    gated.opened.set()
    gated.raises = error
    assert ask(server, session).code == code
    gated.raises = None
    assert isinstance(ask(server, session), Ok)
    assert server.stats().value[code] == 1

"""A target from its first reply to its last, with RPC replaced by a record of its calls."""

import threading

import pytest
from server_calls import WAIT, error_of, open_session, send

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConnectionLost, NameTaken, TargetFailed, TargetLost
from eagle_rpc.service import lifecycle
from eagle_rpc.service.lifecycle import TargetLifecycle
from eagle_rpc.target.model import HFEagle3TargetModel

CONFIG = RpcConfig(drain_timeout=WAIT, heartbeat_interval=1.0, heartbeat_misses=5)


@pytest.fixture
def server(serve, model):
    return serve(HFEagle3TargetModel(model))


@pytest.fixture
def calls(monkeypatch, server):
    """The steps of the life, in their order."""
    made = []
    monkeypatch.setattr(lifecycle, "host", lambda *_: made.append("host"))
    monkeypatch.setattr(lifecycle, "withdraw", lambda: made.append("withdraw"))
    for step in ("drain", "wait_sent", "close"):
        method = getattr(server, step)
        monkeypatch.setattr(server, step, lambda *args, s=step, m=method: made.append(s) or m(*args))
    return made


def life(server, **fields):
    return TargetLifecycle(server=server, config=CONFIG, **{"stop": threading.Event(), **fields})


def test_a_stopped_target_drains_once_waits_for_its_replies_and_closes(server, calls):
    stop = threading.Event()

    def told_to_stop():
        calls.append("serving")
        stop.set()

    life(server, stop=stop, when_serving=told_to_stop, when_stopped=lambda: calls.append("leaving")).run()
    assert calls == [*("host", "serving", "leaving", "drain", "wait_sent", "withdraw", "close")]


def test_a_static_target_ends_with_its_trainers_and_tells_nobody_that_it_leaves(server, calls):
    life(server, trainers_done=lambda: True, when_stopped=lambda: calls.append("leaving")).run()
    assert calls == ["host", "drain", "wait_sent", "withdraw", "close"]


def test_a_stopped_static_target_stays_until_its_trainers_are_done(server, calls):
    stop = threading.Event()
    stop.set()
    session = open_session(server)
    looks = iter([False, False, True])

    def done():
        calls.append("look")
        if "drain" in calls:
            assert error_of(send, server, session).code == "draining"
            assert server.heartbeat(session).draining
        return next(looks)

    life(server, stop=stop, trainers_done=done).run()
    assert calls == [*("host", "look", "drain", "look", "look", "wait_sent", "withdraw", "close")]


def test_a_stopped_static_target_does_not_wait_for_silent_trainers(server, calls, clock):
    stop = threading.Event()
    stop.set()
    open_session(server)
    clock.now += 5.0
    life(server, stop=stop, trainers_done=lambda: False).run()
    assert calls[-1] == "close"


def test_a_target_that_can_run_no_further_pass_ends_with_the_reason(serve, model, monkeypatch):
    class Lost(HFEagle3TargetModel):
        def generate_batch(self, *args, **settings):
            raise TargetLost("the engine is dead")

    monkeypatch.setattr(lifecycle, "host", lambda *_: None)
    monkeypatch.setattr(lifecycle, "withdraw", lambda: None)
    server = serve(Lost(model))
    session = open_session(server)
    assert error_of(send, server, session).code == "failed"
    with pytest.raises(TargetFailed, match=r"the engine is dead: start this target again"):
        life(server).run()


def test_an_unused_target_ends_after_its_last_session(server, calls, clock):
    first, second = open_session(server), open_session(server)
    server.disconnect(first)
    clock.now += 9.0
    assert server.sessions.seconds_unused == 0.0
    server.disconnect(second)
    clock.now += 9.0
    assert server.sessions.seconds_unused == 9.0
    life(server, unused_after=9.0).run()
    assert calls[-1] == "close"


def test_a_target_that_was_never_used_goes_on(server, clock):
    clock.now += 1000.0
    assert server.sessions.seconds_unused == 0.0


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"superseded": lambda: True}, NameTaken, "another process serves"),
        ({"reachable": lambda: False}, ConnectionLost, "no longer listens"),
        (
            {"trainers_done": lambda: False, "unused_after": 9.0},
            ConnectionLost,
            r"no trainer has had a session for 9 s \(target.session_lease\)",
        ),
    ],
)
def test_an_error_ends_a_target_after_it_has_drained(server, calls, clock, fields, error, message):
    server.disconnect(open_session(server))
    clock.now += 9.0
    with pytest.raises(error, match=message):
        life(server, **fields).run()
    assert calls == ["host", "drain", "wait_sent", "withdraw", "close"]

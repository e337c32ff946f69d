"""Sessions whose trainers fall silent."""

import threading
import weakref

import pytest
import torch
from server_calls import SELECTED, WAIT, ask, config, error_of, open_session, send, try_to_open

from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.target.model import HFEagle3TargetModel

LEASE = 60.0


@pytest.fixture
def server(serve, gated):
    return serve(gated, session_lease=LEASE)


def later(server, clock, seconds):
    clock.now += seconds
    server.expire()


def test_a_silent_session_is_closed_and_its_mapping_released(server, clock):
    session = open_session(server)
    mapping = mapping_of(server, session)
    later(server, clock, LEASE - 0.1)
    assert server.status()["sessions"][0]["lease_left"] == pytest.approx(0.1)
    later(server, clock, 0.2)
    assert server.status()["sessions"] == []
    assert mapping() is None
    assert error_of(server.heartbeat, session).code == "unknown_session"


@pytest.mark.parametrize("sign", ["heartbeat", "request", "cancel", "head"])
def test_any_sign_of_life_renews_the_lease(server, gated, clock, sign):
    gated.opened.set()
    alive, silent = open_session(server), open_session(server)
    for _ in range(3):
        later(server, clock, LEASE / 2)
        {
            "heartbeat": lambda: server.heartbeat(alive),
            "request": lambda: ask(server, alive),
            "cancel": lambda: server.cancel(alive, []),
            "head": lambda: server.output_embeddings(alive),
        }[sign]()
    assert [session["id"] for session in server.status()["sessions"]] == [alive[:8]]
    assert error_of(server.heartbeat, silent).code == "unknown_session"


def test_what_a_silent_session_queued_is_dropped_and_what_runs_is_finished(server, gated, clock):
    silent, alive = open_session(server), open_session(server)
    running = send(server, silent, seconds_left=1000)
    assert gated.started.wait(WAIT)
    dropped, kept = send(server, silent, seconds_left=1000), send(server, alive, seconds_left=1000)
    clock.now += LEASE / 2
    server.heartbeat(alive)
    later(server, clock, LEASE / 2)
    assert dropped.exception(WAIT).code == "unknown_session"
    assert "fell silent" in str(dropped.exception(WAIT))
    gated.opened.set()
    assert running.result(WAIT)
    assert kept.result(WAIT)
    assert len(gated.forwards) == 2


def test_a_place_comes_free_when_a_session_ends(serve, model, clock):
    server = serve(HFEagle3TargetModel(model), max_sessions=2, session_lease=LEASE)
    for _ in range(2):
        open_session(server)
    assert error_of(try_to_open, server).code == "busy"
    later(server, clock, LEASE)
    assert try_to_open(server)


def mapping_of(server, session):
    """A weak reference to what the target looks its draft vocabulary up in."""
    return weakref.ref(server.sessions.renew(session).vocab.draft_ids)


def test_equal_mappings_are_held_once_and_as_long_as_they_are_used(server):
    first = open_session(server, encoding="logits")
    second = open_session(server, encoding="probs", selected_token_ids=SELECTED.flip(0))
    other = open_session(server, encoding="logits", selected_token_ids=torch.tensor([8, 9]))
    mapping = mapping_of(server, first)
    assert mapping_of(server, second)() is mapping()
    assert mapping_of(server, other)() is not mapping()
    server.disconnect(first)
    assert mapping() is not None
    server.disconnect(second)
    assert mapping() is None


def test_the_server_looks_after_its_leases_by_itself(model):
    server, gone = (
        TargetModelServer(HFEagle3TargetModel(model), config(session_lease=0.05)),
        threading.Event(),
    )
    server.sessions.close_silent = noticed(server.sessions.close_silent, gone)
    session = open_session(server)
    assert gone.wait(WAIT)
    assert error_of(server.heartbeat, session).code == "unknown_session"
    assert server.close()


def noticed(close_silent, gone):
    def close():
        closed = close_silent()
        if closed:
            gone.set()
        return closed

    return close


def test_closing_ends_every_thread_of_the_server(model):
    before = set(threading.enumerate())
    server = TargetModelServer(HFEagle3TargetModel(model), config())
    assert {thread.name for thread in set(threading.enumerate()) - before} == {"forward", "expiry"}
    assert server.close()
    assert set(threading.enumerate()) <= before

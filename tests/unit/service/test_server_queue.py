"""The server while its forward thread is busy, or fails."""

import pytest
import torch
from server_calls import SELECTED, WAIT, ask, error_of, open_session, send, tokens_of, try_to_open

from eagle_rpc.supervision import SessionSpec
from eagle_rpc.target.model import HFEagle3TargetModel


def starting_with(token):
    """A batch that a gated target's list of forwards shows as `token`."""
    tokens = tokens_of()
    tokens.input_ids[0, 0] = token
    return tokens


def occupy(server, gated, session):
    """Keeps the forward thread busy until the gate opens."""
    future = send(server, session)
    assert gated.started.wait(WAIT)
    gated.forwards.clear()
    return future


def test_a_full_queue_is_busy_and_expired_requests_are_not_run(serve, gated, clock):
    server = serve(gated, max_queued_requests=2)
    session = open_session(server)
    first = occupy(server, gated, session)
    expired, last = send(server, session, seconds_left=1.0), send(server, session)
    refused = error_of(send, server, session)
    assert refused.code == "busy"
    assert 0.01 <= refused.retry_after <= 1.0
    clock.now += 2.0
    gated.opened.set()
    assert first.result(WAIT)
    assert expired.exception(WAIT).code == "expired"
    assert last.result(WAIT)
    assert len(gated.forwards) == 1


def test_a_session_that_used_its_credits_is_busy_and_others_are_not(serve, gated):
    server = serve(gated, max_queued_per_session=2)
    greedy, other = open_session(server), open_session(server)
    occupy(server, gated, greedy)
    assert not send(server, greedy).done()
    assert error_of(send, server, greedy).code == "busy"
    assert not send(server, other).done()


def test_a_flood_of_one_run_does_not_hold_up_another(serve, gated):
    server = serve(gated)
    flood = [open_session(server, run="flood") for _ in range(4)]
    modest = open_session(server, run="modest")
    occupy(server, gated, flood[0])
    for number in range(20):
        send(server, flood[number % 4], starting_with(3))
    for _ in range(3):
        send(server, modest, starting_with(4))
    gated.opened.set()
    assert server.drain(WAIT)
    assert gated.forwards[:6] == [3, 4, 3, 4, 3, 4]


def test_sessions_of_one_run_take_turns(serve, gated):
    server = serve(gated)
    first, second = open_session(server, run="shared"), open_session(server, run="shared")
    occupy(server, gated, first)
    for session, token in ((first, 3), (first, 4), (first, 5), (second, 6)):
        send(server, session, starting_with(token))
    gated.opened.set()
    assert server.drain(WAIT)
    assert gated.forwards == [3, 6, 4, 5]


def test_a_refused_run_finds_room_though_the_flood_goes_on(serve, gated):
    server = serve(gated, max_queued_requests=4)
    flood, modest = open_session(server, run="flood"), open_session(server, run="modest")
    occupy(server, gated, flood)
    asked = [send(server, flood, starting_with(3), request_id=f"flood {number}") for number in range(4)]
    assert error_of(send, server, modest, starting_with(4)).code == "busy"
    server.cancel(flood, ["flood 2", "flood 3"])
    assert error_of(send, server, flood, starting_with(3)).code == "busy", (
        "half of the queue is the other job's"
    )
    admitted = [send(server, modest, starting_with(4)) for _ in range(2)]
    gated.opened.set()
    assert all(future.result(WAIT) for future in (*asked[:2], *admitted))
    assert gated.forwards == [3, 4, 3, 4]


def test_cancelled_and_repeated_requests_run_once_or_not_at_all(serve, gated):
    server = serve(gated)
    session, stranger = open_session(server), open_session(server)
    occupy(server, gated, session)
    cancelled = send(server, session, request_id="cancelled")
    first, second = (send(server, session, starting_with(token), request_id="repeated") for token in (3, 4))
    assert first.exception(WAIT).code == "expired"
    assert server.cancel(stranger, ["cancelled"]) == 0
    assert server.cancel(session, ["cancelled", "unheard of"]) == 1
    assert cancelled.exception(WAIT).code == "expired"
    gated.opened.set()
    assert second.result(WAIT)
    assert gated.forwards == [4]
    assert server.cancel(session, ["repeated"]) == 0


def test_drain_finishes_what_waits_and_refuses_the_rest(serve, gated):
    server = serve(gated)
    session = open_session(server)
    waiting = [send(server, session) for _ in range(3)]
    assert not server.drain(1e-9)
    assert error_of(send, server, session).code == "draining"
    for encoding in ("hidden", "logits"):
        assert error_of(try_to_open, server, encoding=encoding).code == "draining"
    gated.opened.set()
    assert server.drain(WAIT)
    assert all(future.result(WAIT) for future in waiting)


def test_disconnect_drops_what_waits_of_that_session_only(serve, gated):
    server = serve(gated)
    leaving, staying = open_session(server), open_session(server)
    running = occupy(server, gated, leaving)
    dropped, kept = send(server, leaving), send(server, staying)
    server.disconnect(leaving)
    assert dropped.exception(WAIT).code == "unknown_session"
    gated.opened.set()
    assert running.result(WAIT)
    assert kept.result(WAIT)


def test_the_head_is_probed_once_a_mapping_by_the_forward_thread_and_before_requests(serve, gated):
    server = serve(gated)
    session = open_session(server, encoding="logits")
    occupy(server, gated, session)
    waiting = send(server, session)
    opening = [server.open_session(SessionSpec(selected_token_ids=SELECTED)) for _ in range(3)]
    assert not any(future.done() for future in opening), "a probe is a forward pass and waits for its turn"
    waiting.add_done_callback(lambda _: gated.probes.append("request"))
    gated.opened.set()
    assert len({future.result(WAIT).id for future in opening}) == 3
    waiting.result(WAIT)
    open_session(server)
    assert gated.probes == ["forward", "request"]


def test_control_calls_answer_while_the_forward_thread_is_busy(serve, gated):
    server = serve(gated)
    session = open_session(server)
    occupy(server, gated, session)
    server.model_info(), server.status(), server.input_embeddings(), server.heartbeat(session)
    assert server.cancel(session, []) == 0
    server.output_embeddings(session)
    try_to_open(server)
    try_to_open(server, encoding="logits", selected_token_ids=torch.tensor([7, 8]))
    server.disconnect(session)


@pytest.mark.parametrize(
    ("error", "code"),
    [(torch.OutOfMemoryError("CUDA out of memory"), "out_of_memory"), (ValueError("shapes"), "failed")],
)
def test_a_failing_forward_costs_one_request(serve, gated, error, code):
    server = serve(gated)
    session = open_session(server)
    gated.opened.set()
    gated.raises = error
    assert error_of(send, server, session).code == code
    gated.raises = None
    assert ask(server, session)
    assert server.status()["requests"] == {code: 1, "ok": 1}


def test_a_request_keeps_no_more_than_its_tokens(serve, model, monkeypatch):
    kept = []
    monkeypatch.setattr(
        "eagle_rpc.service.forward_pass.run_target", lambda target, tokens: kept.append(tokens)
    )
    server = serve(HFEagle3TargetModel(model))
    tokens = tokens_of()
    tokens.input_ids = torch.zeros(10**6, dtype=torch.int64)[:18].view(2, 9)
    error_of(send, server, open_session(server), tokens)
    assert kept[0].input_ids.untyped_storage().nbytes() == 18 * 8

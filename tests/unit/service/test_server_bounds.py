"""What the server holds for others: promised and unsent replies, and copies of the head."""

import pytest
import torch
from server_calls import SELECTED, WAIT, ask, error_of, open_session, send, tokens_of

from eagle_rpc.target.model import HFEagle3TargetModel


def bytes_of_reply(server, session, tokens):
    return ask(server, session, tokens).num_bytes


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("encoding", ["probs", "logits", "hidden"])
def test_a_promise_is_what_the_reply_takes_when_every_row_is_supervised(serve, gated, encoding, packed):
    server = serve(gated)
    session = open_session(server, encoding=encoding, rows="loss_mask")
    future = send(server, session, tokens_of(packed=packed))
    assert gated.started.wait(WAIT)
    promised = server.status()["reply_bytes_held"]
    gated.opened.set()
    assert future.result(WAIT).num_bytes == promised


def test_rows_that_are_not_supervised_make_a_reply_smaller_than_its_promise(serve, gated):
    server = serve(gated)
    session = open_session(server, rows="position_mask")
    future = send(server, session)
    assert gated.started.wait(WAIT)
    promised = server.status()["reply_bytes_held"]
    gated.opened.set()
    reply = future.result(WAIT)
    assert 0 < reply.num_bytes < promised
    assert server.status()["reply_bytes_held"] == reply.num_bytes


def test_a_reply_counts_until_its_receiver_lets_go_of_it(serve, model):
    server = serve(HFEagle3TargetModel(model))
    session = open_session(server)
    reply = ask(server, session)
    assert (
        server.status()["reply_bytes_held"]
        == server.status()["sessions"][0]["reply_bytes_held"]
        == reply.num_bytes
    )
    assert not server.wait_sent(0.01)
    del reply
    assert server.wait_sent(WAIT)
    assert server.status()["reply_bytes_held"] == server.status()["sessions"][0]["reply_bytes_held"] == 0


def test_unsent_replies_make_a_session_wait_and_others_not(serve, model):
    tokens = tokens_of()
    probe = serve(HFEagle3TargetModel(model))
    num_bytes = bytes_of_reply(probe, open_session(probe, rows="loss_mask"), tokens)
    server = serve(
        HFEagle3TargetModel(model), max_reply_bytes_per_session=2 * num_bytes, max_reply_bytes=3 * num_bytes
    )
    first, second = (open_session(server, rows="loss_mask") for _ in range(2))
    unsent = [ask(server, first, tokens) for _ in range(2)]
    refused = error_of(send, server, first, tokens)
    assert (refused.code, 0.01 <= refused.retry_after <= 1.0) == ("busy", True)
    assert "target.max_reply_bytes_per_session" in str(refused)
    unsent.append(ask(server, second, tokens))
    refused = error_of(send, server, second, tokens)
    assert refused.code == "busy"
    assert "target.max_reply_bytes is" in str(refused)
    unsent.clear()
    assert server.wait_sent(WAIT)
    assert ask(server, second, tokens)


def test_bytes_that_wait_are_promised_and_given_back_whatever_becomes_of_them(serve, gated, clock):
    server = serve(gated)
    session, leaving = open_session(server), open_session(server)
    running = send(server, session)
    assert gated.started.wait(WAIT)
    alone = server.status()["reply_bytes_held"]
    send(server, session, request_id="cancelled")
    send(server, session, request_id="repeated")
    send(server, session, request_id="repeated")
    send(server, session, seconds_left=1.0, request_id="late")
    send(server, leaving)
    assert server.status()["reply_bytes_held"] == 5 * alone
    server.cancel(session, ["cancelled"])
    server.disconnect(leaving)
    clock.now += 2.0
    server.expire()
    assert server.status()["reply_bytes_held"] == 2 * alone
    gated.raises = RuntimeError("no")
    gated.opened.set()
    assert server.drain(WAIT)
    assert running.exception(WAIT).code == "failed"
    assert server.status()["reply_bytes_held"] == 0


def test_a_request_that_can_never_fit_is_refused_with_its_size(serve, model):
    server = serve(HFEagle3TargetModel(model), max_reply_bytes_per_session=100)
    refused = error_of(send, server, open_session(server))
    assert refused.code == "invalid_request"
    assert "the reply would need" in str(refused)
    assert "target.max_reply_bytes_per_session is 100" in str(refused)


def test_bytes_of_a_session_that_ended_count_until_they_are_sent(serve, model):
    server = serve(HFEagle3TargetModel(model))
    session = open_session(server)
    reply = ask(server, session)
    server.disconnect(session)
    assert server.status()["reply_bytes_held"] == reply.num_bytes
    del reply
    assert server.wait_sent(WAIT)


def test_embeddings_are_one_tensor_for_everybody(serve, model):
    server = serve(HFEagle3TargetModel(model))
    first, second = (server.input_embeddings() for _ in range(2))
    assert first.data_ptr() == second.data_ptr() == model.get_input_embeddings().weight.data_ptr()
    assert server.status()["reply_bytes_held"] == 0


def test_trainers_of_one_mapping_share_a_copy_of_the_head_which_is_dropped_when_nobody_asks(
    serve, model, clock
):
    server = serve(HFEagle3TargetModel(model))
    sessions = [open_session(server) for _ in range(20)]
    heads = [server.output_embeddings(session) for session in sessions]
    assert len({head.weight.data_ptr() for head in heads}) == 1
    head_bytes = len(SELECTED) * 32 * 4
    assert server.status()["reply_bytes_held"] == head_bytes
    for session in sessions:
        server.disconnect(session)
    clock.now += 3.0
    server.expire()
    assert server.status()["reply_bytes_held"] == head_bytes, "the receivers have it still"
    heads.clear()
    assert server.status()["reply_bytes_held"] == 0


def test_copies_of_different_heads_are_bounded_as_replies_are(serve, model, clock):
    server = serve(HFEagle3TargetModel(model), max_reply_bytes=5000, max_reply_bytes_per_session=4000)
    mappings = [torch.arange(number, number + 15) for number in range(5)]
    sessions = [open_session(server, selected_token_ids=ids) for ids in mappings]
    heads = [server.output_embeddings(session) for session in sessions[:2]]
    assert [error_of(server.output_embeddings, session).code for session in sessions[2:]] == ["busy"] * 3
    heads.clear()
    clock.now += 3.0
    server.expire()
    assert server.output_embeddings(sessions[4])

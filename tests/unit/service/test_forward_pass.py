"""Requests that run together, and those that do not."""

import pytest
import torch
from server_calls import WAIT, ask, open_session, send, status, tokens_of

from eagle_rpc.supervision import Ok, decode_supervision, unwrap
from eagle_rpc.target.model import HFEagle3TargetModel

# Products of other shapes add up in another order.
ROUNDING = {"rtol": 1e-4, "atol": 1e-5}


def plain(reply, tokens, head):
    """What a trainer reads in a reply, dense."""
    batch = decode_supervision(unwrap(reply, sender="target0"), tokens, head)
    return {"aux": batch.aux_hidden_states, "probs": batch.target_probs, "mask": batch.position_mask}


def passes_of(server, sends):
    """Passes that `sends` take, all of which wait for the first of them, and their replies."""
    before = status(server)["passes"]
    futures = [one() for one in sends]
    server._target.opened.set()
    replies = [future.wait() for future in futures]
    assert server.drain(WAIT) == Ok(True)
    return status(server)["passes"] - before, replies


def lengths(*sizes):
    return [tokens_of(batch=1, length=length, seed=seed) for seed, length in enumerate(sizes)]


def held_up(server, gated, session):
    """The future of a request that keeps the forward thread busy."""
    future = send(server, session, tokens_of(batch=1, length=4, seed=99))
    assert gated.started.wait(WAIT)
    return future


@pytest.mark.parametrize("encoding", ["hidden", "logits", "probs"])
@pytest.mark.parametrize("packed", [False, True])
def test_what_ran_together_is_what_it_is_alone_to_rounding(serve, gated, encoding, packed):
    server = serve(gated)
    own = open_session(server, encoding=encoding)
    shares = [open_session(server, encoding=encoding, share_forward=True) for _ in range(3)]
    head = unwrap(server.output_embeddings(own), sender="target0") if encoding == "hidden" else None
    batches = [
        tokens_of(batch=batch, length=length, seed=batch, packed=packed)
        for batch, length in ((2, 9), (1, 8), (3, 9))
    ]
    held_up(server, gated, own)
    sends = [lambda s=s, t=t: send(server, s, t) for s, t in zip(shares, batches, strict=True)]
    alone = serve(HFEagle3TargetModel(gated.model))
    session = open_session(alone, encoding=encoding)
    num_passes, replies = passes_of(server, sends)
    assert num_passes == 2  # the one that held them up, and theirs
    for tokens, reply in zip(batches, replies, strict=True):
        expected = plain(ask(alone, session, tokens), tokens, head)
        for name, tensor in plain(reply, tokens, head).items():
            torch.testing.assert_close(tensor, expected[name], **ROUNDING)


def test_a_session_that_does_not_allow_it_runs_alone_and_keeps_its_bits(serve, gated):
    server = serve(gated)
    own, shared = open_session(server), open_session(server, share_forward=True)
    batches = lengths(9, 9, 9)
    held_up(server, gated, own)
    num_passes, replies = passes_of(
        server,
        [lambda s=s, t=t: send(server, s, t) for s, t in zip((shared, own, shared), batches, strict=True)],
    )
    assert num_passes == 3  # one holds up, two share, one is alone
    alone = serve(HFEagle3TargetModel(gated.model))
    expected = ask(alone, open_session(alone), batches[1]).value
    for name in ("aux", "supervised_rows", "values", "log_normalizer", "argmax"):
        assert torch.equal(getattr(replies[1].value, name), getattr(expected, name))


@pytest.mark.parametrize(
    ("sizes", "num_passes", "why"),
    [
        ((12, 12), 1, "24 tokens fit"),
        ((9, 9, 9), 2, "27 do not"),
        ((4, 10), 2, "20 for 14 is too much padding"),
        ((12, 13), 2, "26 exceed the limit"),
        ((10, 12), 1, "24 for 22 do not"),
    ],
)
def test_company_is_bounded_in_tokens_and_in_padding(serve, gated, sizes, num_passes, why):
    server = serve(gated, max_shared_tokens=24)
    shared, own = open_session(server, share_forward=True), open_session(server)
    held_up(server, gated, own)
    taken, _ = passes_of(server, [lambda t=t: send(server, shared, t) for t in lengths(*sizes)])
    assert taken - 1 == num_passes, why


def test_packed_and_unpacked_requests_do_not_mix(serve, gated):
    server = serve(gated)
    shared, own = open_session(server, share_forward=True), open_session(server)
    held_up(server, gated, own)
    batches = [tokens_of(batch=1, packed=True), tokens_of(batch=1)]
    taken, replies = passes_of(server, [lambda t=t: send(server, shared, t) for t in batches])
    assert taken - 1 == 2
    assert all(isinstance(reply, Ok) for reply in replies)


def test_a_pass_that_fails_in_company_leaves_each_to_its_own_fate(serve, gated):
    server = serve(gated)
    shared, own = open_session(server, share_forward=True), open_session(server)
    first = held_up(server, gated, own)
    run, sizes = gated._target.generate_batch, []

    def too_much_for_two(input_ids, *args, **packing):
        sizes.append(len(input_ids))
        if len(input_ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return run(input_ids, *args, **packing)

    gated._target.generate_batch = too_much_for_two
    _, replies = passes_of(server, [lambda t=t: send(server, shared, t) for t in lengths(9, 9, 9)])
    assert sizes == [1, 3, 1, 1, 1]
    assert all(isinstance(reply, Ok) for reply in (first.wait(), *replies))


def test_late_requests_do_not_join(serve, gated, clock):
    server = serve(gated)
    shared, own = open_session(server, share_forward=True), open_session(server)
    held_up(server, gated, own)
    sends = [
        lambda t=t, s=s: send(server, shared, t, seconds_left=s)
        for t, s in zip(lengths(9, 9), (5.0, 50.0), strict=True)
    ]
    futures = [one() for one in sends]
    clock.now += 10.0
    gated.opened.set()
    assert futures[0].wait().code == "expired"
    assert isinstance(futures[1].wait(), Ok)

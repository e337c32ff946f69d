"""What one run may use of a target, whoever else asks."""

import pytest
from answer_calls import prompt
from server_calls import WAIT, ask, error_of, open_session, request, send, tokens_of, try_to_open

from eagle_rpc.config.sections.target import QuotaConfig
from eagle_rpc.errors import InvalidRequest, TargetBusy
from eagle_rpc.service.quotas import Quotas
from eagle_rpc.target.model import HFEagle3TargetModel


def test_the_quota_that_names_a_run_comes_before_that_of_every_run():
    quotas = Quotas([QuotaConfig(run="mine", requests=3), QuotaConfig(sessions=2)])
    assert [(one.requests, one.sessions) for one in map(quotas.of, ("mine", "other"))] == [
        (3, None),
        (None, 2),
    ]
    assert Quotas().of("mine") == QuotaConfig()


def test_refusals_are_counted_for_runs_that_are_here_and_forgotten_with_them():
    quotas = Quotas([QuotaConfig(requests=1)])
    for run in ("a", "a", "b"):
        assert isinstance(quotas.refusal(run, "wait"), TargetBusy)
    assert quotas.refused(["a", "c"]) == {"a": 2, "c": 0}
    assert quotas.refused(["a", "b"]) == {"a": 2, "b": 0}


def test_sessions_of_a_run_are_bounded_and_other_runs_get_theirs(serve, model):
    server = serve(HFEagle3TargetModel(model), quotas=[QuotaConfig(run="large", sessions=2)])
    first, _ = (open_session(server, run="large") for _ in range(2))
    refusal = error_of(try_to_open, server, run="large")
    assert isinstance(refusal, TargetBusy) and refusal.retry_after is not None
    assert str(refusal) == "run 'large' must hold at most 2 sessions (target.quotas)"
    for _ in range(3):
        open_session(server, run="small")
    server.disconnect(first)
    open_session(server, run="large")


def test_requests_of_a_run_are_bounded_over_its_sessions_running_ones_included(serve, gated):
    server = serve(gated, quotas=[QuotaConfig(run="large", requests=2)])
    opened = [try_to_open(server, run="large") for _ in range(2)]
    assert [one.credits for one in opened] == [2, 2]
    first, second = (one.id for one in opened)
    other = open_session(server, run="small")
    running = send(server, first)
    assert gated.started.wait(WAIT)
    waiting = send(server, second, request_id="again")
    refusal = error_of(server.generate, request(server, first))
    assert isinstance(refusal, TargetBusy) and refusal.retry_after is not None
    assert str(refusal) == "run 'large' must have at most 2 requests under way (target.quotas)"
    # A request that is sent again takes the place of the one that waits.
    again = send(server, second, request_id="again")
    answered = [send(server, other) for _ in range(4)]
    large, small = server.status()["runs"]
    assert (large["run"], large["queued"], large["max_requests"], large["refused"]) == ("large", 1, 2, 1)
    assert (small["run"], small["queued"], small["max_requests"], small["refused"]) == ("small", 4, None, 0)
    gated.opened.set()
    for future in (running, again, *answered):
        future.result(WAIT)
    assert waiting.exception(WAIT) is not None
    ask(server, first)


def test_replies_of_a_run_are_bounded_by_its_share_of_the_memory(serve, model):
    tokens = tokens_of()
    probe = serve(HFEagle3TargetModel(model))
    num_bytes = ask(probe, open_session(probe, rows="loss_mask"), tokens).num_bytes
    # A quarter is one reply, two do not fit.
    quotas = [QuotaConfig(run="large", reply_share=0.375)]
    sizes = {"max_reply_bytes": 4 * num_bytes, "max_reply_bytes_per_session": 4 * num_bytes}
    server = serve(HFEagle3TargetModel(model), quotas=quotas, **sizes)
    large, other = (open_session(server, run=run, rows="loss_mask") for run in ("large", "small"))
    held = ask(server, large, tokens)
    refusal = error_of(server.generate, request(server, large, tokens))
    assert isinstance(refusal, TargetBusy)
    assert str(refusal).startswith(
        f"run 'large' must hold at most {3 * num_bytes // 2} bytes of unsent replies"
    )
    of_other = ask(server, other, tokens)
    assert server.status()["runs"][0]["max_reply_bytes"] == 3 * num_bytes // 2
    del held, of_other
    ask(server, large, tokens)


def test_a_request_that_no_quota_has_room_for_is_refused_for_good(serve, model):
    server = serve(HFEagle3TargetModel(model), quotas=[QuotaConfig(reply_share=1e-7)])
    refusal = error_of(server.generate, request(server, open_session(server)))
    assert isinstance(refusal, InvalidRequest) and "target.quotas" in str(refusal)


@pytest.mark.parametrize("run", ["mine", "*"])
def test_prompts_of_a_run_are_bounded_too(serve_answers, answering, run):
    server = serve_answers(answering, quotas=[QuotaConfig(run=run, requests=1)])
    session = open_session(server, run="mine", answers=True)
    first = prompt(server, session)
    refusal = error_of(prompt, server, session)
    assert isinstance(refusal, TargetBusy) and "at most 1 requests under way" in str(refusal)
    answering.opened.set()
    first.result(WAIT)

from dataclasses import dataclass

import pytest
import torch
from server_calls import Clock, config

from eagle_rpc.errors import InvalidRequest, TargetBusy
from eagle_rpc.service.fairness import Demand
from eagle_rpc.service.reply_budget import ReplyBudget


@dataclass
class Value:
    first: torch.Tensor
    second: torch.Tensor | None = None
    name: str = "no tensor"


def budget(total=1000, each=600):
    bounds = config(max_reply_bytes=total, max_reply_bytes_per_session=each)
    return ReplyBudget(bounds, Demand(Clock()))


def promise(budget, num_bytes, session="a", run="job"):
    return budget.promise(num_bytes, run=run, session=session)


def test_a_promise_counts_until_it_is_released():
    replies = budget()
    promised = promise(replies, 400)
    assert (replies.held, replies.held_of("a"), replies.held_of("b")) == (400, 400, 0)
    replies.release(promised)
    assert (replies.held, replies.held_of("a")) == (0, 0)


def test_a_reply_counts_for_its_tensors_while_one_of_them_lives():
    replies = budget()
    value = Value(torch.zeros(10), torch.zeros(20))
    replies.fulfil(promise(replies, 400), value)
    assert replies.held == replies.held_of("a") == 120
    kept = value.second
    value.first = None
    assert replies.held == 120
    del value, kept
    assert (replies.held, replies.held_of("a")) == (0, 0)


def test_a_view_keeps_its_whole_storage():
    replies = budget()
    whole = torch.zeros(30)
    replies.fulfil(promise(replies, 400), Value(whole[:2], whole[5:]))
    assert replies.held == 120
    view = whole[:1]
    del whole
    assert replies.held == 120
    del view
    assert replies.held == 0


def test_tensors_without_elements_take_nothing():
    replies = budget()
    value = Value(torch.zeros(0))
    replies.fulfil(promise(replies, 400), value)
    assert replies.held == 0


def test_what_could_never_be_had_is_refused_for_good():
    with pytest.raises(
        InvalidRequest, match=r"would need 601 bytes, target.max_reply_bytes_per_session is 600"
    ):
        promise(budget(), 601)
    with pytest.raises(InvalidRequest, match=r"would need 50 bytes, target.max_reply_bytes is 40"):
        promise(budget(total=40), 50)


def test_bounds_hold_for_a_session_and_for_all_and_room_comes_back():
    replies = budget()
    first = promise(replies, 600, session="a")
    with pytest.raises(
        TargetBusy, match=r"take 600 bytes, this one would take 1, target.max_reply_bytes_per_session is 600"
    ):
        promise(replies, 1, session="a")
    promise(replies, 400, session="b")
    with pytest.raises(
        TargetBusy, match=r"all unsent replies take 1000 bytes.*target.max_reply_bytes is 1000"
    ):
        promise(replies, 1, session="c")
    replies.release(first)
    promise(replies, 600, session="c")


def test_room_of_sent_replies_is_found_when_it_is_needed():
    replies = budget()
    value = Value(torch.zeros(150))
    replies.fulfil(promise(replies, 600), value)
    with pytest.raises(TargetBusy):
        promise(replies, 600)
    del value
    promise(replies, 600)


def test_a_run_among_others_keeps_to_its_share_but_gets_its_first_reply():
    replies = budget()
    promise(replies, 400, session="a", run="greedy")
    promise(replies, 0, session="c", run="modest")
    with pytest.raises(TargetBusy, match=r"its share of target.max_reply_bytes among 2 runs is 500"):
        promise(replies, 200, session="b", run="greedy")
    promise(replies, 600, session="c", run="modest")


def test_waiting_ends_when_everything_is_sent_or_the_time_is_over():
    replies = budget()
    value = Value(torch.zeros(10))
    replies.fulfil(promise(replies, 400), value)
    assert not replies.wait_sent(0.02)
    del value
    assert replies.wait_sent(20.0)

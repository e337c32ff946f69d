from server_calls import Clock

from eagle_rpc.service.fairness import Demand
from eagle_rpc.service.rates import RecentRate
from eagle_rpc.service.status import Throughput


def test_a_rate_looks_back_ten_seconds_and_the_total_for_ever():
    clock = Clock()
    rate = RecentRate(clock)
    for _ in range(20):
        clock.now += 1.0
        rate.add(50)
    assert (rate.total, rate.per_second) == (1000, 50.0)
    clock.now += 11.0
    assert (rate.total, rate.per_second) == (1000, 0.0)


def test_a_young_rate_is_taken_over_its_age():
    clock = Clock()
    rate = RecentRate(clock)
    clock.now += 2.0
    rate.add(50)
    assert rate.per_second == 25.0


def test_a_rate_remembers_no_more_than_its_seconds():
    clock = Clock()
    rate = RecentRate(clock)
    for _ in range(10_000):
        clock.now += 0.01
        rate.add(1)
    assert len(rate._recent) <= 11


def test_figures_are_kept_by_outcome():
    clock = Clock()
    throughput = Throughput(clock)
    clock.now += 2.0
    throughput.note_request()
    clock.now += 3.0
    throughput.note_request()
    throughput.count("ok", tokens=30, reply_bytes=1000)
    throughput.count("ok", tokens=20, reply_bytes=500)
    throughput.count("busy")
    throughput.count("ok", answer_tokens=40)
    assert throughput.describe() == {
        "requests": {"ok": 3, "busy": 1},
        "tokens": 50,
        "tokens_per_second": 10.0,
        "reply_bytes": 1500,
        "reply_bytes_per_second": 300.0,
        "answer_tokens": 40,
        "answer_tokens_per_second": 8.0,
        "asked_seconds": 3.0,
        "request_seconds": {"queue": 0.0, "forward": 0.0, "encode": 0.0},
    }


def test_a_run_counts_while_it_asks_and_for_two_seconds_more():
    clock = Clock()
    demand = Demand(clock)
    assert [demand.note("a"), demand.note("b"), demand.note("a")] == [1, 2, 2]
    clock.now += 1.9
    assert demand.note("a") == 2
    clock.now += 0.2
    assert demand.note("a") == 1

"""The choice of the replica that gets the next request."""

from types import SimpleNamespace

from eagle_rpc.client.replica import Replica, Router
from eagle_rpc.supervision import OpenedSession


def replica(
    name: str, *, outstanding: int = 0, pace: float | None = None, credits: int = 8, age: float = 0.0
) -> Replica:
    """A replica without a target: only what routing reads."""
    made = Replica.__new__(Replica)
    made.__dict__.update(
        name=name,
        session=OpenedSession(id="s", credits=credits, lease=60.0),
        not_before=0.0,
        seconds_per_request=pace,
        last_answer=0.0,
        _under_way={str(number): -age for number in range(outstanding)},
    )
    return made


def chosen(router: Router, replicas: list[Replica], count: int = 1, now: float = 0.0) -> list[str]:
    return [router.choose(replicas, now).name for _ in range(count)]


def test_equally_loaded_replicas_take_turns():
    three = [replica(f"target{index}") for index in range(3)]
    assert chosen(Router(offset=0), three, 4) == ["target0", "target1", "target2", "target0"]


def test_trainers_begin_at_different_replicas():
    two = [replica("target0"), replica("target1")]
    assert [chosen(Router(offset=index), two)[0] for index in range(3)] == ["target0", "target1", "target0"]


def test_the_least_loaded_of_equally_fast_replicas_is_preferred():
    three = [
        replica("target0", outstanding=2, pace=1.0),
        replica("target1", outstanding=2, pace=1.0),
        replica("target2", pace=1.0),
    ]
    assert chosen(Router(offset=0), three) == ["target2"]


def test_paces_that_differ_by_chance_do_not_decide():
    two = [replica("target0", pace=1.0), replica("target1", pace=1.1)]
    assert chosen(Router(offset=0), two, 4) == ["target0", "target1", "target0", "target1"]


def test_a_slow_replica_keeps_a_share_in_proportion_to_its_pace():
    fast, slow = replica("fast", pace=1.0), replica("slow", pace=4.0)
    router, given = Router(offset=0), []
    for number in range(10):
        one = router.choose([fast, slow], 0.0)
        one._under_way[f"n{number}"] = 0.0
        given.append(one.name)
    assert given.count("slow") == 2


def test_a_replica_that_was_slow_once_is_tried_again_after_a_while():
    fast, slow = replica("fast", outstanding=1, pace=1.0), replica("slow", pace=4.0)
    assert chosen(Router(offset=0), [fast, slow], now=1.0) == ["fast"]
    fast._under_way = {"0": 100.0}
    assert chosen(Router(offset=0), [fast, slow], now=100.0) == ["slow"]


def test_a_replica_that_has_stopped_answering_is_avoided_though_it_used_to_be_fast():
    stuck, busy = (
        replica("stuck", outstanding=1, pace=0.1, age=30.0),
        replica("busy", outstanding=3, pace=1.0),
    )
    assert chosen(Router(offset=0), [stuck, busy]) == ["busy"]


def test_a_newcomer_is_taken_to_be_as_fast_as_the_fastest():
    assert chosen(Router(offset=0), [replica("old", pace=1.0), replica("new", outstanding=1)]) == ["old"]
    assert chosen(Router(offset=0), [replica("old", outstanding=1, pace=1.0), replica("new")]) == ["new"]


def test_credits_and_a_request_to_wait_are_respected():
    full, waiting = replica("full", outstanding=2, credits=2), replica("waiting")
    waiting.not_before = 5.0
    assert Router(offset=0).choose([full, waiting], 4.0) is None
    assert chosen(Router(offset=0), [full, waiting], now=5.0) == ["waiting"]


def test_pace_counts_the_time_at_the_target_and_not_that_behind_earlier_requests(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("eagle_rpc.client.replica.time.monotonic", lambda: clock.now)
    one = replica("target0")
    one.last_answer = 0.0
    one._under_way = {"a": 0.0, "b": 0.0}
    for request, when in (("a", 2.0), ("b", 4.0)):
        clock.now = when
        one.finish(request, answered=True)
    assert one.seconds_per_request == 2.0 and one.num_outstanding == 0

"""Targets that die, return, fall silent, drain or fail, seen from the trainer."""

import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
from fake_membership import FakeMembership, FakeTarget, remote_model
from support.tiny_target import tensors_of, tiny_batch, tiny_mapping, tiny_target_config
from support.waiting import until

from eagle_rpc.errors import TargetFailed, TargetMismatch, TargetUnavailable
from eagle_rpc.rpc.envelope import Failure, Ok
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import HeartbeatReply, SessionSettings
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel
from eagle_rpc.target.model import HFEagle3TargetModel

BATCHES = 8


@pytest.fixture(scope="module")
def expected() -> list[dict[str, Any]]:
    target = HFEagle3TargetModel.load(tiny_target_config(), "cpu", cache_dir="unused", seed=0)
    backend = ColocatedEagle3TargetModel(
        target, tiny_target_config(), SessionSettings(encoding="hidden", rows="position_mask")
    )
    backend.open_session(tiny_mapping())
    return [tensors_of(batch) for batch in backend.stream(tiny_batch(seed) for seed in range(BATCHES))]


soon = partial(until, seconds=20.0)


def until_both_serve(backend: Any) -> None:
    soon(
        lambda: [one["state"] for one in backend.status()["targets"]] == ["serving", "serving"],
        "both targets serve",
    )


def check_stream(backend: Any, expected: list[dict[str, Any]], after: dict[int, Callable[[], None]]) -> None:
    """Streams all batches, calls `after[n]` when batch n was consumed, and compares every bit in order."""
    batches = backend.stream(tiny_batch(seed) for seed in range(BATCHES))
    for number, batch in enumerate(batches):
        assert all(tensor.equal(expected[number][name]) for name, tensor in tensors_of(batch).items()), number
        after.get(number, lambda: None)()
    assert number == BATCHES - 1


def test_requests_of_a_target_that_dies_are_answered_by_another(
    opened: Any, server: TargetModelServer, expected: list[dict[str, Any]]
):
    dying, other = FakeTarget("target0", server), FakeTarget("target1", server)
    membership = FakeMembership(dying, other)
    backend = opened(membership)
    until_both_serve(backend)
    dying.dies_at = 1
    check_stream(backend, expected, {})
    soon(lambda: [one["name"] for one in backend.status()["targets"]] == ["target1"], "one target is left")
    soon(lambda: membership.num_lost == 1, "the membership knows of the loss")
    assert backend.status()["failovers"] > 0


def test_a_sole_target_is_waited_for_until_it_is_back_under_a_new_incarnation(
    opened: Any, server: TargetModelServer, expected: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    membership = FakeMembership(FakeTarget("target0", server))

    def replace_it() -> None:
        membership.known[0].die()
        threading.Timer(0.5, lambda: membership.known.append(FakeTarget("target0", server))).start()

    check_stream(opened(membership), expected, {2: replace_it})
    assert "a target is back after" in caplog.text


def test_without_any_target_the_reconnect_deadline_ends_the_wait_and_says_why(
    opened: Any, server: TargetModelServer
):
    target = FakeTarget("target0", server)
    backend = opened(FakeMembership(target), reconnect_deadline=2.0)
    target.die()
    with pytest.raises(
        TargetUnavailable,
        match=r"no target could be reached .*rpc\.reconnect_deadline.* lost the connection to target0",
    ):
        list(backend.stream([tiny_batch(0)]))


def test_in_a_static_world_a_lost_sole_target_is_not_waited_for(opened: Any, server: TargetModelServer):
    target = FakeTarget("target0", server)
    backend = opened(FakeMembership(target, elastic=False), reconnect_deadline=1000.0)
    target.die()
    with pytest.raises(TargetUnavailable):
        list(backend.stream([tiny_batch(0)]))


def test_a_silent_target_loses_its_requests_and_is_used_again_when_it_answers(
    opened: Any, server: TargetModelServer, expected: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
):
    caplog.set_level("INFO")
    silent, other = FakeTarget("target0", server), FakeTarget("target1", server)
    backend = opened(FakeMembership(silent, other), heartbeat_misses=4)
    until_both_serve(backend)
    check_stream(backend, expected, {0: silent.hold})
    soon(lambda: "target0 has been silent" in caplog.text, "the log tells of it")
    silent.release()
    soon(lambda: "target0 answers again" in caplog.text, "the log tells of it")
    until_both_serve(backend)
    check_stream(backend, expected, {})


def test_a_silent_target_is_not_asked_for_its_report(
    opened: Any, server: TargetModelServer, caplog: pytest.LogCaptureFixture
):
    silent, other = FakeTarget("target0", server), FakeTarget("target1", server)
    backend = opened(FakeMembership(silent, other), heartbeat_misses=4)
    until_both_serve(backend)
    asked: list[str] = []
    silent.refuse = asked.append
    silent.hold()
    soon(lambda: "target0 has been silent" in caplog.text, "the log tells of it")
    assert backend.reports().keys() == {"target1"}
    assert "status" not in asked


def test_a_draining_target_gets_nothing_new(
    opened: Any, server: TargetModelServer, expected: list[dict[str, Any]]
):
    draining, other = FakeTarget("target0", server), FakeTarget("target1", server)
    backend = opened(FakeMembership(draining, other))
    until_both_serve(backend)
    incarnation = server.model_info().incarnation
    refusals = {
        "generate": Failure("draining", "shutting down"),
        "heartbeat": Ok(HeartbeatReply(incarnation=incarnation, draining=True)),
    }
    draining.refuse = refusals.get
    check_stream(backend, expected, {})
    asked = draining.num_requests
    check_stream(backend, expected, {})
    assert draining.num_requests == asked <= 2


def test_an_expired_session_is_opened_again(
    opened: Any, server: TargetModelServer, expected: list[dict[str, Any]]
):
    target = FakeTarget("target0", server)
    # With nothing sent ahead, the next request is the one that finds it gone.
    check_stream(
        opened(FakeMembership(target), prefetch=1),
        expected,
        {2: target.expire_session, 5: target.expire_session},
    )
    assert len(target.sessions) == 3


@pytest.mark.parametrize(
    "failure", [Failure("failed", "CUDA error"), Failure("out_of_memory", "want of memory")]
)
def test_a_request_that_fails_at_one_target_goes_to_another_and_fails_if_it_fails_there_too(
    opened: Any, server: TargetModelServer, expected: list[dict[str, Any]], failure: Failure
):
    ill, other = FakeTarget("target0", server), FakeTarget("target1", server)
    backend = opened(FakeMembership(ill, other))
    until_both_serve(backend)
    ill.refuse = lambda method: failure if method == "generate" else None
    for _ in range(3):
        check_stream(backend, expected, {})
    assert ill.num_requests > 1
    for target in (ill, other):
        target.refuse = lambda method: Failure("failed", "always") if method == "generate" else None
    with pytest.raises(TargetFailed, match="always"):
        list(backend.stream([tiny_batch(0)]))


def test_a_request_that_is_not_answered_in_time_goes_to_another_target(
    opened: Any, server: TargetModelServer, expected: list[dict[str, Any]]
):
    stuck, other = FakeTarget("target0", server), FakeTarget("target1", server)
    backend = opened(FakeMembership(stuck, other), request_timeout=0.3, heartbeat_misses=10_000)
    until_both_serve(backend)
    stuck.sticks_at = "generate"
    check_stream(backend, expected, {})
    stuck.sticks_at = None
    check_stream(backend, expected, {})
    assert backend.status()["failovers"] > 0
    assert stuck.num_requests == 0, "it has lost its share"


def test_a_sole_target_from_which_nothing_arrives_is_connected_anew(
    opened: Any, server: TargetModelServer, expected: list[dict[str, Any]]
):
    target = FakeTarget("target0", server)
    membership = FakeMembership(target)
    backend = opened(membership, request_timeout=0.3, heartbeat_misses=10_000)
    target.sticks_at = "generate"
    membership.when_connected = lambda: setattr(target, "sticks_at", None)
    check_stream(backend, expected, {})
    assert membership.num_lost == 1


def test_a_target_that_another_process_replaces_is_dropped(
    opened: Any, server: TargetModelServer, expected: list[dict[str, Any]], caplog: pytest.LogCaptureFixture
):
    stopped = FakeTarget("target0", server)
    membership = FakeMembership(stopped)
    backend = opened(membership)
    stopped.hold()
    membership.known = [FakeTarget("target0", server)]
    check_stream(backend, expected, {})
    soon(lambda: "target0 is another process now" in caplog.text, "the log tells of it")
    assert [one["state"] for one in backend.status()["targets"]] == ["serving"]


def test_a_target_that_joins_later_takes_its_share(
    opened: Any, server: TargetModelServer, expected: list[dict[str, Any]]
):
    membership = FakeMembership(FakeTarget("target0", server))
    backend = opened(membership)
    late = FakeTarget("target1", server)
    membership.known.append(late)
    until_both_serve(backend)
    check_stream(backend, expected, {})
    assert late.num_requests > 0


def test_a_target_of_other_weights_is_refused_and_the_rest_goes_on(
    opened: Any,
    server: TargetModelServer,
    foreign_server: TargetModelServer,
    expected: list[dict[str, Any]],
    caplog: pytest.LogCaptureFixture,
):
    membership = FakeMembership(FakeTarget("target0", server))
    backend = opened(membership)
    foreign = FakeTarget("target1", foreign_server)
    membership.known.append(foreign)
    soon(
        lambda: "target1 is not used: target1 must serve the same model" in caplog.text, "the log tells of it"
    )
    check_stream(backend, expected, {})
    assert foreign.num_requests == 0


def test_static_replicas_of_different_weights_are_refused(
    server: TargetModelServer, foreign_server: TargetModelServer
):
    with pytest.raises(TargetMismatch, match="must serve the same model"):
        remote_model(
            FakeMembership(
                FakeTarget("target0", server), FakeTarget("target1", foreign_server), elastic=False
            )
        )


def test_embeddings_are_not_waited_for_where_a_target_has_fallen_silent(
    opened: Any, server: TargetModelServer
):
    stopped, other = FakeTarget("target0", server), FakeTarget("target1", server)
    backend = opened(FakeMembership(stopped, other), heartbeat_misses=4, request_timeout=1000.0)
    until_both_serve(backend)
    stopped.hold()
    assert backend.input_embeddings().equal(server.input_embeddings())


def test_a_client_that_finds_no_target_of_its_draft_leaves_no_thread(
    server: TargetModelServer, foreign_server: TargetModelServer
):
    before = set(threading.enumerate())
    with pytest.raises(TargetMismatch):
        remote_model(
            FakeMembership(
                FakeTarget("target0", server), FakeTarget("target1", foreign_server), elastic=False
            )
        )
    soon(lambda: set(threading.enumerate()) <= before, "all threads have ended")


def test_embeddings_come_from_a_target_that_can_give_them(opened: Any, server: TargetModelServer):
    dying, other = FakeTarget("target0", server), FakeTarget("target1", server)
    backend = opened(FakeMembership(dying, other))
    until_both_serve(backend)
    dying.die()
    assert backend.input_embeddings().equal(server.input_embeddings())

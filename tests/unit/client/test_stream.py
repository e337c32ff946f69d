"""Order, prefetch and refusals, with targets that answer in the same process."""

import threading
from typing import Any

import pytest
from fake_membership import FakeMembership, FakeTarget
from support.tiny_target import tensors_of, tiny_batch
from support.waiting import until

from eagle_rpc.errors import InvalidRequest, PayloadRefused, RequestExpired, TargetUnavailable
from eagle_rpc.rpc.envelope import Failure
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import EncodedSupervision, ServiceTimes


def generate(backend: Any, seed: int) -> Any:
    tokens = tiny_batch(seed)
    return backend.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask)


def num_sessions(server: TargetModelServer) -> int:
    return len(server.status()["sessions"])


def test_exactly_prefetch_requests_run_ahead_of_the_consumer(opened: Any, server: TargetModelServer):
    taken: list[int] = []

    def batches() -> Any:
        for seed in range(6):
            taken.append(seed)
            yield tiny_batch(seed)

    stream = opened(FakeMembership(FakeTarget("target0", server)), prefetch=3).stream(batches())
    next(stream)
    assert taken == [0, 1, 2]
    next(stream)
    assert taken == [0, 1, 2, 3]
    assert len(list(stream)) == 4


def test_batches_come_in_the_order_asked_for_though_answers_do_not(opened: Any, server: TargetModelServer):
    late, early = FakeTarget("target0", server), FakeTarget("target1", server)
    backend = opened(FakeMembership(late, early, elastic=False), prefetch=4)
    late.hold()
    stream = backend.stream(tiny_batch(seed) for seed in range(4))
    first: list[Any] = []
    reader = threading.Thread(target=lambda: first.append(next(stream)))
    reader.start()
    until(lambda: early.num_requests >= 2, "the free target has two requests", seconds=20)
    late.release()
    reader.join(20)
    alone = opened(FakeMembership(FakeTarget("target0", server)))
    for seed, batch in enumerate([*first, *stream]):
        expected = tensors_of(generate(alone, seed))
        assert all(tensor.equal(expected[name]) for name, tensor in tensors_of(batch).items())


def test_a_closed_stream_leaves_nothing_behind_and_the_next_one_works(opened: Any, server: TargetModelServer):
    target = FakeTarget("target0", server)
    backend = opened(FakeMembership(target))
    stream = backend.stream(tiny_batch(seed) for seed in range(9))
    next(stream)
    stream.close()
    assert generate(backend, 0).supervised_rows.numel() > 0
    assert [one["outstanding"] for one in backend.status()["targets"]] == [0]


def test_a_busy_target_is_asked_again(opened: Any, server: TargetModelServer):
    target = FakeTarget("target0", server)
    refusals = iter([Failure("busy", "full", 0.01)] * 3)
    target.refuse = lambda method: next(refusals, None) if method == "generate" else None
    assert generate(opened(FakeMembership(target)), 1).supervised_rows.numel() > 0
    assert target.num_requests == 4


def test_a_target_that_stays_busy_is_given_up_with_its_reason(opened: Any, server: TargetModelServer):
    target = FakeTarget("target0", server)
    target.refuse = lambda method: (
        Failure("busy", "the queue is full", 0.01) if method == "generate" else None
    )
    with pytest.raises(
        RequestExpired, match=r"request trainer0-0 was given up after 0\.3 s, .*the queue is full"
    ):
        generate(opened(FakeMembership(target), request_timeout=0.1), 1)


def test_a_refusal_of_the_request_itself_is_raised_at_once(opened: Any, server: TargetModelServer):
    target = FakeTarget("target0", server)
    target.refuse = lambda method: (
        Failure("invalid_request", "input_ids must be") if method == "generate" else None
    )
    with pytest.raises(InvalidRequest, match="target0: input_ids must be"):
        generate(opened(FakeMembership(target)), 1)
    assert target.num_requests == 1


def test_closing_ends_the_session_and_no_other(opened: Any, server: TargetModelServer):
    before = num_sessions(server)
    mine, others = (opened(FakeMembership(FakeTarget("target0", server))) for _ in range(2))
    assert num_sessions(server) == before + 2
    mine.close()
    assert num_sessions(server) == before + 1
    assert generate(others, 0).supervised_rows.numel() > 0


def test_a_session_that_cannot_be_ended_hides_no_error(
    opened: Any, server: TargetModelServer, caplog: pytest.LogCaptureFixture
):
    target = FakeTarget("target0", server)
    backend = opened(FakeMembership(target), heartbeat_interval=60.0)
    target.refuse = lambda method: Failure("failed", "no") if method == "disconnect" else None
    backend.close()
    assert "the session at target0 was not ended: target0: no" in caplog.text


def test_a_trainer_that_is_told_to_stop_does_not_go_on_waiting_for_a_target(
    opened: Any, server: TargetModelServer
):
    stop = threading.Event()
    target = FakeTarget("target0", server)
    backend = opened(FakeMembership(target), stop=stop)
    target.die()
    stop.set()
    with pytest.raises(TargetUnavailable, match="told to stop"):
        generate(backend, 0)


def test_every_request_tells_where_its_time_went(opened: Any, server: TargetModelServer):
    backend, told = opened(FakeMembership(FakeTarget("target0", server))), list[Any]()
    before = server.status()["request_seconds"]
    backend.when_decoded = told.append
    assert len(list(backend.stream(tiny_batch(seed) for seed in range(4)))) == 4
    totals = backend.totals
    assert totals.requests == 4 and [one.target for one in told] == ["target0"] * 4
    assert len({one.id for one in told}) == 4 and all(one.num_bytes > 0 for one in told)
    for name, spent in totals.times._asdict().items():
        assert spent == pytest.approx(sum(getattr(one.times, name) for one in told))
    assert totals.times.forward > 0 and totals.times.decode > 0
    assert totals.seconds_waited == pytest.approx(sum(totals.waits))
    for name, seconds in server.status()["request_seconds"].items():
        assert seconds - before[name] == pytest.approx(getattr(totals.times, name))


@pytest.mark.parametrize("times", [None, "0.1", ServiceTimes(queue=0.0, forward=-1.0, encode=0.0)])
def test_a_reply_without_true_times_is_refused(opened: Any, server: TargetModelServer, times: Any):
    class Untrue(FakeTarget):
        def _answer(self, future: Any, reply: Any) -> None:
            def change(done: Any) -> None:
                value = done.wait().value
                if isinstance(value, EncodedSupervision):
                    value.times = times
                future.set_result(done.wait())

            reply.add_done_callback(change)

    backend = opened(FakeMembership(Untrue("target0", server)))
    with pytest.raises(PayloadRefused, match="times"):
        generate(backend, 0)

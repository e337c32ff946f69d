"""The client's prefetch, with a target that answers in the same process."""

from typing import Any

import pytest
import torch
from support.tiny_target import tiny_batch, tiny_mapping, tiny_target_config
from torch.futures import Future

from eagle_rpc.client import remote, replica
from eagle_rpc.client.remote import RemoteEagle3TargetModel
from eagle_rpc.errors import RequestExpired
from eagle_rpc.supervision import Failure, TargetExpectation, TokenBatch
from eagle_rpc.target.model import HFEagle3TargetModel
from eagle_rpc.target.server import TargetModelServer


class LocalRRef:
    """What an RRef to the server offers, without a process between."""

    def __init__(self, server: Any) -> None:
        self._server = server

    def rpc_async(self, timeout: float) -> Any:
        return _Async(self._server)


class _Async:
    def __init__(self, server: Any) -> None:
        self._server = server

    def __getattr__(self, method: str) -> Any:
        def call(*arguments: Any) -> Future:
            reply = getattr(self._server, method)(*arguments)
            if isinstance(reply, Future):
                return reply
            future: Future = Future()
            future.set_result(reply)
            return future

        return call


@pytest.fixture(scope="module")
def server() -> TargetModelServer:
    return TargetModelServer(HFEagle3TargetModel.load(tiny_target_config(), "cpu", cache_dir="unused"), tiny_target_config())


def connected(
    monkeypatch: pytest.MonkeyPatch, server: Any, *, prefetch: int, request_timeout: float = 30
) -> RemoteEagle3TargetModel:
    monkeypatch.setattr(replica, "connect", lambda worker, name, timeout: LocalRRef(server))
    backend = remote.RemoteEagle3TargetModel(
        ["target0"],
        trainer="trainer0",
        index=0,
        job="test",
        encoding="hidden",
        rows="position_mask",
        prefetch=prefetch,
        expected=TargetExpectation(),
        device=torch.device("cpu"),
        request_timeout=request_timeout,
    )
    backend.open_session(tiny_mapping())
    return backend


def test_exactly_prefetch_requests_run_ahead_of_the_consumer(monkeypatch: pytest.MonkeyPatch, server: TargetModelServer):
    taken: list[int] = []

    def batches() -> Any:
        for seed in range(6):
            taken.append(seed)
            yield tiny_batch(seed)

    stream = connected(monkeypatch, server, prefetch=3).stream(batches())
    next(stream)
    assert taken == [0, 1, 2]
    next(stream)
    assert taken == [0, 1, 2, 3]
    assert len(list(stream)) == 4


def test_a_closed_stream_leaves_nothing_outstanding(monkeypatch: pytest.MonkeyPatch, server: TargetModelServer):
    backend = connected(monkeypatch, server, prefetch=4)
    stream = backend.stream(tiny_batch(seed) for seed in range(9))
    next(stream)
    stream.close()
    assert [one.num_outstanding for one in backend._replicas] == [0]
    tokens: TokenBatch = tiny_batch(0)
    backend.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask)
    assert [one.num_outstanding for one in backend._replicas] == [0]


class BusyServer:
    """Refuses the first `refusals` requests for want of room."""

    def __init__(self, server: TargetModelServer, refusals: int) -> None:
        self._server = server
        self.refusals = refusals

    def __getattr__(self, method: str) -> Any:
        return getattr(self._server, method)

    def generate(self, request: Any) -> Any:
        if self.refusals == 0:
            return self._server.generate(request)
        self.refusals -= 1
        return Failure("busy", "the queue is full")


def test_a_busy_target_is_asked_again(monkeypatch: pytest.MonkeyPatch, server: TargetModelServer):
    busy = BusyServer(server, refusals=3)
    tokens = tiny_batch(1)
    backend = connected(monkeypatch, busy, prefetch=1)
    assert backend.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask).supervised_rows.numel() > 0
    assert busy.refusals == 0


def test_a_target_busy_until_the_deadline_is_given_up(monkeypatch: pytest.MonkeyPatch, server: TargetModelServer):
    tokens = tiny_batch(1)
    backend = connected(monkeypatch, BusyServer(server, refusals=10**9), prefetch=1, request_timeout=0.2)
    with pytest.raises(RequestExpired, match="found target0 busy until its deadline"):
        backend.generate_batch(tokens.input_ids, tokens.attention_mask, tokens.loss_mask)


def test_a_session_that_cannot_be_ended_hides_no_error_and_keeps_no_other_session(
    monkeypatch: pytest.MonkeyPatch, server: TargetModelServer, caplog: pytest.LogCaptureFixture
):
    backend = connected(monkeypatch, server, prefetch=1)
    sessions = server.stats().value["sessions"]
    gone = remote.Replica("target1", request_timeout=1)
    gone._session = "no session of anybody"
    backend._replicas.insert(0, gone)
    backend.close()
    assert "the session at target1 was not ended" in caplog.text
    assert server.stats().value["sessions"] == sessions - 1

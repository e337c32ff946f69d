"""Two runs at one target with quotas: trainers in processes of their own over real RPC."""

import itertools
import threading
from typing import Any

import pytest
from support.elastic import WAIT, Link, Registry, Worker, remote_target, serve_target
from support.tiny_target import tensors_of, tiny_batch, tiny_mapping, tiny_target_config
from support.waiting import until

from eagle_rpc.config.sections.target import QuotaConfig
from eagle_rpc.errors import TargetUnavailable
from eagle_rpc.supervision import SessionSettings, tensors_digest

pytestmark = pytest.mark.rpc

QUOTAS = [QuotaConfig(run="large", requests=1, sessions=2), QuotaConfig(sessions=1)]


def stream_as(link: Link, run: str, name: str, address: str, token: bytes) -> None:
    """A trainer of a run, which streams until it is told to end; says the digests of its first batches then."""
    told = threading.Event()
    threading.Thread(target=lambda: (link.receive_forever(), told.set()), daemon=True).start()
    found: list[str] = []
    session = SessionSettings(run=run, trainer=name)
    with remote_target(name, address, token, session=session) as backend:
        backend.open_session(tiny_mapping())
        for batch in backend.stream(map(tiny_batch, itertools.count())):
            found.append(tensors_digest(tensors_of(batch).items()))
            if len(found) == 4:
                link.send("streaming")
            if told.is_set() and len(found) >= 4:
                break
    link.send(found[:4])


def knock_as(link: Link, run: str, name: str, address: str, token: bytes) -> None:
    """A trainer for which there is no room; says why."""
    session = SessionSettings(run=run, trainer=name)
    try:
        with remote_target(name, address, token, session=session, reconnect_deadline=2.0) as backend:
            backend.open_session(tiny_mapping())
    except TargetUnavailable as error:
        link.send(str(error))


def test_a_run_waits_at_its_quota_while_another_streams_and_the_status_tells_both(registry: Registry):
    workers: list[Worker] = []

    def start(function: Any, *args: Any) -> Worker:
        workers.append(Worker(function, *args, registry.address, registry.token))
        return workers[-1]

    def runs() -> dict[str, dict[str, Any]]:
        (target,) = [one.record for one in registry.client.records() if one.record.role == "target"]
        return {one["run"]: one for one in target.status.get("runs", [])}

    try:
        start(serve_target, "target0", tiny_target_config(quotas=QUOTAS)).receive()
        large = [start(stream_as, "large", f"large{number}") for number in range(2)]
        small = start(stream_as, "small", "small0")
        for trainer in (*large, small):
            assert trainer.receive() == "streaming"
        until(
            lambda: runs().get("large", {}).get("refused", 0) > 0,
            "the large run meets its quota",
            seconds=WAIT,
        )
        found = runs()
        assert (
            found["large"]["sessions"],
            found["large"]["max_sessions"],
            found["large"]["max_requests"],
        ) == (2, 2, 1)
        assert (
            found["small"]["max_sessions"],
            found["small"]["max_requests"],
            found["small"]["refused"],
        ) == (1, None, 0)
        why = start(knock_as, "small", "small1").receive()
        assert "run 'small' must hold at most 1 sessions (target.quotas)" in why
        for trainer in (*large, small):
            trainer.send("end")
        first, *others = [trainer.receive() for trainer in (*large, small)]
        assert len(first) == 4 and others == [first, first]
    finally:
        for worker in workers:
            worker.end()

import logging
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from registry_cases import BOUND, TOKEN, client_of, running_registry, target

from eagle_rpc.errors import ConfigError, ConnectionLost, NameTaken
from eagle_rpc.registry import LAST_WORKER_ID, Beat, Record, RegistryClient, register, take_id

INTERVAL = 0.02


def beat(
    client: RegistryClient, record: Record, status: Callable[[], dict[str, Any]] = dict, **changes: Any
) -> Beat:
    settings = {
        "interval": INTERVAL,
        "patience": 0.0,
        "stop": threading.Event(),
        "when_superseded": lambda: None,
        "when_drained": lambda: None,
        **changes,
    }
    return Beat(client=client, record=record, status=status, **settings)


def counting() -> tuple[Callable[[], dict[str, Any]], Callable[[int], None]]:
    """A status that counts how often it was asked, and a wait for that many more times."""
    asked = threading.Condition()
    count = 0

    def status() -> dict[str, Any]:
        nonlocal count
        with asked:
            count += 1
            asked.notify_all()
            return {"count": count}

    def wait_for(more: int) -> None:
        with asked:
            reached = count + more
            assert asked.wait_for(lambda: count >= reached, BOUND)

    return status, wait_for


def test_a_beat_announces_the_latest_status_and_withdraws(tmp_path):
    status, wait_for = counting()
    with running_registry(tmp_path) as server:
        client = client_of(server)
        with beat(client, target(), status):
            assert client.records()[0].record.status["count"] >= 1
            wait_for(3)
            assert client.records()[0].record.status["count"] >= 3
        assert client.records() == []


def test_a_status_that_fails_does_not_end_the_beat(tmp_path, caplog):
    answers: list[Any] = [
        {"step": 1},
        ValueError("no status"),
        {"step": float("nan")},
        {"text": "x" * 300_000},
    ]
    all_asked = threading.Event()

    def status() -> dict[str, Any]:
        if not answers:
            all_asked.set()
            return {"step": 2}
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with running_registry(tmp_path) as server:
        client = client_of(server)
        with beat(client, target(), status):
            assert all_asked.wait(BOUND)
            assert client.records()[0].record.status in ({"step": 1}, {"step": 2})
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert warnings == ["target0 announces an old status: ValueError: no status"]


def test_an_outage_costs_two_lines_and_the_name_is_kept(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    status, wait_for = counting()
    with running_registry(tmp_path) as server:
        address = server.address
        worker = beat(client_of(server), target(), status)
        worker.__enter__()
    wait_for(5)
    caplog.clear()
    with running_registry(tmp_path, address=address) as server:
        wait_for(3)
        assert client_of(server).living()[0].name == "target0"
        worker.close()
        assert client_of(server).records() == []
    assert [one.getMessage() for one in caplog.records if "announced again" in one.getMessage()] == [
        "target0 is announced again"
    ]


def test_an_outage_is_reported_once(tmp_path, caplog):
    status, wait_for = counting()
    with running_registry(tmp_path) as server:
        worker = beat(client_of(server), target(), status)
        worker.__enter__()
    wait_for(6)
    worker.close()
    lines = [one.getMessage() for one in caplog.records if "not announced" in one.getMessage()]
    assert len(lines) == 1


def test_a_worker_whose_name_was_taken_over_is_told_once_and_leaves_the_other_alone(tmp_path):
    told: list[str] = []
    registered, beating, taken_over, superseded = (threading.Event() for _ in range(4))

    def status() -> dict[str, Any]:
        # No beat between the withdrawal and the successor: it would take the name back.
        if registered.is_set():
            beating.set()
            assert taken_over.wait(BOUND)
        return {}

    def when_superseded() -> None:
        told.append("superseded")
        superseded.set()

    with running_registry(tmp_path) as server:
        client = client_of(server)
        first, second = target(incarnation="a"), target(incarnation="b")
        with beat(client, first, status, when_superseded=when_superseded):
            registered.set()
            assert beating.wait(BOUND)
            client.withdraw(first.incarnation)
            client.announce(second)
            taken_over.set()
            assert superseded.wait(BOUND)
        assert (told, client.living()) == (["superseded"], [second])


def test_a_living_name_is_refused_after_the_patience_and_said_to_be_waited_for(tmp_path, caplog, monkeypatch):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr("eagle_rpc.process.waiting._FIRST_LINE_SECONDS", 0.0)
    with running_registry(tmp_path) as server:
        client = client_of(server)
        client.announce(target(incarnation="a"))
        with pytest.raises(NameTaken, match="incarnation a"):
            register(client, target(incarnation="b"), 0.3, threading.Event())
    lines = [one.getMessage() for one in caplog.records if "waiting for the name target0" in one.getMessage()]
    assert len(lines) == 1 and "incarnation a0000000" in lines[0]


def test_a_dead_workers_name_is_waited_for(tmp_path):
    with running_registry(tmp_path, ttl=0.5) as server:
        client = client_of(server)
        client.announce(target(incarnation="a"))
        register(client, target(incarnation="b"), BOUND, threading.Event())
        assert client.records()[0].record.incarnation[0] == "b"


def test_a_registry_that_starts_later_is_waited_for(tmp_path):
    with running_registry(tmp_path) as server:
        address = server.address
    client = RegistryClient(address, TOKEN, timeout=BOUND)
    with pytest.raises(ConnectionLost):
        take_id(client, 0.2, threading.Event())
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(take_id, client, BOUND, threading.Event())
        with running_registry(tmp_path, address=address):
            assert waiting.result(BOUND) == 1


def test_a_worker_beyond_the_last_id_is_refused_at_once(tmp_path):
    (tmp_path / "ids").write_text(f"{LAST_WORKER_ID}\n")
    with (
        running_registry(tmp_path) as server,
        pytest.raises(ConfigError, match=f"all worker ids up to {LAST_WORKER_ID} are used"),
    ):
        take_id(client_of(server), 1000.0, threading.Event())


def test_a_worker_that_is_told_to_stop_does_not_go_on_waiting_for_its_name_or_the_registry(tmp_path):
    stop = threading.Event()
    stop.set()
    with running_registry(tmp_path) as server:
        client = client_of(server)
        client.announce(target())
        with pytest.raises(NameTaken):
            register(client, target(incarnation="b"), 1000.0, stop)
    with pytest.raises(ConnectionLost):
        take_id(RegistryClient("127.0.0.1:1", TOKEN), 1000.0, stop)


def test_a_worker_is_told_once_to_drain_and_is_announced_until_it_has_left(tmp_path):
    status, wait_for = counting()
    told: list[str] = []
    with running_registry(tmp_path) as server:
        client = client_of(server)
        with beat(client, target(), status, when_drained=lambda: told.append("drain")):
            client.drain([target().incarnation])
            wait_for(3)
            assert told == ["drain"] and len(client.records()) == 1

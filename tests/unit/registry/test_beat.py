import logging
import threading
from collections.abc import Callable
from typing import Any

import pytest
from registry_cases import TOKEN, client_of, running_registry, target

from eagle_rpc.errors import ConnectionLost, NameTaken
from eagle_rpc.registry import Beat, Record, RegistryClient, register, wait_until_reachable

INTERVAL = 0.02
BOUND = 20.0


def beat(client: RegistryClient, record: Record, status: Callable[[], dict[str, Any]] = dict, **changes: Any) -> Beat:
    settings = {"interval": INTERVAL, "patience": 0.0, "stop": threading.Event(), "when_superseded": lambda: None, **changes}
    return Beat(client, record, status=status, **settings)


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
            assert client.living()[0].status["count"] >= 1
            wait_for(3)
            assert client.living()[0].status["count"] >= 3
        assert client.records() == []


def test_a_status_that_fails_does_not_end_the_beat(tmp_path, caplog):
    answers: list[Any] = [{"step": 1}, ValueError("no status"), {"step": float("nan")}, {"text": "x" * 300_000}]
    all_asked = threading.Event()

    def status() -> dict[str, Any]:
        if not answers:
            all_asked.set()
            return {"step": 2}
        answer = answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    with running_registry(tmp_path, ttl=60) as server:
        client = client_of(server)
        with beat(client, target(), status):
            assert all_asked.wait(BOUND)
            assert client.living()[0].status in ({"step": 1}, {"step": 2})
    warnings = [one.getMessage() for one in caplog.records if one.levelno == logging.WARNING]
    assert warnings == ["target0 announces an old status: ValueError: no status"]


def test_an_outage_costs_two_lines_and_the_name_is_kept(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    status, wait_for = counting()
    with running_registry(tmp_path) as server:
        address = server.address
        worker = beat(RegistryClient(address, TOKEN, timeout=10), target(), status)
        worker.__enter__()
    wait_for(5)
    caplog.clear()
    with running_registry(tmp_path, address=address) as server:
        wait_for(3)
        assert client_of(server).living()[0].name == "target0"
        worker.close()
        assert client_of(server).records() == []
    assert [one.getMessage() for one in caplog.records if "announced again" in one.getMessage()] == ["target0 is announced again"]


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
    superseded = threading.Event()

    def when_superseded() -> None:
        told.append("superseded")
        superseded.set()

    with running_registry(tmp_path) as server:
        client = client_of(server)
        first, second = target(incarnation="a"), target(incarnation="b")
        with beat(client, first, when_superseded=when_superseded):
            client.withdraw(first.incarnation)
            register(client, second, BOUND, threading.Event())
            assert superseded.wait(BOUND)
        assert (told, client.living()) == (["superseded"], [second])


def test_a_living_name_is_refused_after_the_patience_and_said_to_be_waited_for(tmp_path, caplog):
    caplog.set_level(logging.INFO)
    with running_registry(tmp_path, ttl=60) as server:
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
        assert client.living()[0].incarnation[0] == "b"


def test_a_registry_that_starts_later_is_waited_for(tmp_path):
    with running_registry(tmp_path) as server:
        address = server.address
    client = RegistryClient(address, TOKEN, timeout=10)
    with pytest.raises(ConnectionLost):
        wait_until_reachable(client, 0.2, threading.Event())
    waiter = threading.Thread(target=wait_until_reachable, args=(client, BOUND, threading.Event()), daemon=True)
    waiter.start()
    with running_registry(tmp_path, address=address):
        waiter.join(BOUND)
        assert not waiter.is_alive()


def test_a_worker_that_is_told_to_stop_does_not_go_on_waiting_for_its_name_or_the_registry(tmp_path):
    stop = threading.Event()
    stop.set()
    with running_registry(tmp_path, ttl=60) as registry:
        client = client_of(registry)
        client.announce(target())
        with pytest.raises(NameTaken):
            register(client, target(incarnation="b"), 1000.0, stop)
    with pytest.raises(ConnectionLost):
        wait_until_reachable(RegistryClient("127.0.0.1:1", TOKEN), 1000.0, stop)

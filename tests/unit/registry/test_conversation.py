"""The registry over sockets: who is believed, what is bounded, and that nothing that arrives ends it."""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from registry_cases import BOUND, TOKEN, client_of, running_registry, target
from support.waiting import until

from eagle_rpc.config.texts import parse_address
from eagle_rpc.errors import (
    AccessRefused,
    ConfigError,
    ConnectionLost,
    InvalidRequest,
    NameTaken,
    WaitTimeout,
)
from eagle_rpc.registry import IdFile, RegistryClient, RegistryServer, take_id
from eagle_rpc.registry.server import MAX_CONNECTIONS
from eagle_rpc.registry.wire import MAX_REQUEST_BYTES, Conversation

GREETING_BYTES = len(b"eagle_rpc registry 1\n") + 32


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[RegistryServer]:
    """One for all tests here: each of them leaves it serving."""
    with running_registry(tmp_path_factory.mktemp("registry")) as running:
        yield running
        assert client_of(running).new_id() > 0


@contextlib.contextmanager
def connected(server: RegistryServer) -> Iterator[socket.socket]:
    with socket.create_connection(parse_address(server.address), timeout=BOUND) as connection:
        yield connection


def read_to_end(connection: socket.socket) -> bytes:
    """What the other side sends until it closes; a reset is an end as well."""
    received = b""
    with contextlib.suppress(ConnectionError):
        while chunk := connection.recv(4096):
            received += chunk
    return received


def test_a_worker_announces_itself_and_is_found(server):
    client = client_of(server)
    first, second = client.new_id(), client.new_id()
    assert second == first + 1
    record = target(7, id=first, status={"sessions": [{"lease_left": 1.5}], "draining": False, "run": "ü"})
    client.announce(record)
    (seen,) = client.records()
    assert seen.record == record and seen.living and 0 <= seen.seconds_silent < BOUND
    client.withdraw(record.incarnation)
    assert client.records() == []


def test_peers_learn_of_a_status_only_whether_its_worker_drains(server):
    client = client_of(server)
    statuses = [
        {"draining": False, "text": "x" * 1000},
        {"draining": True},
        {"draining": ["x" * 1000]},
        {"text": "x" * 1000},
    ]
    announced = [target(number, status=status) for number, status in enumerate(statuses)]
    for record in announced:
        client.announce(record)
    outlines = [{"draining": False}, {"draining": True}, {}, {}]
    assert client.living() == [
        replace(record, status=status) for record, status in zip(announced, outlines, strict=True)
    ]
    assert [one.record for one in client.records()] == announced
    for record in announced:
        client.withdraw(record.incarnation)


def test_a_taken_name_arrives_as_such(server):
    client = client_of(server)
    client.announce(target(incarnation="a"))
    with pytest.raises(NameTaken, match="incarnation a"):
        client.announce(target(incarnation="b"))
    client.withdraw(target(incarnation="a").incarnation)


def test_clients_at_the_same_time_get_different_ids(server):
    client = client_of(server)
    with ThreadPoolExecutor(8) as threads:
        ids = list(threads.map(lambda _: client.new_id(), range(80)))
    assert len(set(ids)) == 80


def test_more_workers_than_connections_may_start_at_once(tmp_path, caplog):
    num_workers, ids = 2 * MAX_CONNECTIONS, StuckIds(tmp_path / "ids")
    with running_registry(tmp_path, ids=ids) as server, ThreadPoolExecutor(num_workers) as threads:
        client = client_of(server)
        starting = [threads.submit(take_id, client, BOUND, threading.Event()) for _ in range(num_workers)]
        # Every connection is taken until one worker at least has been refused and must ask again.
        ids.wait_for(MAX_CONNECTIONS)
        until(
            lambda: f"all {MAX_CONNECTIONS} connections are busy" in caplog.text,
            "a worker is refused",
            seconds=BOUND,
        )
        ids.disk_answers.set()
        assert len({one.result(BOUND) for one in starting}) == num_workers


def test_workers_that_wait_for_the_disk_keep_their_connections(tmp_path):
    ids = StuckIds(tmp_path / "ids")
    with running_registry(tmp_path, ids=ids) as server, ThreadPoolExecutor(MAX_CONNECTIONS) as threads:
        client = client_of(server)
        waiting = [threads.submit(client.new_id) for _ in range(MAX_CONNECTIONS)]
        ids.wait_for(MAX_CONNECTIONS)
        with pytest.raises(ConnectionLost):
            client.living()
        ids.disk_answers.set()
        assert sorted(one.result(BOUND) for one in waiting) == list(range(1, MAX_CONNECTIONS + 1))


def test_a_wrong_token_is_told_so_and_changes_nothing(server):
    for call in (lambda one: one.announce(target()), lambda one: one.new_id(), lambda one: one.records()):
        with pytest.raises(AccessRefused, match="same token"):
            call(client_of(server, token=b"x" * 32))
    assert client_of(server).records() == []


def test_the_token_never_travels(tmp_path):
    with running_registry(tmp_path) as server, recording_proxy(server) as (address, sent):
        RegistryClient(address, TOKEN, timeout=BOUND).announce(target())
    assert b"target0" in bytes(sent) and TOKEN not in bytes(sent) and TOKEN.hex().encode() not in bytes(sent)


def test_an_old_request_is_worth_nothing_in_another_conversation(tmp_path):
    with running_registry(tmp_path) as server:
        with recording_proxy(server) as (address, sent):
            RegistryClient(address, TOKEN, timeout=BOUND).announce(target())
        client_of(server).withdraw(target().incarnation)
        with connected(server) as replay:
            replay.sendall(bytes(sent))
            assert b"AccessRefused" in read_to_end(replay)
        assert client_of(server).records() == []


def test_an_impostor_that_repeats_an_old_reply_is_not_believed(tmp_path):
    with running_registry(tmp_path) as server, connected(server) as connection:
        recorded = Recording(connection)
        Conversation(recorded, peer="registry", token=TOKEN, seconds=BOUND).ask(b'{"operation":"records"}')
    with impostor(bytes(recorded.received)) as address, pytest.raises(AccessRefused, match="same token"):
        RegistryClient(address, TOKEN, timeout=BOUND).records()


def test_something_else_at_the_address_is_not_taken_for_a_registry():
    answer = b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" + b"." * 64
    with impostor(answer) as address, pytest.raises(AccessRefused, match="must be a registry"):
        RegistryClient(address, TOKEN, timeout=BOUND).records()


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(garbage=st.binary(max_size=300))
def test_garbage_is_closed_without_an_answer(server, garbage):
    with connected(server) as connection:
        # It may have been closed before its end was said.
        with contextlib.suppress(OSError):
            connection.sendall(garbage)
            connection.shutdown(socket.SHUT_WR)
        answer = read_to_end(connection)
    # A complete message of garbage is told that the token is missing.
    assert len(answer) in (0, GREETING_BYTES) or b"AccessRefused" in answer


NONSENSE = [b"[" * 100_000, b'{"operation":"announce"}', b'{"operation":["new_id"]}', b"null"]


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(body=st.binary(max_size=200) | st.sampled_from(NONSENSE))
def test_authenticated_nonsense_is_refused_by_name(server, body):
    with connected(server) as connection:
        answer = Conversation(connection, peer="registry", token=TOKEN, seconds=BOUND).ask(body)
    assert b'"error":"InvalidRequest"' in answer


@pytest.mark.parametrize("kept", [0, 10, 32, 35, 60, 70])
def test_a_truncated_request_ends_its_connection_only(server, kept: int):
    with connected(server) as connection:
        cut = Truncated(connection, kept)
        with pytest.raises(ConnectionLost):
            Conversation(cut, peer="registry", token=TOKEN, seconds=BOUND).ask(b'{"operation":"new_id"}')
    assert client_of(server).records() == []


def test_an_oversized_request_is_refused_before_it_is_read(server):
    with connected(server) as connection:
        connection.sendall(b"n" * 32 + struct.pack(">I", MAX_REQUEST_BYTES + 1) + bytes(32))
        assert len(read_to_end(connection)) == GREETING_BYTES
    with pytest.raises(InvalidRequest, match="at most"):
        client_of(server).announce(target(status={"text": "x" * MAX_REQUEST_BYTES}))


def test_a_peer_that_sends_a_byte_at_a_time_is_cut_off(tmp_path):
    with running_registry(tmp_path, message_seconds=1.0) as server, connected(server) as connection:
        connection.recv(GREETING_BYTES)
        connection.settimeout(0.1)
        deadline = time.monotonic() + BOUND
        with contextlib.suppress(ConnectionError):
            while time.monotonic() < deadline:
                connection.sendall(b"x")
                with contextlib.suppress(TimeoutError):
                    if not connection.recv(1):
                        break
        assert time.monotonic() < deadline


def test_silent_connections_do_not_keep_workers_out(tmp_path):
    with running_registry(tmp_path, message_seconds=2.0) as server, contextlib.ExitStack() as stack:
        silent = [stack.enter_context(connected(server)) for _ in range(MAX_CONNECTIONS + 20)]
        assert take_id(client_of(server), BOUND, threading.Event()) > 0
        # The first ones have lost their places.
        assert len(read_to_end(silent[0])) == GREETING_BYTES
        assert threading.active_count() < MAX_CONNECTIONS + 30


def test_refusals_are_counted_in_few_lines(tmp_path, caplog):
    with running_registry(tmp_path) as server:
        for _ in range(20):
            with connected(server) as connection:
                connection.shutdown(socket.SHUT_WR)
                read_to_end(connection)
        client_of(server).records()
    lines = [one.getMessage() for one in caplog.records if "refused" in one.getMessage()]
    assert 1 <= len(lines) < 10 and "connections refused since the last such line: 1, " in lines[0]


def test_a_registry_that_is_not_there_and_one_that_does_not_answer():
    with socket.socket() as mute:
        mute.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{mute.getsockname()[1]}"
        with pytest.raises(ConnectionLost, match=f"the registry at {address} cannot be reached"):
            RegistryClient(address, TOKEN).records()
        named = address.replace("127.0.0.1", "localhost")
        with pytest.raises(ConnectionLost, match=rf"{named}, which is 127\.0\.0\.1 here, cannot be reached"):
            RegistryClient(named, TOKEN).records()
        mute.listen()
        with pytest.raises(WaitTimeout, match=rf"the registry at {address} .* within 0\.3 s"):
            RegistryClient(address, TOKEN, timeout=0.3).records()


def test_an_address_in_use_is_named_and_free_after_closing(tmp_path):
    with running_registry(tmp_path) as server:
        address = server.address
        with (
            pytest.raises(ConfigError, match=f"free address of this host, got {address}"),
            running_registry(tmp_path, address=address),
        ):
            pass
        client_of(server).new_id()
    with pytest.raises(ConnectionLost):
        RegistryClient(address, TOKEN).new_id()
    with running_registry(tmp_path, address=address) as again:
        assert client_of(again).new_id() == 2


@contextlib.contextmanager
def impostor(says: bytes) -> Iterator[str]:
    """Answers any request of one connection with fixed bytes."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            connection, _ = listener.accept()
            with connection, contextlib.suppress(ConnectionError):
                connection.sendall(says)
                connection.settimeout(10)
                read_to_end(connection)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        thread.join(20)


@contextlib.contextmanager
def recording_proxy(server: RegistryServer) -> Iterator[tuple[str, bytearray]]:
    """Passes one connection on to the registry, and keeps what the worker sent."""
    sent = bytearray()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def answers(source: socket.socket, sink: socket.socket) -> None:
            with contextlib.suppress(OSError):
                while chunk := source.recv(4096):
                    sink.sendall(chunk)
                sink.shutdown(socket.SHUT_RDWR)

        def serve() -> None:
            worker, _ = listener.accept()
            with worker, connected(server) as registry:
                back = threading.Thread(target=answers, args=(registry, worker))
                back.start()
                with contextlib.suppress(OSError):
                    while chunk := worker.recv(4096):
                        sent.extend(chunk)
                        registry.sendall(chunk)
                back.join(20)

        thread = threading.Thread(target=serve)
        thread.start()
        yield f"127.0.0.1:{listener.getsockname()[1]}", sent
        thread.join(20)


class StuckIds(IdFile):
    """A file on a disk that does not answer for now."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, lock_seconds=BOUND)
        self.disk_answers = threading.Event()
        self._asked = threading.Semaphore(0)

    def wait_for(self, num_asked: int) -> None:
        for _ in range(num_asked):
            assert self._asked.acquire(timeout=BOUND)

    def next(self) -> int:
        self._asked.release()
        assert self.disk_answers.wait(BOUND)
        return super().next()


class Recording:
    """A connection that keeps what it received."""

    def __init__(self, connection: socket.socket) -> None:
        self._connection = connection
        self.received = bytearray()
        self.settimeout, self.sendall = connection.settimeout, connection.sendall

    def recv(self, size: int) -> bytes:
        chunk = self._connection.recv(size)
        self.received += chunk
        return chunk


class Truncated:
    """A connection that ends after `kept` sent bytes."""

    def __init__(self, connection: socket.socket, kept: int) -> None:
        self._connection = connection
        self._kept = kept
        self.settimeout, self.recv = connection.settimeout, connection.recv

    def sendall(self, data: bytes) -> None:
        self._connection.sendall(data[: self._kept])
        self._connection.shutdown(socket.SHUT_WR)

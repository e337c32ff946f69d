"""`job=registry` and `job=status` as a person starts them."""

import contextlib
import json
import os
import pty
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
from support.processes import free_port
from support.records import target_record
from support.waiting import until

from eagle_rpc.errors import ConnectionLost, NameTaken, WaitTimeout
from eagle_rpc.registry import RegistryClient, load_token, register

pytestmark = pytest.mark.rpc

PATIENCE = 60.0
TARGET = target_record({"draining": False})


class Place:
    """An address and a token file of a test's own."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.address = f"127.0.0.1:{free_port()}"
        self.token_file = directory / "secret" / "token"
        self.overrides = [f"rpc.registry={self.address}", f"rpc.token_file={self.token_file}"]

    def command(self, job: str, *overrides: str) -> list[str]:
        return [sys.executable, "-m", "eagle_rpc", f"job={job}", *self.overrides, *overrides]

    def client(self) -> RegistryClient:
        return RegistryClient(self.address, load_token(self.token_file), timeout=PATIENCE)

    @contextlib.contextmanager
    def registry(self, *overrides: str) -> Iterator[tuple[subprocess.Popen[str], RegistryClient]]:
        process = subprocess.Popen(
            self.command("registry", *overrides),
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        )
        try:
            self._wait_until(process, self.token_file.exists)
            client = self.client()
            self._wait_until(process, lambda: answers(client))
            yield process, client
        finally:
            process.kill()
            process.wait()
            process.stderr.close()

    def _wait_until(self, process: subprocess.Popen[str], holds: Callable[[], bool]) -> None:
        def holds_or_has_ended() -> bool:
            assert process.poll() is None, process.stderr.read()
            return holds()

        until(holds_or_has_ended, "the registry answers", seconds=PATIENCE)


def answers(client: RegistryClient) -> bool:
    try:
        client.living()
    except ConnectionLost:
        return False
    return True


@pytest.fixture
def place(tmp_path) -> Place:
    return Place(tmp_path)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_it_serves_until_it_is_told_to_stop_and_leaves_nothing(place: Place, number: int):
    with place.registry() as (process, client):
        client.announce(TARGET)
        assert client.records()[0].record == TARGET
        process.send_signal(number)
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0
    assert f"registry the registry listens on {place.address}, its token is in {place.token_file}" in log
    with socket.socket() as free:
        free.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        free.bind(("127.0.0.1", int(place.address.rpartition(":")[2])))
    left = sorted(str(path.relative_to(place.directory)) for path in place.directory.rglob("*"))
    assert left == ["secret", "secret/token"]


def test_its_log_and_its_last_words_are_json_where_it_is_told_to(place: Place):
    with place.registry("run.log_format=json") as (process, _):
        second = subprocess.run(
            place.command("registry", "run.log_format=json"),
            cwd=place.directory,
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        process.terminate()
        _, log = process.communicate(timeout=30)
    said = [json.loads(line) for line in log.splitlines()]
    assert {(one["worker"], one["level"]) for one in said} == {("registry", "info")}
    (refusal,) = map(json.loads, second.stderr.splitlines())
    assert refusal["level"] == "error" and "rpc.registry must be a free address" in refusal["message"]


def test_it_listens_on_its_address_alone_without_torch_and_idles(place: Place):
    with place.registry() as (process, _):
        seen = psutil.Process(process.pid)
        listening = [one.laddr[:2] for one in seen.net_connections() if one.status == psutil.CONN_LISTEN]
        assert [f"{host}:{port}" for host, port in listening] == [place.address]
        mapped = {Path(one.path).name for one in seen.memory_maps()}
        assert not any("torch" in name for name in mapped)
        assert seen.memory_info().rss < 100 * 2**20
        before, started = sum(seen.cpu_times()[:2]), time.monotonic()
        with pytest.raises(subprocess.TimeoutExpired):
            process.wait(4)
        busy = (sum(seen.cpu_times()[:2]) - before) / (time.monotonic() - started)
        assert busy < 0.02


def test_after_a_kill_ids_go_on_and_a_living_worker_keeps_its_name(place: Place):
    with place.registry() as (process, client):
        holder = replace(TARGET, id=client.new_id())
        client.announce(holder)
        process.kill()
        process.wait()
        with pytest.raises(ConnectionLost):
            client.new_id()
    with place.registry("rpc.heartbeat_interval=15") as (_, client):
        newcomer = replace(TARGET, id=client.new_id(), incarnation="cd" * 8)
        assert newcomer.id == holder.id + 1
        with pytest.raises(NameTaken, match="restarted registry"):
            client.announce(newcomer)
        client.announce(holder)
        assert client.records()[0].record == holder


def test_a_dead_workers_name_goes_to_its_successor(place: Place):
    with place.registry("rpc.heartbeat_interval=0.5") as (_, client):
        client.announce(TARGET)
        successor = replace(TARGET, id=2, incarnation="cd" * 8)
        register(client, successor, PATIENCE, threading.Event())
        assert client.records()[0].record == successor


def test_a_registry_that_was_stopped_does_not_take_its_own_silence_for_the_workers(place: Place):
    with place.registry("rpc.heartbeat_interval=5", "rpc.heartbeat_misses=1") as (process, client):
        client.announce(TARGET)
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(WaitTimeout):
            RegistryClient(place.address, load_token(place.token_file), timeout=6).records()
        process.send_signal(signal.SIGCONT)
        with pytest.raises(NameTaken, match="incarnation abababab"):
            client.announce(replace(TARGET, id=2, incarnation="cd" * 8))


def test_an_address_off_the_interface_is_refused_with_both_named(place: Place):
    for address in ("0.0.0.0:29711", "127.0.0.2:29711"):
        done = subprocess.run(
            [*place.command("registry"), f"rpc.registry={address}"],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == 1
        assert (
            f"rpc.registry must be on rpc.interface lo, whose address is 127.0.0.1, got {address}"
            in done.stderr
        )
    assert not place.token_file.exists()


def test_a_token_that_others_may_read_is_refused(place: Place):
    place.token_file.parent.mkdir()
    place.token_file.write_text("ab" * 32)
    place.token_file.chmod(0o644)
    for job in ("registry", "status"):
        done = subprocess.run(place.command(job), capture_output=True, text=True, timeout=60, check=False)
        assert (
            done.returncode == 1 and "AccessRefused: rpc.token_file must be for its owner only" in done.stderr
        )


def test_status_looks_again_until_it_is_told_to_stop_outages_included(place: Place):
    with place.registry() as (process, client):
        client.announce(TARGET)
        watch = subprocess.Popen(
            place.command("status", "job.status_watch=0.1", "job.status_json=true"),
            cwd=place.directory,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            assert '"name": "target0"' in watch.stdout.readline()
            process.kill()
            while '"error": "ConnectionLost: ' not in (line := watch.stdout.readline()):
                assert '"name": "target0"' in line
            watch.send_signal(signal.SIGINT)
            _, log = watch.communicate(timeout=30)
            assert (watch.returncode, log) == (0, "")
        finally:
            watch.kill()
            watch.wait()


def test_watching_on_a_terminal_gives_the_screen_back(place: Place):
    with place.registry() as (_, client):
        client.announce(TARGET)
        ours, terminal = pty.openpty()
        watch = subprocess.Popen(
            place.command("status", "job.status_watch=0.1"),
            cwd=place.directory,
            stdin=subprocess.DEVNULL,
            stdout=terminal,
            stderr=terminal,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "40"},
        )
        os.close(terminal)
        try:
            shown = read_until(ours, b"target0")
            watch.send_signal(signal.SIGINT)
            shown += read_until(ours, b"\x1b[?1049l")
            assert watch.wait(30) == 0
        finally:
            watch.kill()
            watch.wait()
            os.close(ours)
    assert shown.index(b"\x1b[?1049h") < shown.index(b"target0")


def read_until(terminal: int, mark: bytes) -> bytes:
    """What appears on a terminal up to `mark`; the test's own time limit bounds it."""
    shown = b""
    while mark not in shown:
        shown += os.read(terminal, 4096)
    return shown


def test_a_flood_of_garbage_neither_ends_nor_fattens_it(place: Place):
    with place.registry() as (process, client):
        client.announce(TARGET)
        host, port = place.address.split(":")

        def attack(number: int) -> None:
            with (
                contextlib.suppress(ConnectionError),
                socket.create_connection((host, int(port)), timeout=30) as connection,
            ):
                connection.sendall(random.Random(number).randbytes(2000))

        with ThreadPoolExecutor(8) as attackers:
            for _ in attackers.map(attack, range(1000)):
                pass
        client.announce(TARGET)
        assert client.records()[0].record == TARGET
        assert psutil.Process(process.pid).memory_info().rss < 100 * 2**20
        process.terminate()
        _, log = process.communicate(timeout=30)
        assert process.returncode == 0
    assert 1 <= log.count("connections refused") <= 10 and "Traceback" not in log


def test_one_look_at_nothing_is_one_clear_line(place: Place):
    with place.registry():
        pass
    done = subprocess.run(place.command("status"), capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"the registry at {place.address} cannot be reached" in line

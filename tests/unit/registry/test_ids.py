import os
import time
from concurrent.futures import ThreadPoolExecutor

import filelock
import pytest
from registry_cases import BOUND

from eagle_rpc.errors import ConfigError, WaitTimeout
from eagle_rpc.registry import LAST_WORKER_ID, IdFile


@pytest.fixture
def slow_disk(monkeypatch) -> list[int]:
    """Keeps every write waiting for 50 ms, and lists them."""
    written: list[int] = []

    def sync(descriptor: int) -> None:
        written.append(descriptor)
        time.sleep(0.05)

    monkeypatch.setattr(os, "fsync", sync)
    return written


def test_ids_ascend_from_one_and_go_on_after_a_restart(tmp_path):
    path = tmp_path / "ids"
    assert [IdFile(path).next(), IdFile(path).next(), IdFile(path).next()] == [1, 2, 3]
    assert IdFile(path).last() == 3


def test_registries_that_share_the_file_hand_out_different_ids(tmp_path):
    def take(_: int) -> list[int]:
        own = IdFile(tmp_path / "ids", lock_seconds=BOUND)
        return [own.next() for _ in range(25)]

    with ThreadPoolExecutor(4) as threads:
        taken = [value for values in threads.map(take, range(4)) for value in values]
    assert sorted(taken) == list(range(1, 101))


def test_the_last_id_is_followed_by_a_clear_error(tmp_path):
    path = tmp_path / "ids"
    path.write_text(f"{LAST_WORKER_ID - 1}\n")
    ids = IdFile(path)
    assert ids.next() == LAST_WORKER_ID
    for _ in range(2):
        with pytest.raises(ConfigError, match=r"16383 are used: .* remove .*ids"):
            ids.next()
    assert ids.last() == LAST_WORKER_ID


def test_a_crowd_at_the_end_gets_what_is_left(tmp_path, slow_disk):
    path = tmp_path / "ids"
    path.write_text(f"{LAST_WORKER_ID - 20}\n")
    ids = IdFile(path, lock_seconds=BOUND)

    def take(_: int) -> int | None:
        try:
            return ids.next()
        except ConfigError:
            return None

    with ThreadPoolExecutor(40) as threads:
        taken = [value for value in threads.map(take, range(40)) if value is not None]
    assert sorted(taken) == list(range(LAST_WORKER_ID - 19, LAST_WORKER_ID + 1))


def test_a_crowd_is_served_by_few_writes_and_wastes_no_id(tmp_path, slow_disk):
    ids = IdFile(tmp_path / "ids", lock_seconds=BOUND)
    with ThreadPoolExecutor(100) as threads:
        taken = list(threads.map(lambda _: ids.next(), range(100)))
    assert sorted(taken) == list(range(1, 101)) and ids.last() == 100
    assert len(slow_disk) < 100


@pytest.mark.parametrize("text", ["", "seven", "-1", "40000", "\xff"])
def test_a_damaged_file_is_refused_instead_of_starting_over(tmp_path, text: str):
    path = tmp_path / "ids"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="ids must hold"):
        IdFile(path).next()


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "ids.lock").mkdir()
    with pytest.raises(ConfigError, match=r"ids must be a file that the registry may read and replace"):
        IdFile(tmp_path / "ids").next()


def test_a_lock_that_somebody_keeps_is_waited_for_within_a_bound(tmp_path):
    with filelock.FileLock(tmp_path / "ids.lock"):
        ids = IdFile(tmp_path / "ids", lock_seconds=0.1)
        with ThreadPoolExecutor(8) as threads:
            waiting = [threads.submit(ids.next) for _ in range(8)]
        for one in waiting:
            with pytest.raises(WaitTimeout, match=r"waited 0\.1 s for the lock"):
                one.result()
    assert IdFile(tmp_path / "ids").next() == 1

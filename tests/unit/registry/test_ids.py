import fcntl
import os
from concurrent.futures import ThreadPoolExecutor

import pytest

from eagle_rpc.errors import ConfigError, WaitTimeout
from eagle_rpc.registry import LAST_ID, IdFile


def test_ids_ascend_from_one_and_go_on_after_a_restart(tmp_path):
    path = tmp_path / "ids"
    assert [IdFile(path).next(), IdFile(path).next(), IdFile(path).next()] == [1, 2, 3]
    assert IdFile(path).last() == 3


def test_registries_that_share_the_file_hand_out_different_ids(tmp_path):
    def take(_: int) -> list[int]:
        own = IdFile(tmp_path / "ids")
        return [own.next() for _ in range(25)]

    with ThreadPoolExecutor(4) as threads:
        taken = [value for values in threads.map(take, range(4)) for value in values]
    assert sorted(taken) == list(range(1, 101))


def test_the_last_id_is_followed_by_a_clear_error(tmp_path):
    path = tmp_path / "ids"
    path.write_text(f"{LAST_ID - 1}\n")
    assert IdFile(path).next() == LAST_ID
    with pytest.raises(ConfigError, match=r"32767 are used: .* remove .*ids"):
        IdFile(path).next()
    assert IdFile(path).last() == LAST_ID


@pytest.mark.parametrize("text", ["", "seven", "-1", "40000", "\xff"])
def test_a_damaged_file_is_refused_instead_of_starting_over(tmp_path, text: str):
    path = tmp_path / "ids"
    path.write_text(text, encoding="latin-1")
    with pytest.raises(ConfigError, match="ids must hold"):
        IdFile(path).next()


def test_a_directory_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "ids.next").mkdir()
    with pytest.raises(ConfigError, match=r"ids must be a file that the registry may read and replace"):
        IdFile(tmp_path / "ids").next()


def test_a_lock_that_somebody_keeps_is_waited_for_within_a_bound(tmp_path):
    held = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(held, fcntl.LOCK_EX)
    try:
        with pytest.raises(WaitTimeout, match="lock"):
            IdFile(tmp_path / "ids").next()
    finally:
        os.close(held)
    assert IdFile(tmp_path / "ids").next() == 1

import stat
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from eagle_rpc.errors import AccessRefused, ConfigError
from eagle_rpc.registry import load_or_create_token, load_token


def test_a_new_token_is_random_and_for_its_owner_only(tmp_path):
    first, second = tmp_path / "a" / "b" / "token", tmp_path / "other"
    token = load_or_create_token(first)
    assert len(token) == 32 and token != load_or_create_token(second)
    assert stat.S_IMODE(first.stat().st_mode) == 0o600
    assert [stat.S_IMODE(one.stat().st_mode) for one in (first.parent, first.parent.parent)] == [0o700, 0o700]
    assert load_token(first) == load_or_create_token(first) == token
    assert [one.name for one in first.parent.iterdir()] == ["token"]


def test_makers_that_meet_agree_on_one_token(tmp_path):
    with ThreadPoolExecutor(8) as threads:
        tokens = set(threads.map(lambda _: load_or_create_token(tmp_path / "new" / "token"), range(32)))
    assert len(tokens) == 1


def test_home_is_expanded(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    token = load_or_create_token(Path("~/secret/token"))
    assert (tmp_path / "secret" / "token").read_text().strip() == token.hex()
    assert load_token(Path("~/secret/token")) == token


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o610])
def test_a_file_that_others_may_access_is_refused(tmp_path, mode: int):
    path = tmp_path / "token"
    load_or_create_token(path)
    path.chmod(mode)
    for load in (load_token, load_or_create_token):
        with pytest.raises(AccessRefused, match=f"0600.*{mode:04o}"):
            load(path)


@pytest.mark.parametrize(
    ("content", "rule"),
    [
        (b"", "at least 32"),
        (b"ab" * 31, "at least 32"),
        (b"zz" * 32, "hexadecimal"),
        (b"\xff" * 64, "hexadecimal"),
    ],
)
def test_a_file_without_a_token_is_refused(tmp_path, content: bytes, rule: str):
    path = tmp_path / "token"
    path.touch(mode=0o600)
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=rule):
        load_token(path)


def test_an_absent_file_is_not_made_by_who_only_reads_it(tmp_path):
    with pytest.raises(ConfigError, match="the registry's host makes it"):
        load_token(tmp_path / "token")
    assert list(tmp_path.iterdir()) == []

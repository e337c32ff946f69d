"""Files and directories are replaced as a whole or not at all."""

from pathlib import Path

import pytest

from eagle_rpc.process.files import remove_unfinished, replaced_directory, replaced_file


def test_a_file_is_the_new_one_once_it_is_whole(tmp_path: Path):
    path = tmp_path / "deep" / "figures.json"
    for content in ("old", "new"):
        with replaced_file(path) as fresh:
            fresh.write_text(content)
    assert path.read_text() == "new" and [path.name] == [one.name for one in path.parent.iterdir()]


def test_a_failure_keeps_the_old_file_and_leaves_nothing_beside_it(tmp_path: Path):
    path = tmp_path / "figures.json"
    path.write_text("old")
    with pytest.raises(RuntimeError), replaced_file(path) as fresh:
        fresh.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


def test_a_directory_is_replaced_with_all_of_its_files(tmp_path: Path):
    path = tmp_path / "export"
    for name in ("old", "new"):
        with replaced_directory(path) as fresh:
            (fresh / name).write_text(name)
    assert [one.name for one in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def test_a_failure_keeps_the_old_directory(tmp_path: Path):
    path = tmp_path / "export"
    with replaced_directory(path) as fresh:
        (fresh / "old").write_text("old")
    with pytest.raises(RuntimeError), replaced_directory(path) as fresh:
        (fresh / "half").write_text("half")
        raise RuntimeError
    assert [one.name for one in path.iterdir()] == ["old"] and list(tmp_path.iterdir()) == [path]


def test_what_a_kill_left_is_cleared(tmp_path: Path):
    (tmp_path / ".step_3.new").mkdir()
    (tmp_path / ".target.safetensors.1234abcd.new").write_text("half")
    (tmp_path / "step_2").mkdir()
    remove_unfinished(tmp_path)
    assert [one.name for one in tmp_path.iterdir()] == ["step_2"]

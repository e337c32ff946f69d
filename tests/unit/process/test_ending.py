"""Every error ends in one paragraph, in the terminal, in the log and for torchrun."""

import errno
import json
import logging
import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from eagle_rpc.config.choices import LogFormat
from eagle_rpc.config.schema import Config
from eagle_rpc.errors import ConfigError, DataError
from eagle_rpc.process import ending
from eagle_rpc.process.ending import end_with, in_words
from eagle_rpc.process.files import replaced_directory, replaced_file
from eagle_rpc.process.logs import setup_logging


@pytest.fixture
def config(tmp_path: Path) -> Config:
    config = Config()
    config.run.dir, config.run.cache_dir = str(tmp_path / "runs/a"), str(tmp_path / "cache")
    config.regenerate.output = config.data.train_path = f"{config.run.dir}/answers.jsonl"
    return config


@pytest.fixture
def log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    package = logging.getLogger("eagle_rpc")
    level = package.level
    setup_logging("trainer0", tmp_path / "trainer0.log")
    yield tmp_path / "trainer0.log"
    for handler in [one for one in logging.getLogger().handlers if one.get_name() == "eagle_rpc.worker"]:
        logging.getLogger().removeHandler(handler)
        handler.close()
    package.setLevel(level)
    logging.captureWarnings(False)


def os_error(number: int, file: Path | str | None = None) -> OSError:
    return OSError(number, os.strerror(number), None if file is None else str(file))


def test_an_error_of_a_file_names_the_setting_above_it_with_rule_and_value(config: Config, tmp_path: Path):
    cases = {
        tmp_path / "cache/model.lock": f"run.cache_dir must be usable, got {tmp_path}/cache",
        tmp_path / "runs/a": f"run.dir must be usable, got {tmp_path}/runs/a: Permission denied",
        tmp_path / "runs/a/answers.jsonl": "data.train_path and regenerate.output must be usable",
        Path("/elsewhere/x"): "/elsewhere/x must be usable: Permission denied",
    }
    for file, words in cases.items():
        text = in_words(os_error(errno.EACCES, file), config)
        assert text.startswith(f"PermissionError: {words}") and "\n" not in text
    inside = in_words(os_error(errno.EACCES, tmp_path / "cache/model.lock"), config)
    assert inside.endswith(f"Permission denied ({tmp_path}/cache/model.lock)")


def test_a_full_disk_is_found_also_where_a_write_does_not_name_its_file(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(ending, "_is_full", lambda path: path == tmp_path / "cache")
    text = in_words(os_error(errno.ENOSPC), config)
    assert (
        text
        == f"OSError: run.cache_dir must have room on its disk, got {tmp_path}/cache: No space left on device"
    )
    monkeypatch.setattr(ending, "_is_full", lambda path: False)
    assert (
        in_words(os_error(errno.ENOSPC))
        == "OSError: a file must have room on its disk: No space left on device"
    )


def test_an_error_of_the_project_is_one_line_in_terminal_log_and_torchruns_file(
    log: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    with pytest.raises(SystemExit) as ended:
        end_with(DataError("chats.jsonl, line 3: no messages"))
    assert ended.value.code == 1
    terminal = capsys.readouterr().err
    assert terminal.endswith(" trainer0 error: DataError: chats.jsonl, line 3: no messages\n")
    assert log.read_text() == terminal and "Traceback" not in terminal
    told = json.loads((tmp_path / "error.json").read_text())["message"]
    assert (
        told["message"] == told["extraInfo"]["py_callstack"] == "DataError: chats.jsonl, line 3: no messages"
    )


@pytest.mark.parametrize("error", [KeyError("added_tokens"), os_error(errno.EIO, "x")])
def test_the_log_file_keeps_the_traceback_that_the_terminal_does_not_show(
    error: Exception, log: Path, capsys: pytest.CaptureFixture[str]
):
    try:
        raise error
    except (KeyError, OSError) as raised:
        with pytest.raises(SystemExit):
            end_with(raised)
    terminal = capsys.readouterr().err
    assert "Traceback" in log.read_text() and "Traceback" not in terminal
    assert len(terminal.splitlines()) == 1
    if isinstance(error, KeyError):
        assert "a mistake in this program, not in its input: KeyError: 'added_tokens'" in terminal
        assert f"(the traceback is in {log})" in terminal


def test_a_mistake_that_all_workers_of_a_host_meet_is_said_by_the_first(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    for rank in ("1", "0"):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with pytest.raises(SystemExit):
            end_with(ConfigError("train.batch_size must be positive, got 0"))
        assert caplog.messages == ["ConfigError: train.batch_size must be positive, got 0"] * (rank == "0")


@pytest.mark.parametrize("to_file", [True, False])
def test_in_json_the_last_words_are_one_object_with_the_traceback_of_a_mistake(
    to_file: bool, log: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    setup_logging("trainer0", log if to_file else None, log_format=LogFormat.json)
    for error, has_traceback in ((KeyError("lost"), True), (ConfigError("x must be y, got z"), False)):
        try:
            raise error
        except (KeyError, ConfigError) as raised:
            with pytest.raises(SystemExit):
                end_with(raised)
        (line,) = capsys.readouterr().err.splitlines()
        said = json.loads(line)
        assert said["level"] == "error" and type(error).__name__ in said["message"]
        assert ("Traceback" in said.get("exception", "")) is has_traceback


def test_a_log_that_cannot_be_written_is_said_once_and_the_terminal_goes_on(
    log: Path, capsys: pytest.CaptureFixture[str]
):
    setup_logging("trainer0", Path("/dev/full"))
    for step in range(3):
        logging.getLogger("eagle_rpc").info("step %d", step)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" ", 1)[1] for line in lines if "step" in line] == [
        f"trainer0 step {n}" for n in range(3)
    ]
    assert [line.split(" ", 1)[1] for line in lines if "step" not in line] == [
        "trainer0 warning: no longer writing /dev/full: [Errno 28] No space left on device"
    ]


FULL = """
import sys
from pathlib import Path
from safetensors.numpy import save_file
import numpy
from eagle_rpc.process.files import replaced_directory, replaced_file
from eagle_rpc.process.ending import in_words
path = Path(sys.argv[1])
try:
    if path.suffix:
        with replaced_file(path) as fresh:
            fresh.write_bytes(bytes(1 << 20))
    else:
        with replaced_directory(path) as fresh:
            save_file({"weight": numpy.zeros(1 << 18, dtype=numpy.float32)}, fresh / "x.safetensors")
except OSError as error:
    print(in_words(error))
"""


@pytest.mark.parametrize("name", ["figures.json", "step_4"])
def test_a_write_beyond_the_room_names_the_file_and_keeps_its_earlier_content(tmp_path: Path, name: str):
    path = tmp_path / name
    if path.suffix:
        with replaced_file(path) as fresh:
            fresh.write_text("whole")
    else:
        with replaced_directory(path) as fresh:
            (fresh / "whole").touch()
    limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 18, 1 << 18))  # noqa: E731
    command = [sys.executable, "-c", FULL, str(path)]
    done = subprocess.run(command, preexec_fn=limit, capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.startswith(f"OSError: {path} must be usable: File too large")
    kept = path.read_text() if path.suffix else next(path.iterdir()).name
    assert kept == "whole" and list(tmp_path.iterdir()) == [path]

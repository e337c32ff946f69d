import datetime
import io
import json
import logging
import re
import warnings

import pytest
from tqdm import tqdm

from eagle_rpc.config.choices import LogFormat
from eagle_rpc.process.logs import message_of, setup_logging

PREFIX = r"\d\d:\d\d:\d\d trainer0 "


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(autouse=True)
def restored_logging():
    root, package = logging.getLogger(), logging.getLogger("eagle_rpc")
    handlers, level = list(root.handlers), package.level
    yield
    for handler in [handler for handler in root.handlers if handler not in handlers]:
        root.removeHandler(handler)
        handler.close()
    package.setLevel(level)
    logging.captureWarnings(False)


def test_lines_go_to_stderr_and_to_the_workers_file(tmp_path, capsys):
    setup_logging("trainer0", tmp_path / "logs" / "trainer0.log")
    logging.getLogger("eagle_rpc.train").info("step %d", 3)
    logging.getLogger("somebody.else").info("chatter")
    logging.getLogger("somebody.else").warning("trouble")
    written = (tmp_path / "logs" / "trainer0.log").read_text()
    assert capsys.readouterr().err == written
    assert re.fullmatch(f"{PREFIX}step 3\n{PREFIX}warning: trouble\n", written)


def test_a_second_call_replaces_the_first(tmp_path, capsys):
    setup_logging("early", tmp_path / "early.log")
    setup_logging("trainer0", tmp_path / "trainer0.log", logging.WARNING)
    logging.getLogger("eagle_rpc.train").info("quiet")
    logging.getLogger("eagle_rpc.train").error("loud")
    assert re.fullmatch(f"{PREFIX}error: loud\n", capsys.readouterr().err)
    assert (tmp_path / "early.log").read_text() == ""


def test_every_line_of_a_traceback_is_prefixed(capsys):
    setup_logging("trainer0")
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("eagle_rpc").exception("failed")
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) > 4
    assert all(re.match(PREFIX, line) for line in lines)


def test_a_line_does_not_run_into_a_bar(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr("sys.stderr", terminal)
    setup_logging("trainer0")
    with tqdm(total=2, file=terminal, mininterval=0) as bar:
        bar.update()
        logging.getLogger("eagle_rpc").info("between")
        bar.update()
    pieces = re.split("[\r\n]", terminal.getvalue())
    assert sum("between" in piece for piece in pieces) == 1
    assert any(re.fullmatch(f"{PREFIX}between", piece) for piece in pieces)


def test_in_json_each_line_is_an_object_with_the_traceback_as_a_field(tmp_path, capsys):
    setup_logging("trainer0", tmp_path / "trainer0.log", log_format=LogFormat.json)
    logging.getLogger("eagle_rpc.train").info('step %d\nof "many" \u00e9', 3)
    try:
        raise ValueError("two\nlines")
    except ValueError:
        logging.getLogger("eagle_rpc").exception("failed")
    warnings.warn("old", stacklevel=1)
    written = capsys.readouterr().err
    assert (tmp_path / "trainer0.log").read_text() == written
    first, second, third = map(json.loads, written.splitlines())
    assert datetime.datetime.fromisoformat(first.pop("time")).utcoffset() == datetime.timedelta()
    message = 'step 3\nof "many" \u00e9'
    assert first == {
        "level": "info",
        "worker": "trainer0",
        "logger": "eagle_rpc.train",
        "message": message,
    }
    assert second["level"] == "error" and second["message"] == "failed"
    assert second["exception"].startswith("Traceback") and second["exception"].endswith("two\nlines")
    assert (third["logger"], third["level"]) == ("py.warnings", "warning") and "old" in third["message"]


def test_the_message_of_a_line_is_found_in_either_form(capsys):
    for log_format in LogFormat:
        setup_logging("trainer0", log_format=log_format)
        logging.getLogger("eagle_rpc").error("ConfigError: no {}")
        assert message_of(capsys.readouterr().err.rstrip()) == "ConfigError: no {}"
    assert message_of("[1, 2]") == "[1, 2]"


def test_on_a_terminal_a_line_erases_the_bar_of_another_worker(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr("sys.stderr", terminal)
    setup_logging("target0")
    terminal.write("50%|##  | 3/6")  # of trainer0, in a process of its own
    logging.getLogger("eagle_rpc.service").info("draining")
    assert re.fullmatch(r"50%\|##  \| 3/6\r\x1b\[K\d\d:\d\d:\d\d target0 draining\n", terminal.getvalue())


def test_elsewhere_a_line_has_no_marks_of_terminals(capsys):
    setup_logging("target0")
    logging.getLogger("eagle_rpc.service").info("draining")
    assert "\x1b" not in capsys.readouterr().err

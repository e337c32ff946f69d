import os
import sys
import threading
from pathlib import Path

import pytest
from support.waiting import until

from eagle_rpc.errors import WaitTimeout
from eagle_rpc.process.children import job_command, last_lines, run_child

WAIT = 60.0


def run(code: str, log: Path, *, seconds: float = WAIT, stop: threading.Event | None = None) -> int:
    command = [sys.executable, "-c", code]
    return run_child(command, "the child", log=log, seconds=seconds, stop=stop or threading.Event())


def test_a_command_line_has_a_torchrun_of_its_own_if_it_needs_one():
    assert job_command(["job=export"]) == [sys.executable, "-m", "eagle_rpc", "job=export"]
    train = job_command(["job=train"], num_workers=3)
    assert train[1:3] == ["-m", "eagle_rpc.process.launcher"] and "--nproc-per-node=3" in train
    assert train[-3:] == ["-m", "eagle_rpc", "job=train"]


def test_the_exit_code_is_told_and_the_output_kept(tmp_path: Path):
    log = tmp_path / "logs" / "child.log"
    assert run("import sys; print('one'); print('two', file=sys.stderr); sys.exit(3)", log) == 3
    assert run("print('three')", log) == 0
    assert sorted(log.read_text().split()) == ["one", "three", "two"]
    assert last_lines(log, 1) == "three"


def test_a_child_is_no_worker_of_the_torchrun_around_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("RANK", "LOCAL_WORLD_SIZE", "ROLE_NAME", "MASTER_PORT", "TORCHELASTIC_RUN_ID"):
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("KEPT", "1")
    log = tmp_path / "child.log"
    run("import os; print(*os.environ, sep='\\n')", log)
    names = log.read_text().split()
    assert "KEPT" in names
    assert not [
        name for name in names if "RANK" in name or name.startswith(("TORCHELASTIC", "MASTER", "ROLE"))
    ]


def test_a_child_beyond_its_bound_is_ended_and_named(tmp_path: Path):
    with pytest.raises(WaitTimeout, match=r"gave up waiting for the child, .* see .*child\.log"):
        run("import time; time.sleep(1000)", tmp_path / "child.log", seconds=0.3)


def test_a_stop_reaches_the_child_once_as_sigterm(tmp_path: Path):
    log, stop = tmp_path / "child.log", threading.Event()
    code = (
        "import os, signal, sys\n"
        "signal.signal(signal.SIGTERM, lambda *_: (print('told', flush=True), sys.exit(7)))\n"
        "print(os.getpid(), flush=True)\n"
        "signal.pause()"
    )
    codes: list[int] = []
    thread = threading.Thread(target=lambda: codes.append(run(code, log, stop=stop)))
    thread.start()
    pid = int(until(lambda: log.exists() and log.read_text().strip(), "the child runs", seconds=WAIT))
    stop.set()
    thread.join(WAIT)
    assert codes == [7] and log.read_text().count("told") == 1
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)

"""The reason that ends a failed torchrun."""

import json
from pathlib import Path

import pytest
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from eagle_rpc.process import launcher


def failure(
    rank: int, code: int, file: Path, text: str | None = None, seconds: float = 0.0
) -> ProcessFailure:
    if text is not None:
        extra = {"py_callstack": text, "timestamp": str(int(seconds))}
        file.write_text(json.dumps({"message": {"message": text, "extraInfo": extra}, "seconds": seconds}))
    return ProcessFailure(local_rank=rank, pid=100 + rank, exitcode=code, error_file=str(file))


def ended(monkeypatch: pytest.MonkeyPatch, *failures: ProcessFailure) -> object:
    """The argument of `sys.exit`, which prints text and ends with code 1."""

    def fail(_arguments: list[str]) -> None:
        raise ChildFailedError("job", dict(enumerate(failures)))

    monkeypatch.setattr(launcher, "torchrun", fail)
    monkeypatch.setattr("logging.disable", lambda level: None)
    with pytest.raises(SystemExit) as exit:
        launcher.main()
    return exit.value.code


def test_the_first_worker_that_failed_has_the_word(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    later = failure(0, 1, tmp_path / "0", "ConnectionLost: trainer0 is gone", seconds=20.7)
    first = failure(1, 1, tmp_path / "1", "DataError: chats.jsonl, line 3: no messages", seconds=20.2)
    silent = failure(2, -15, tmp_path / "2")
    words = ended(monkeypatch, later, first, silent)
    assert words == "launch: DataError: chats.jsonl, line 3: no messages"


def test_workers_that_could_not_speak_are_named_with_what_ended_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    words = ended(monkeypatch, failure(1, -9, tmp_path / "1"))
    assert words == "launch: worker 1 (process 101) was ended by SIGKILL before it could say why"
    words = ended(monkeypatch, failure(0, 3, tmp_path / "0"))
    assert words == "launch: worker 0 (process 100) was ended with code 3 before it could say why"

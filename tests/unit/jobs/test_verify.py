import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from eagle_rpc.config import Config
from eagle_rpc.config.choices import VerifySide
from eagle_rpc.config.schema import RunConfig
from eagle_rpc.jobs import verify


def test_what_an_earlier_verification_left_is_gone_before_a_side_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(verify, "write_config", lambda config, path: None)
    monkeypatch.setattr(subprocess, "run", lambda *args, **settings: SimpleNamespace(returncode=0))
    stale = tmp_path / "1x1" / "remote" / "probs" / "checkpoints" / "step_3"
    stale.mkdir(parents=True)
    verify._run_side(
        Config(run=RunConfig(name="verify", dir=str(tmp_path), cache_dir="unused")), "1x1", VerifySide.remote
    )
    assert not stale.exists() and (tmp_path / "1x1" / "remote" / "workers.log").exists()

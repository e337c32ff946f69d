"""The first step of a worker."""

import logging
from pathlib import Path

import pytest
import torch

from eagle_rpc.config.schema import Config
from eagle_rpc.process import startup
from eagle_rpc.process.logs import setup_logging


@pytest.fixture
def config(tmp_path: Path, monkeypatch) -> Config:
    monkeypatch.setattr(startup, "disable_progress_bar", lambda: None)
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "of the user")
    config = Config()
    config.run.dir = str(tmp_path / "run")
    yield config
    setup_logging("test")
    logging.captureWarnings(False)


@pytest.mark.parametrize(("threads", "workers", "expected"), [(0, 2, 3), (0, 100, 1), (5, 2, 5)])
def test_workers_share_the_cores_unless_the_number_of_threads_is_set(
    config: Config, monkeypatch, threads: int, workers: int, expected: int
):
    chosen: list[int] = []
    monkeypatch.setattr(startup, "available_cores", lambda: 6)
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    config.run.threads = threads
    startup.start_worker(config, "trainer0", workers_on_host=workers)
    assert chosen == [expected]


def test_the_log_goes_to_the_run_directory_under_the_workers_name(config: Config, monkeypatch):
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)
    startup.start_worker(config, "trainer0")
    logging.getLogger("eagle_rpc").info("hello")
    assert (Path(config.run.dir) / "logs" / "trainer0.log").read_text().endswith(" trainer0 hello\n")

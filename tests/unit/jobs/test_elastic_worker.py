"""An elastic worker waits for the token file of its registry, and refuses to be where no other host finds it."""

import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from eagle_rpc.config import Config
from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConfigError, WaitTimeout
from eagle_rpc.jobs.elastic_worker import announced, load_registry_token
from eagle_rpc.registry import load_or_create_token
from eagle_rpc.topology import Role


def test_a_token_file_that_appears_later_is_waited_for(tmp_path: Path):
    config = RpcConfig(token_file=str(tmp_path / "token"), start_timeout=60.0)
    with ThreadPoolExecutor(1) as thread:
        waiting = thread.submit(load_registry_token, config, threading.Event())
        token = load_or_create_token(tmp_path / "token")
        assert waiting.result(60) == token


def test_an_absent_token_file_ends_the_wait_with_a_hint(tmp_path: Path):
    config = RpcConfig(token_file=str(tmp_path / "token"), start_timeout=0.0)
    with pytest.raises(WaitTimeout, match=r"the registry to make .*token.*copy the file"):
        load_registry_token(config, threading.Event())


def test_a_stopped_worker_does_not_wait_for_the_token_file(tmp_path: Path):
    stop = threading.Event()
    stop.set()
    with pytest.raises(WaitTimeout, match="stopped before"):
        load_registry_token(RpcConfig(token_file=str(tmp_path / "token"), start_timeout=1000.0), stop)


def test_the_launch_that_hosts_the_registry_makes_the_token_file(tmp_path: Path):
    config = RpcConfig(token_file=str(tmp_path / "token"), host_registry=True)
    assert load_registry_token(config, threading.Event()).hex() == (tmp_path / "token").read_text().strip()


def test_a_worker_on_loopback_is_refused_where_the_registry_is_on_a_network():
    config = Config(rpc=RpcConfig(registry="192.0.2.1:29711"))
    rule = r"rpc\.interface must be one that other hosts reach, since rpc\.registry is 192\.0\.2\.1:29711"
    with pytest.raises(ConfigError, match=rf"{rule}, got lo with 127\.0\.0\.1"):
        announced(
            config,
            "target0",
            Role.target,
            torch.device("cpu"),
            threading.Event(),
            when_superseded=lambda: None,
        )

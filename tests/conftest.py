"""For all tests: the packages `support` and `faults` on the path, one thread, no network."""

import gc
import os
import sys
from pathlib import Path

# Before transformers is imported, which reads it once.
os.environ["HF_HUB_OFFLINE"] = "1"
sys.path.insert(0, str(Path(__file__).parent))

import pytest
import torch


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--all-families", action="store_true", help="also try every family of transformers")
    parser.addoption("--vllm-python", help="Python of an environment with vLLM, in which drafts are served")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup() -> None:
    """Also after a test that set up a worker: the threads of tests side by side would wait for each other."""
    torch.set_num_threads(1)


def pytest_sessionfinish() -> None:
    """pytest's last collections would walk all of torch, for seconds on a busy host."""
    gc.freeze()

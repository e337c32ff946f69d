"""Compiled targets without a compiler."""

import pytest
import torch

from eagle_rpc.target import compiled


@pytest.fixture
def trace_only(monkeypatch):
    """What is compiled is traced, guarded and counted as ever, but runs as torch does, without a minute in a C++ compiler."""
    monkeypatch.setattr(compiled, "_BACKEND", "eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()

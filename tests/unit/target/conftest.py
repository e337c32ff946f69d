"""Compiled targets without a compiler."""

import pytest
import torch

from eagle_rpc.target import compiled


@pytest.fixture
def trace_only(monkeypatch):
    """Compiled code is traced, guarded and counted, but runs eagerly: no minute in a C++ compiler."""
    monkeypatch.setattr(compiled, "_BACKEND", "eager")
    torch.compiler.reset()
    yield
    torch.compiler.reset()

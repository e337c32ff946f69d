"""Code that must not wait for the GPU."""

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def waiting_forbidden() -> Iterator[None]:
    """Meanwhile torch raises where the host would wait for the GPU."""
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")

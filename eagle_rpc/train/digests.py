"""Hashes over every bit of tensors, to compare them between trainers, runs and targets."""

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and all bits."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        bits = tensor.detach().contiguous().cpu().flatten().view(torch.uint8).numpy()
        digest.update(bits)  # type: ignore[arg-type]
    return digest.hexdigest()

"""Hashes of tokenizers, weights and other tensors: by them replicas, drafts and trainers are compared."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

# Values read of each tensor: enough to tell two trainings apart, cheap for 70B parameters.
_SAMPLES = 1024


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of a transformers tokenizer's vocabulary and special tokens."""
    content = {
        "vocab": sorted(tokenizer.get_vocab().items()),
        "special": sorted(map(str, tokenizer.all_special_tokens)),
    }
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes, dtypes and evenly spread values of all parameters."""
    stored = (pair for entry in sorted(model.state_dict().items()) for pair in _plain_tensors(*entry))
    return _digest(stored, _SAMPLES)[:16]


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and all bits."""
    return _digest(tensors, None)


def _digest(tensors: Iterable[tuple[str, Tensor]], samples: int | None) -> str:
    """SHA-256 over names, shapes, dtypes and about `samples` values of each tensor; null: all values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        read = flat if samples is None else flat[:: max(1, flat.numel() // samples)]
        digest.update(read.contiguous().cpu().view(torch.uint8).numpy())  # type: ignore[arg-type]
    return digest.hexdigest()


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor, or the plain tensors of which a tensor subclass (a quantised weight) consists."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{inner}", getattr(tensor, inner))

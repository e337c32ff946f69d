"""Short hashes of tokenizers and weights, by which different replicas and foreign drafts are noticed."""

import hashlib
import json
from collections.abc import Iterator
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
    digest = hashlib.sha256()
    stored = (pair for entry in sorted(model.state_dict().items()) for pair in _plain_tensors(*entry))
    for name, tensor in stored:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous()
        digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor, or the plain tensors of which a tensor subclass (a quantised weight) consists."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{inner}", getattr(tensor, inner))

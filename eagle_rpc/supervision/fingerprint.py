"""Short identities of tokenizers and weights, so that mixed replicas and foreign drafts are noticed."""

import hashlib
import json
from typing import Any

import torch
from torch import nn

# Values read of each tensor: spread evenly, enough to tell any two trainings apart, cheap for 70B parameters.
_SAMPLES = 1024


def tokenizer_fingerprint(tokenizer: Any) -> str:
    """Hash of a transformers tokenizer's vocabulary and special tokens."""
    content = {"vocab": sorted(tokenizer.get_vocab().items()), "special": sorted(map(str, tokenizer.all_special_tokens))}
    return hashlib.sha256(json.dumps(content, ensure_ascii=True).encode()).hexdigest()[:16]


def weights_fingerprint(model: nn.Module) -> str:
    """Hash of names, shapes, dtypes and evenly spread values of all parameters."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        flat = tensor.detach().reshape(-1)
        sample = flat[:: max(1, flat.numel() // _SAMPLES)].contiguous()
        digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]

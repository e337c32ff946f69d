"""Hashes of tokenizers, weights and other tensors: by them replicas, drafts and trainers are compared."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
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
    return combined_fingerprint([weight_samples(model)])


@dataclass(kw_only=True, slots=True)
class WeightSamples:
    """What `weights_fingerprint` reads of some of a model's parameters."""

    names: str  # of entries of the state dict, in its order, each with the number of its bytes: a line each
    content: Tensor  # uint8: of each entry what is hashed, one after the other


def weight_samples(model: nn.Module, owns: Callable[[str], bool] = lambda name: True) -> WeightSamples:
    """The samples of the parameters whose names `owns` accepts."""
    lines, content = [], []
    for name, tensor in model.state_dict().items():
        if owns(name):
            plain = _plain_tensors(name, tensor)
            read = b"".join(bytes(one) for pair in plain for one in _read(*pair, _SAMPLES))
            lines.append(f"{len(read)} {name}")
            content.append(read)
    # A buffer that torch may own; it refuses an empty one.
    whole = bytearray(b"".join(content)) or bytearray(1)
    return WeightSamples(names="\n".join(lines), content=torch.frombuffer(whole, dtype=torch.uint8))


def combined_fingerprint(parts: Sequence[WeightSamples]) -> str:
    """The `weights_fingerprint` of the model whose parameters are those of all `parts`."""
    read: dict[str, bytes] = {}
    for part in parts:
        content, start = part.content.numpy().tobytes(), 0
        for line in part.names.splitlines():
            size, _, name = line.partition(" ")
            read[name] = content[start : start + int(size)]
            start += int(size)
    return hashlib.sha256(b"".join(read[name] for name in sorted(read))).hexdigest()[:16]


def tensors_digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and all bits."""
    return _digest(tensors)


def _digest(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """SHA-256 over names, shapes, dtypes and all values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        for read in _read(name, tensor, None):
            digest.update(read)
    return digest.hexdigest()


def _read(name: str, tensor: Tensor, samples: int | None) -> Iterator[Any]:
    """In bytes: name, shape and dtype of a tensor; about `samples` of its values, or all if it is null."""
    flat = tensor.detach().reshape(-1)
    read = flat if samples is None else flat[:: max(1, flat.numel() // samples)]
    yield f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode()
    yield read.contiguous().cpu().view(torch.uint8).numpy()


def _plain_tensors(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """The tensor, or the plain tensors of which a tensor subclass (a quantised weight) consists."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for inner in tensor.__tensor_flatten__()[0]:
        yield from _plain_tensors(f"{name}.{inner}", getattr(tensor, inner))

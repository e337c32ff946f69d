"""Checks that a model passes before the target relies on a property of it.

Legend: B batch, T sequence, H target hidden.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from transformers import PreTrainedModel

from eagle_rpc.errors import ConfigError, UnsupportedTarget

# Errors of a model's own code that meets an input, a cache, an attention or a kernel that it does not know.
FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    ImportError,
    LookupError,
    RuntimeError,
    TypeError,
    ValueError,
)
# Relative error that rounding explains where two computations multiply matrices of different shapes.
ROUNDING = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 2e-2}
# The same for whole models, as a multiple: the rounding of other attention kernels, and of experts that get
# other rows, grows from layer to layer.
WHOLE_MODEL = 5
# Fields of configurations that name the kinds of layers, and the kinds that do not attend to keys alone.
_LAYER_KINDS = ("layer_types", "layers_block_type", "block_types")
_RECURRENT = frozenset(["conv", "hybrid", "hybrid_sliding", "linear_attention", "mamba", "recurrent"])
# Runs of one shape differ only where experts get other rows: a thousandth of it is no rounding but a leak.
_SAME_SHAPE = 1e-3


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """Norm of the difference over the norm of `expected`; NaN if either contains NaN."""
    actual, expected = actual.float(), expected.float()
    return float((actual - expected).norm() / expected.norm().clamp_min(1e-12))


@contextmanager
def refusing_failures(rule: str) -> Iterator[None]:
    """Turns errors of a model's own code into `UnsupportedTarget`, with the `rule` that the model breaks."""
    try:
        yield
    except (UnsupportedTarget, ConfigError, torch.OutOfMemoryError):
        raise
    except FAILURES as error:
        found = f"{type(error).__name__}: {error}".splitlines()[0]
        raise UnsupportedTarget(f"{rule}, it fails ({found})") from error


def check_causal(run: Callable[[Tensor], Tensor], ids_BT: Tensor, name: str) -> None:
    """Raises `UnsupportedTarget` if later tokens change the last hidden states [B, T, H] that `run` returns.

    Padding on the right of a causal model needs no mask. Hidden states that are not finite are refused too.
    """
    middle = ids_BT.shape[1] // 2
    expected = run(ids_BT)
    if not expected.isfinite().all():
        dtype = str(expected.dtype).removeprefix("torch.")
        advice = "use target.dtype=bfloat16" if dtype == "float16" else "its weights are damaged"
        raise UnsupportedTarget(
            f"{name} must give finite hidden states, they are not finite in {dtype}: {advice}"
        )
    expected = expected[:, :middle]
    error = relative_error(run(_with_other(ids_BT, slice(middle, None)))[:, :middle], expected)
    if not error <= _SAME_SHAPE * WHOLE_MODEL * ROUNDING[expected.dtype]:
        raise UnsupportedTarget(
            f"{name} must be causal, but later tokens change it (relative error {error:.1e})"
        )


def check_embedding(embedding_VH: Tensor, width: int, name: str) -> None:
    """Raises `UnsupportedTarget` unless tokens are embedded with `width` values, as the hidden states have.

    The draft reads the target's token embedding beside its hidden states.
    """
    if embedding_VH.dim() != 2 or embedding_VH.shape[1] != width:
        rule = f"{name} must embed tokens as wide as its hidden states of {width}"
        raise UnsupportedTarget(f"{rule}, got an embedding {list(embedding_VH.shape)}")


def check_packing(
    run: Callable[[Tensor, Tensor | None], Tensor],
    ids_BT: Tensor,
    model: PreTrainedModel,
    decoder: PreTrainedModel,
) -> None:
    """Raises `UnsupportedTarget` unless rows of two chats give what the chats give alone; `run` as `packing_fault`."""
    if recurrent_layers(decoder):
        fault: str | None = "its layers carry a state from token to token"
    else:
        fault = packing_fault(run, ids_BT)
    if fault is not None:
        name = f"{type(model).__name__} with {model.config._attn_implementation} attention"
        raise UnsupportedTarget(f"{name} does not keep packed chats apart ({fault}); send one chat a row")


def recurrent_layers(decoder: PreTrainedModel) -> bool:
    """Whether layers carry a state or a convolution from token to token, across the chats of a row."""
    config = decoder.config
    kinds = {kind for name in _LAYER_KINDS for kind in getattr(config, name, None) or ()}
    return bool(decoder._is_stateful) or not _RECURRENT.isdisjoint(kinds)


def packing_fault(run: Callable[[Tensor, Tensor | None], Tensor], ids_BT: Tensor) -> str | None:
    """How rows of two chats differ from the chats alone, beyond rounding; null if they do not.

    `run` returns last hidden states [B, T, H] of ids and segment ids; without segment ids a row is one chat.
    """
    middle = ids_BT.shape[1] // 2
    chats = slice(0, middle), slice(middle, None)
    segments = (torch.arange(ids_BT.shape[1], device=ids_BT.device) >= middle).long().expand_as(ids_BT)
    packed = run(ids_BT, segments)
    bound = WHOLE_MODEL * ROUNDING[packed.dtype]
    for chat, other in (chats, chats[::-1]):
        leak = relative_error(run(_with_other(ids_BT, other), segments)[:, chat], packed[:, chat])
        if not leak <= _SAME_SHAPE * bound:
            return f"one chat changes another by {leak:.1e}"
        error = relative_error(packed[:, chat], run(ids_BT[:, chat], None))
        if not error <= bound:
            return f"a packed chat differs from the chat alone by {error:.1e}"
    return None


def _with_other(ids_BT: Tensor, columns: slice) -> Tensor:
    """The same ids, with others in `columns`."""
    changed_BT = ids_BT.clone()
    changed_BT[:, columns] = ids_BT.flip(1)[:, columns]
    return changed_BT

"""The parts of a model beside its decoder layers, and whether they run before or behind them."""

import itertools
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, suppress
from functools import partial
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PreTrainedModel

from eagle_rpc.errors import UnsupportedTarget
from eagle_rpc.target.chat_attention import WITHOUT_MASK
from eagle_rpc.target.probes import FAILURES, refusing_failures

FORMS_OF_OUTPUTS = (0, 2, 3)
"""Values of the tuples that decoder layers of transformers return; 0: a tensor."""

# Tokens of the pass, without values, that shows in which order parts run.
_OUTLINE_TOKENS = 8


def path_to(model: nn.Module, part: nn.Module) -> str:
    """The name of a module of the model."""
    return next(name for name, module in model.named_modules() if module is part)


def parts_beside(model: nn.Module, path: str) -> Iterator[tuple[str, nn.Module]]:
    """The largest modules with tensors that neither hold the module at `path` nor are in it, by name."""
    holder, prefix = model, ""
    for name in path.split("."):
        for other, child in holder.named_children():
            if other != name and any(True for _ in itertools.chain(child.parameters(), child.buffers())):
                yield prefix + other, child
        holder, prefix = holder.get_submodule(name), f"{prefix}{name}."


def own_tensors(model: nn.Module, path: str) -> Iterator[str]:
    """Names of weights and buffers of the modules that hold the one at `path`."""
    names = path.split(".")
    for depth in range(len(names)):
        holder = ".".join(names[:depth])
        module = model.get_submodule(holder)
        own = itertools.chain(module.named_parameters(recurse=False), module.named_buffers(recurse=False))
        yield from (f"{holder}.{name}" if holder else name for name, _ in own)


def require_own_weights(layers: nn.ModuleList) -> None:
    """Raises `UnsupportedTarget` for layers that share weights: these would be on several devices.

    Its text follows the name of the model.
    """
    counts = Counter(id(weight) for layer in layers for weight in layer.parameters())
    if any(count > 1 for count in counts.values()):
        raise UnsupportedTarget("whose layers share weights")


def run_behind_layers(
    model: PreTrainedModel, layers: nn.ModuleList, beside: dict[str, nn.Module]
) -> dict[str, bool]:
    """Whether each part that runs does so behind the last layer, not before the first.

    Raises `UnsupportedTarget`, as `require_own_weights`, for a part that runs between two layers, or before and
    behind.
    """
    rule = "whose parts must run in a line"
    calls: list[tuple[str, int]] = []
    *first_forms, last_form = FORMS_OF_OUTPUTS
    for num_values in first_forms:
        with suppress(*FAILURES):
            calls = _outline(model, layers, beside, num_values)
            break
    else:
        with refusing_failures(rule):
            calls = _outline(model, layers, beside, last_form)
    for part, num_done in calls:
        if 0 < num_done < len(layers):
            raise UnsupportedTarget(f"{rule}, {part} runs behind layer {num_done - 1} of {len(layers)}")
    run_behind = {part: bool(num_done) for part, num_done in calls}
    if twice := {part for part, num_done in calls if run_behind[part] != bool(num_done)}:
        raise UnsupportedTarget(f"{rule}, {min(twice)} runs before and behind the layers")
    return run_behind


def _outline(
    model: PreTrainedModel, layers: nn.ModuleList, beside: dict[str, nn.Module], num_values: int
) -> list[tuple[str, int]]:
    """The parts in the order in which a pass calls them, each with the number of layers that are done by then.

    Tensors have no values, layers do nothing, and no mask is made. `num_values` of the tuple that layers return;
    0: they return a tensor.
    """
    calls: list[tuple[str, int]] = []
    num_done = 0

    def identity(hidden: Any = None, *unused: Any, hidden_states: Any = None, **also_unused: Any) -> Any:
        nonlocal num_done
        num_done += 1
        hidden = hidden_states if hidden is None else hidden
        return (hidden, None, None)[:num_values] if num_values else hidden

    def note(part: str, *unused: Any) -> None:
        calls.append((part, num_done))

    configs: list[Any] = [module.config for module in model.modules() if hasattr(module, "config")]
    before = [config._attn_implementation for config in configs]
    with ExitStack() as undone:
        for part, module in beside.items():
            undone.callback(module.register_forward_pre_hook(partial(note, part)).remove)
        for layer in layers:
            layer.forward = identity
            undone.callback(vars(layer).pop, "forward")
        for config, attention in zip(configs, before, strict=True):
            undone.callback(setattr, config, "_attn_implementation", attention)
            config._attn_implementation = WITHOUT_MASK
        undone.enter_context(FakeTensorMode(allow_non_fake_inputs=True))
        undone.enter_context(torch.device("meta"))
        undone.enter_context(torch.inference_mode())
        model(input_ids=torch.zeros(1, _OUTLINE_TOKENS, dtype=torch.int64), use_cache=False)
    return calls

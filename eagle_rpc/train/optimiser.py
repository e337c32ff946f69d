"""AdamW and its learning rate."""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from eagle_rpc.config.schema import TrainConfig

_FUSED_DEVICES = ("cpu", "cuda")


def trainable_parameters(draft: nn.Module) -> dict[str, nn.Parameter]:
    """By name, in the model's order, without the frozen embedding."""
    return {name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad}


def make_optimiser(draft: nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """Matrices decay by `config.weight_decay`, norm weights do not."""
    parameters = list(trainable_parameters(draft).values())
    matrices = [parameter for parameter in parameters if parameter.dim() > 1]
    norms = [parameter for parameter in parameters if parameter.dim() <= 1]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": norms, "weight_decay": 0.0},
    ]
    first_beta, second_beta = config.betas
    fused = parameters[0].device.type in _FUSED_DEVICES
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(first_beta, second_beta), fused=fused)


def learning_rate(step: int, total_steps: int, config: TrainConfig) -> float:
    """Rate of optimiser step `step` (0 <= step < total_steps).

    It rises linearly to `config.learning_rate`, then falls as a cosine and is lowest in the last step.
    """
    warmup_steps = round(config.warmup_share * total_steps)
    if step < warmup_steps:
        return config.learning_rate * (step + 1) / warmup_steps
    progress = (step + 1 - warmup_steps) / (total_steps - warmup_steps)
    lowest = config.min_learning_rate_share
    return config.learning_rate * (lowest + (1 - lowest) * (1 + math.cos(math.pi * progress)) / 2)


def optimiser_tensors(
    optimiser: torch.optim.Optimizer, parameters: dict[str, nn.Parameter]
) -> dict[str, Tensor]:
    """AdamW's state, moments and step counts, as `exp_avg/NAME` and so on. Empty before the first step."""
    return {
        f"{key}/{name}": value
        for name, parameter in parameters.items()
        for key, value in optimiser.state.get(parameter, {}).items()
    }


def load_optimiser_tensors(
    optimiser: torch.optim.Optimizer,
    parameters: dict[str, nn.Parameter],
    tensors: dict[str, Tensor],
    shard_of: Callable[[Tensor, nn.Parameter], Tensor],
) -> None:
    """Restores the result of `optimiser_tensors`, sharded by `MasterWeights.shard_of`."""
    for path, tensor in tensors.items():
        key, _, name = path.partition("/")
        parameter = parameters[name]
        optimiser.state[parameter][key] = shard_of(tensor, parameter)

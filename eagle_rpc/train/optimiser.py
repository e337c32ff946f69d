"""AdamW for all trained parameters, or Muon for the matrices between them."""

import logging
from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from eagle_rpc.config.choices import Optimiser
from eagle_rpc.config.native import native_dtype
from eagle_rpc.config.schema import TrainConfig

logger = logging.getLogger(__name__)

_FUSED_DEVICES = ("cpu", "cuda")
_HEAD, _EMBEDDING = "lm_head.weight", "embed_tokens.weight"


def trainable_parameters(draft: nn.Module) -> dict[str, nn.Parameter]:
    """By name, in the model's order, without a frozen embedding."""
    return {name: parameter for name, parameter in draft.named_parameters() if parameter.requires_grad}


class DraftOptimiser:
    """`config.optimiser` over the parameters of a draft. Matrices decay by `config.weight_decay`; norms do
    not, nor does a trained embedding, most of whose rows have no gradient in a step.

    Muon (https://kellerjordan.github.io/posts/muon) orthogonalises the update of whole matrices between input
    and output: those of the layer and `fc`. Norms, and head and embedding, whose rows are single tokens, stay with
    AdamW.
    Muon's updates are scaled to the root mean square of AdamW's, so both take the same learning rate and
    decay ("Muon is Scalable for LLM Training", arXiv 2502.16982).
    """

    def __init__(self, parameters: Mapping[str, nn.Parameter], config: TrainConfig) -> None:
        self._parameters = parameters
        orthogonalised = {
            name
            for name, parameter in parameters.items()
            if config.optimiser is Optimiser.muon and parameter.dim() == 2 and name not in (_HEAD, _EMBEDDING)
        }
        rate, decay = 0.0, config.weight_decay  # `step` sets the rate
        self._parts: list[torch.optim.Optimizer] = []
        device = next(iter(parameters.values())).device.type
        if orthogonalised:
            if device == "cpu" and native_dtype() != "bfloat16":
                logger.warning(
                    "train.optimiser=muon multiplies bfloat16 matrices, for which this processor has no "
                    "instructions: a step of a draft of real size takes minutes"
                )
            matrices = [parameters[name] for name in parameters if name in orthogonalised]
            muon = torch.optim.Muon(matrices, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw")
            self._parts.append(muon)
        others = {name: parameters[name] for name in parameters if name not in orthogonalised}
        decays = {name for name, parameter in others.items() if parameter.dim() > 1 and name != _EMBEDDING}
        groups = [
            {"params": [others[name] for name in others if name in decays], "weight_decay": decay},
            {"params": [others[name] for name in others if name not in decays], "weight_decay": 0.0},
        ]
        first_beta, second_beta = config.betas
        fused = device in _FUSED_DEVICES
        self._parts.append(torch.optim.AdamW(groups, lr=rate, betas=(first_beta, second_beta), fused=fused))
        self._part_of = {
            parameter: part
            for part in self._parts
            for group in part.param_groups
            for parameter in group["params"]
        }

    def step(self, rate: float) -> None:
        """One step along the gradients in `.grad`, at this learning rate."""
        for part in self._parts:
            for group in part.param_groups:
                group["lr"] = rate
            part.step()

    def tensors(self) -> dict[str, Tensor]:
        """The state as `exp_avg/NAME`, `momentum_buffer/NAME` and so on. Empty before the first step."""
        return {
            f"{key}/{name}": value
            for name, parameter in self._parameters.items()
            for key, value in self._part_of[parameter].state.get(parameter, {}).items()
        }

    def load(self, tensors: Mapping[str, Tensor], shard_of: Callable[[Tensor, nn.Parameter], Tensor]) -> None:
        """Restores the result of `tensors`, sharded by `MasterWeights.shard_of`."""
        for path, tensor in tensors.items():
            key, _, name = path.partition("/")
            parameter = self._parameters[name]
            self._part_of[parameter].state[parameter][key] = shard_of(tensor, parameter)

"""The draft in training: one optimiser step from supervision, and the state that a checkpoint keeps.

Legend: S steps of training-time test.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.draft import Eagle3Draft, Objective, ReferenceStep, TTTStep, count_rows
from eagle_rpc.draft.fused import FusedStep
from eagle_rpc.errors import CheckpointError, ConfigError
from eagle_rpc.supervision import Eagle3TargetBatch
from eagle_rpc.train.distributed import FlatGradients, TrainerGroup, weights_digest
from eagle_rpc.train.metrics import RunningSums
from eagle_rpc.train.optimiser import (
    learning_rate,
    load_optimiser_tensors,
    make_optimiser,
    optimiser_tensors,
    set_learning_rate,
    trainable_parameters,
)

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class StepOutcome:
    """One optimiser step, the same on all trainers."""

    sums: RunningSums  # over its micro-batches and all trainers
    grad_norm: Tensor  # before clipping, scalar
    learning_rate: float


class Learner:
    """The draft with its optimiser, alike on every trainer of `group`.

    Weights are fp32, matrix products run in `config.autocast`. Raises `ConfigError` for a draft of another dtype.
    """

    def __init__(
        self, draft: Eagle3Draft, config: TrainConfig, objective: DraftConfig, group: TrainerGroup, total_steps: int
    ) -> None:
        self.parameters = trainable_parameters(draft)
        for name, parameter in self.parameters.items():
            if parameter.dtype != torch.float32:
                raise ConfigError(f"the draft's {name} must be float32 for training, got {parameter.dtype}")
        self.steps_done = 0
        self.device = draft.fc.weight.device
        self._config = config
        self._objective = objective
        self._group = group
        self._total_steps = total_steps
        self._gradients = FlatGradients(self.parameters.values())
        self._optimiser = make_optimiser(draft, config)
        self._ttt = make_ttt_step(draft, config, objective)

    def learn(self, batches: Sequence[Eagle3TargetBatch]) -> StepOutcome:
        """One optimiser step on this trainer's share of the micro-batches; every trainer has to take part.

        All of the step's supervision is here before its first collective: what RPC receives on a GPU may wait behind one.
        """
        denominators_S = torch.stack([count_rows(batch, self._objective.ttt_steps) for batch in batches]).sum(dim=0)
        self._group.sum_(denominators_S, "supervised rows")
        sums = self.empty_sums()
        self._gradients.zero_()
        for batch in batches:
            sums.add_batch(batch, self._ttt.add_gradients(batch, denominators_S))
        self._group.sum_(sums.flat, "losses")
        self._gradients.sum_(self._group)
        grad_norm = self._gradients.clip_(self._config.max_grad_norm)
        rate = learning_rate(self.steps_done, self._total_steps, self._config)
        set_learning_rate(self._optimiser, rate)
        self._optimiser.step()
        self._ttt.refresh_weights()
        self.steps_done += 1
        return StepOutcome(sums=sums, grad_norm=grad_norm, learning_rate=rate)

    def judge(self, batch: Eagle3TargetBatch, sums: RunningSums) -> None:
        """Adds one batch's figures to `sums` and changes nothing else."""
        sums.add_batch(batch, self._ttt.judge(batch, count_rows(batch, self._objective.ttt_steps)))

    def empty_sums(self) -> RunningSums:
        return RunningSums(self._objective.ttt_steps, self.device)

    def weights_are_finite(self) -> bool:
        return bool(torch.stack([parameter.isfinite().all() for parameter in self.parameters.values()]).all())

    def digest(self) -> str:
        """SHA-256 of weights, optimiser state and step."""
        state = {**self.parameters, **optimiser_tensors(self._optimiser, self.parameters)}
        return weights_digest(state | {"steps_done": torch.tensor([self.steps_done])})

    def optimiser_tensors(self) -> dict[str, Tensor]:
        return optimiser_tensors(self._optimiser, self.parameters)

    @torch.no_grad()
    def load(self, weights: dict[str, Tensor], optimiser: dict[str, Tensor], steps_done: int) -> None:
        """Puts a checkpoint's state in place. Raises `CheckpointError` if its weights are not this draft's."""
        if weights.keys() != self.parameters.keys():
            differing = sorted(weights.keys() ^ self.parameters.keys())
            raise CheckpointError(f"the checkpoint's weights must be {sorted(self.parameters)}, these differ: {differing}")
        for name, parameter in self.parameters.items():
            if weights[name].shape != parameter.shape:
                raise CheckpointError(f"{name} must have shape {list(parameter.shape)}, got {list(weights[name].shape)}")
            parameter.copy_(weights[name])
        load_optimiser_tensors(self._optimiser, self.parameters, optimiser)
        self._ttt.refresh_weights()
        self.steps_done = steps_done


def make_ttt_step(draft: Eagle3Draft, config: TrainConfig, objective: DraftConfig) -> TTTStep:
    """The fused step where a GPU and the configuration allow it, else the reference."""
    dtype = torch.float32 if config.autocast is None else getattr(torch, config.autocast.name)
    rule = Objective(steps=objective.ttt_steps, step_decay=objective.step_decay, loss=objective.loss.value)
    if config.fused and FusedStep.supports(draft, dtype):
        return FusedStep(draft, rule, dtype=dtype, recompute_mlp=config.recompute_mlp)
    if config.recompute_mlp:
        logger.warning(
            "train.recompute_mlp has no effect: it belongs to the fused step, which needs a GPU and train.autocast=bfloat16"
        )
    return ReferenceStep(draft, rule, autocast=None if dtype is torch.float32 else dtype)

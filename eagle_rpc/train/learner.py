"""The draft in training: one optimiser step from supervision, and the state for a checkpoint.

Legend: S steps of training-time test.
"""

import contextlib
import itertools
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from eagle_rpc.config.choices import Precision, Sharding
from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.draft import Eagle3Draft, Objective, ReferenceStep, count_rows
from eagle_rpc.draft.fused import FusedStep, multiplies_fp8
from eagle_rpc.errors import CheckpointError, ConfigError
from eagle_rpc.supervision import Eagle3TargetBatch, tensors_digest
from eagle_rpc.train.aux_noise import AuxNoise
from eagle_rpc.train.averaged_weights import AveragedWeights
from eagle_rpc.train.distributed import TrainerGroup
from eagle_rpc.train.figures import RunningSums
from eagle_rpc.train.master_weights import MasterWeights
from eagle_rpc.train.optimiser import DraftOptimiser, trainable_parameters
from eagle_rpc.train.schedule import peak_rate, share_of_peak
from eagle_rpc.train.sharded_weights import ShardedWeights
from eagle_rpc.train.step_supervision import StepSupervision
from eagle_rpc.train.step_weights import StepWeights

logger = logging.getLogger(__name__)


@dataclass(kw_only=True, slots=True)
class StepOutcome:
    """One optimiser step, the same on all trainers."""

    sums: RunningSums  # over its micro-batches and all trainers
    grad_norm: Tensor  # before clipping, scalar
    learning_rate: float


@dataclass(frozen=True, slots=True)
class LearnerState:
    """Whole tensors by name, as checkpoints hold them."""

    weights: dict[str, Tensor]  # without a frozen embedding
    optimiser: dict[str, Tensor]  # in the form of `DraftOptimiser.tensors`
    average: dict[str, Tensor]  # of the weights; empty without `train.ema_decay`
    reached_steps: list[float] = field(default_factory=list)  # `StepWeights.state`


class Learner:
    """The draft with its optimiser: equal on each trainer of `group`, or sharded with `config.sharding`.

    Weights are fp32; matrix products run in `config.autocast`. Raises `ConfigError` for a draft of another
    dtype, and as `ShardedWeights` does. `seed` is that of `config.aux_noise`. All
    methods but `judge` are collective: all trainers call them in the same order.
    """

    def __init__(
        self,
        draft: Eagle3Draft,
        config: TrainConfig,
        objective: DraftConfig,
        group: TrainerGroup,
        total_steps: int,
        *,
        seed: int = 0,
    ) -> None:
        for name, parameter in trainable_parameters(draft).items():
            if parameter.dtype != torch.float32:
                raise ConfigError(f"the draft's {name} must be float32 for training, got {parameter.dtype}")
        self.steps_done = 0
        self.device = draft.fc.weight.device
        self._config = config
        self._objective = objective
        self._group = group
        self.total_steps = total_steps
        self._masters = hold_weights(draft, config, group)
        self._optimiser = DraftOptimiser(self._masters.parameters, config)
        self._noise = self._average = None
        if config.aux_noise:
            self._noise = AuxNoise(config.aux_noise, seed=seed, trainer=group.rank)
        if config.ema_decay is not None:
            self._average = AveragedWeights(self._masters.parameters, config.ema_decay)
        self._peak_rate = peak_rate(config, draft.config.hidden_size)
        self._step_weights = StepWeights(objective, self.device)
        self._ttt = make_ttt_step(
            draft, config, objective, self._masters.gradients, self._step_weights.values
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """The trained parameters by name; DTensors if weights are sharded."""
        return self._masters.parameters

    def learn(self, batches: Iterable[Eagle3TargetBatch]) -> StepOutcome:
        """One optimiser step on this trainer's share of the micro-batches; waits for all of them first."""
        steps, offload = self._objective.ttt_steps, self._config.offload_supervision
        with self._group.together("the supervision of a step"):
            supervision = StepSupervision(batches, steps, offload=offload)
        denominators_S = self._group.sum_(supervision.row_counts, "supervised rows")
        sums = self.empty_sums()
        self._masters.zero_gradients()
        with self.ready_to_judge():
            for number in range(len(supervision)):
                self._learn_micro_batch(supervision.take(), number, denominators_S, sums)
        self._group.sum_(sums.flat, "losses")
        self._masters.reduce_gradients()
        grad_norm = self._masters.clip_gradients(self._config.max_grad_norm)
        rate = self._peak_rate * share_of_peak(self.steps_done, self.total_steps, self._config)
        self._optimiser.step(rate)
        if self._average is not None:
            self._average.update()
        self._ttt.refresh_weights()
        self._step_weights.update(sums)
        self.steps_done += 1
        return StepOutcome(sums=sums, grad_norm=grad_norm, learning_rate=rate)

    @contextlib.contextmanager
    def averaged(self) -> Iterator[None]:
        """While the body runs, the draft has its averaged weights if there are any. No step may be taken there."""
        if self._average is None:
            yield
            return
        with self._average.in_place():
            self._ttt.refresh_weights()
            yield
        self._ttt.refresh_weights()

    def _learn_micro_batch(
        self, batch: Eagle3TargetBatch, number: int, denominators_S: Tensor, sums: RunningSums
    ) -> None:
        if self._noise is not None:
            batch = self._noise.added_to(batch, self.steps_done, number)
        sums.add_batch(batch, self._ttt.add_gradients(batch, denominators_S))

    def ready_to_judge(self) -> contextlib.AbstractContextManager[None]:
        """While the body runs, each trainer may call `judge` any number of times."""
        return self._masters.whole() if self._ttt.reads_draft else contextlib.nullcontext()

    def whole_draft(self) -> contextlib.AbstractContextManager[None]:
        """While the body runs, the draft's own parameters are whole."""
        return self._masters.whole()

    def judge(self, batch: Eagle3TargetBatch, sums: RunningSums) -> None:
        """Adds the figures of one batch to `sums` and changes nothing else."""
        sums.add_batch(batch, self._ttt.judge(batch, count_rows(batch, self._objective.ttt_steps)))

    def empty_sums(self) -> RunningSums:
        return RunningSums(self._objective.ttt_steps, self.device)

    @property
    def step_weights(self) -> Tensor:
        """The weights [S] of the steps in the objective, with sum 1."""
        return self._step_weights.values

    @property
    def step_weights_are_learned(self) -> bool:
        return self._step_weights.are_learned

    def weights_are_finite(self) -> bool:
        return self._masters.are_finite()

    def digest(self) -> str:
        """SHA-256 of weights, optimiser state, averages, learned weights of steps and step."""
        numbers = [("steps_done", torch.tensor([self.steps_done]))]
        if self._step_weights.are_learned:
            reached = torch.tensor(self._step_weights.state(), dtype=torch.float64)
            numbers.append(("reached_steps", reached))
        state = (self.weights(), self.optimiser_state(), self.average(), numbers)
        return tensors_digest(itertools.chain(*state))

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """Whole weights by name, one after the other; each trainer has to iterate to the end."""
        return self._masters.gathered(self.parameters)

    def optimiser_state(self) -> Iterator[tuple[str, Tensor]]:
        """Whole `DraftOptimiser.tensors`, one after the other; each trainer has to iterate to the end."""
        return self._masters.gathered(self._optimiser.tensors())

    def average(self) -> Iterator[tuple[str, Tensor]]:
        """Whole averages of the weights by name, as `weights`; nothing without `train.ema_decay`."""
        return self._masters.gathered({} if self._average is None else self._average.tensors)

    def draft_weights(self) -> dict[str, Tensor]:
        """The whole weights that validation judges and an export takes: averages if there are any."""
        return dict(self.weights()) | dict(self.average())

    def snapshot(self) -> LearnerState:
        """The state for a checkpoint, on the CPU; empty but on the primary trainer."""
        kept = self._group.is_primary
        parts = (self.weights(), self.optimiser_state(), self.average())
        weights, optimiser, average = (
            {name: tensor.cpu() for name, tensor in part if kept} for part in parts
        )
        return LearnerState(weights, optimiser, average, self._step_weights.state())

    @property
    def can_snapshot(self) -> bool:
        """Whether this trainer holds all weights, or can still gather them from the other trainers."""
        return not (self._masters.sharded and self._group.broken)

    @torch.no_grad()
    def load(self, state: LearnerState, steps_done: int) -> None:
        """Restores a checkpoint's state. Raises `CheckpointError` if its weights do not fit this draft."""
        averages = {} if self._average is None else self._average.tensors
        of_average = {f"average/{name}": tensor for name, tensor in state.average.items()}
        everything = {**state.weights, **state.optimiser, **of_average}
        self._masters.require_equal(everything, "the checkpoint to resume from")
        for saved, current in ((state.weights, self.parameters), (state.average, averages)):
            if saved.keys() != current.keys():
                differing = sorted(saved.keys() ^ current.keys())
                raise CheckpointError(
                    f"the checkpoint's weights must be {sorted(current)}, these differ: {differing}"
                )
            for name, tensor in current.items():
                if saved[name].shape != tensor.shape:
                    raise CheckpointError(
                        f"{name} must have shape {list(tensor.shape)}, got {list(saved[name].shape)}"
                    )
                tensor.copy_(self._masters.shard_of(saved[name], self.parameters[name]))
        self._step_weights.load(state.reached_steps)
        self._optimiser.load(state.optimiser, self._masters.shard_of)
        self._ttt.refresh_weights()
        self.steps_done = steps_done


def hold_weights(draft: Eagle3Draft, config: TrainConfig, group: TrainerGroup) -> MasterWeights:
    """A copy of the draft's weights, or with `train.sharding=state` and several trainers a shard of them."""
    if config.sharding is Sharding.state and group.size > 1:
        return ShardedWeights(draft, group)
    return MasterWeights(draft, group)


def make_ttt_step(
    draft: Eagle3Draft,
    config: TrainConfig,
    objective: DraftConfig,
    gradients: Mapping[str, Tensor],
    weights_S: Tensor,
) -> ReferenceStep | FusedStep:
    """The fused step if device and configuration allow it, else the reference. Both add to `gradients`."""
    dtype = torch.float32 if config.autocast is None else getattr(torch, config.autocast.name)
    rule = Objective(
        steps=objective.ttt_steps,
        step_decay=objective.step_decay,
        loss=objective.loss.value,
        kl_share=objective.kl_share,
        weights=weights_S,
    )
    fp8 = config.precision is Precision.fp8
    if fp8 and not multiplies_fp8(draft.fc.weight.device):
        raise ConfigError(
            "train.precision=fp8 must have a GPU of compute capability 8.9 or later, "
            f"got {draft.fc.weight.device}"
        )
    if config.fused and FusedStep.supports(draft, dtype):
        recompute = config.recompute_mlp
        return FusedStep(draft, rule, dtype=dtype, recompute_mlp=recompute, fp8=fp8, gradients=gradients)
    if fp8:
        raise ConfigError(
            "train.precision=fp8 must have a draft that the fused step trains, got another form"
        )
    if config.recompute_mlp:
        logger.warning(
            "train.recompute_mlp has no effect: only the fused step reads it, "
            "which needs a GPU and train.autocast=bfloat16"
        )
    return ReferenceStep(draft, rule, autocast=None if dtype is torch.float32 else dtype)

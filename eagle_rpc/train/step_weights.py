"""The weights of the TTT steps in the loss: fixed, or learned from what the draft's own guesses reach.

Legend: S steps of training-time test.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from eagle_rpc.config.choices import StepWeighting
from eagle_rpc.config.schema import DraftConfig
from eagle_rpc.draft import step_weights
from eagle_rpc.errors import CheckpointError
from eagle_rpc.train.figures import RunningSums

# The running mean is over about the last 100 optimiser steps.
_DECAY = 0.99


class StepWeights:
    """`draft.step_weighting`: `values` [S] fp32 with sum 1, which learned ones change in place after each step.

    Learned, step k weighs as often as decoding asks for guess k + 1 of a draft: the share of slots whose steps
    before k were all right. A running mean of these shares begins at `step_decay ** k`.
    """

    def __init__(self, objective: DraftConfig, device: torch.device) -> None:
        decayed_S = step_weights(objective.ttt_steps, objective.step_decay, device)
        self.values = decayed_S
        if objective.step_weighting is StepWeighting.listed:
            listed_S = torch.tensor(objective.step_weights, dtype=torch.float64, device=device)
            self.values = (listed_S / listed_S.sum()).float()
        self._reached: Tensor | None = None  # [S] fp64, the running mean
        if objective.step_weighting is StepWeighting.learned:
            self._reached = decayed_S.double() / decayed_S[0].double()
            self._set_values()

    @property
    def are_learned(self) -> bool:
        return self._reached is not None

    def update(self, sums: RunningSums) -> None:
        """After an optimiser step with these sums over all trainers."""
        if self._reached is None:
            return
        accepted_S, drafts_S = sums.accepted_and_drafts
        shares = torch.where(drafts_S > 0, accepted_S / drafts_S.clamp(min=1), self._reached.roll(-1))
        self._reached[1:].lerp_(shares[:-1], 1 - _DECAY)
        self._set_values()

    def state(self) -> list[float]:
        """What `load` restores; empty unless learned."""
        return [] if self._reached is None else self._reached.tolist()

    def load(self, state: Sequence[float]) -> None:
        """Raises `CheckpointError` for the state of another number of steps."""
        if len(state) != len(self.state()):
            raise CheckpointError(f"reached_steps must hold {len(self.state())} numbers, got {len(state)}")
        if self._reached is not None:
            self._reached.copy_(torch.tensor(state, dtype=torch.float64))
            self._set_values()

    def _set_values(self) -> None:
        assert self._reached is not None
        self.values.copy_(self._reached / self._reached.sum())

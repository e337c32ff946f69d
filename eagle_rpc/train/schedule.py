"""The steps of a run, and the learning rate as a function of the step: a resumed run follows the same curve."""

import math

from eagle_rpc.config.choices import Schedule
from eagle_rpc.config.schema import TrainConfig
from eagle_rpc.data import BatchPlan

# Tuned on the draft of SmolLM2-135M.
_TUNED_RATE, _TUNED_HIDDEN_SIZE = 1e-3, 576


def peak_rate(config: TrainConfig, hidden_size: int) -> float:
    """`config.learning_rate`, or if that is null the tuned rate scaled to a draft of this hidden size.

    The best rate of Adam falls as 1 / width ("Tensor Programs V", arXiv 2203.03466). No draft gets more than
    the tuned rate: nothing is known of the optimum of small ones.
    """
    if config.learning_rate is not None:
        return config.learning_rate
    return _TUNED_RATE * min(1.0, _TUNED_HIDDEN_SIZE / hidden_size)


def share_of_peak(step: int, total_steps: int, config: TrainConfig) -> float:
    """The rate of optimiser step `step` (0 <= step < total_steps) as a share of the peak.

    It rises linearly in the warm-up, then follows `config.schedule`, and is lowest in the last step.
    """
    warmup_steps = round(config.warmup_share * total_steps)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    if config.schedule is Schedule.constant:
        return 1.0
    fall_steps = total_steps - warmup_steps
    if config.schedule is Schedule.wsd:
        fall_steps = min(fall_steps, round(config.decay_share * total_steps))
    first_of_fall = total_steps - fall_steps
    if step < first_of_fall:
        return 1.0
    progress = (step + 1 - first_of_fall) / fall_steps
    left = (1 + math.cos(math.pi * progress)) / 2 if config.schedule is Schedule.cosine else 1 - progress
    lowest = config.min_learning_rate_share
    return lowest + (1 - lowest) * left


def planned_steps(config: TrainConfig, batches: BatchPlan, *, steps_done: int = 0, position: int = 0) -> int:
    """Optimiser steps of the run, `steps_done` of which have consumed the first `position` sequences."""
    if config.max_epochs is None:
        return config.max_steps
    left = config.max_epochs * batches.sequences_per_epoch - position
    steps_left = math.ceil(max(0, left) / (config.accumulation * batches.sequences_per_batch))
    return min(config.max_steps, steps_done + steps_left)

"""Figures of training and validation, computed from sums that stay on the device until a figure is needed.

Legend: S steps of training-time test.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.draft import DecodingCounts, TTTResult, simulated_accept_length
from eagle_rpc.errors import CheckpointError, TrainingDiverged
from eagle_rpc.report.metrics_log import Figure
from eagle_rpc.supervision import Eagle3TargetBackend, Eagle3TargetBatch, RequestTotals, Waits
from eagle_rpc.train.record import RunRecord

TIMES = (*(f"waiting ({what})" for what in Waits._fields), "judging", "training")
"""What a trainer's time goes to: waits for supervision by kind, validations and checkpoints, all else."""


class RunningSums:
    """Sums over batches, trainers and optimiser steps, from which figures follow.

    All are in one fp64 vector: one collective sums it over trainers, one copy reads it, and counts stay
    exact.
    """

    _OF_STEPS = ("loss_sums", "rows", "correct", "accepted", "drafts")  # as in `TTTResult`
    _SCALARS = ("tokens", "supervised_tokens", "unusable_batches", "optimiser_steps", "grad_norms")

    def __init__(self, steps: int, device: torch.device) -> None:
        self._steps = steps
        size = len(self._OF_STEPS) * steps + len(self._SCALARS)
        self.flat = torch.zeros(size, dtype=torch.float64, device=device)
        columns, scalars = self.flat[: -len(self._SCALARS)].view(-1, steps), self.flat[-len(self._SCALARS) :]
        self._named = dict(zip(self._OF_STEPS + self._SCALARS, (*columns, *scalars), strict=True))

    def add_batch(self, batch: Eagle3TargetBatch, result: TTTResult) -> None:
        for name in self._OF_STEPS:
            self._named[name] += getattr(result, name)
        self._named["tokens"] += batch.tokens.attention_mask.sum()
        self._named["supervised_tokens"] += batch.loss_mask.sum()
        # A sum needs no copy in another format, and is finite only if all values are.
        values = batch.aux_hidden_states.sum(dtype=torch.float32) + batch.log_normalizer.sum()
        self._named["unusable_batches"] += ~values.isfinite()

    def add_step(self, step_sums: "RunningSums", grad_norm: Tensor) -> None:
        """Adds one optimiser step; `step_sums` are over all trainers."""
        self.flat += step_sums.flat
        self._named["optimiser_steps"] += 1
        self._named["grad_norms"] += grad_norm

    def zero_(self) -> None:
        self.flat.zero_()

    def load(self, values: list[float]) -> None:
        """Restores the result of `flat.tolist()`. Raises `CheckpointError` for another number of steps."""
        if len(values) != self.flat.numel():
            raise CheckpointError(f"running_sums must hold {self.flat.numel()} numbers, got {len(values)}")
        self.flat.copy_(torch.tensor(values, dtype=torch.float64))

    @property
    def accepted_and_drafts(self) -> tuple[Tensor, Tensor]:
        """[S] each, as in `TTTResult`."""
        return self._named["accepted"], self._named["drafts"]

    def is_finite(self) -> bool:
        return bool(self.flat.isfinite().all())

    @property
    def supervision_is_finite(self) -> bool:
        """Whether every value that the target sent was finite."""
        return not self._named["unusable_batches"]

    def on_host(self) -> dict[str, Tensor]:
        """The sums by name, on the CPU; it waits for the device once."""
        copy = RunningSums(self._steps, torch.device("cpu"))
        copy.flat.copy_(self.flat)
        return copy._named


def require_finite(sums: RunningSums, what: str, step: int, record: RunRecord) -> None:
    """Raises `TrainingDiverged` if `sums` of steps up to `step`, or the target's values, are not finite."""
    if sums.is_finite() and sums.supervision_is_finite:
        return
    when, dtype = f"at or shortly before step {step}", record.target.dtype
    if not sums.supervision_is_finite:
        advice = "use target.dtype=bfloat16" if dtype == "float16" else "its weights may be damaged"
        raise TrainingDiverged(
            f"the target's supervision must be finite, it is not {when} in {dtype}: {advice}; "
            "earlier checkpoints are kept"
        )
    raise TrainingDiverged(
        f"the {what} must be finite, it is not {when}; "
        "earlier checkpoints are kept, train.learning_rate may be too high"
    )


def figures_of(sums: dict[str, Tensor], weights_S: Tensor) -> dict[str, Figure]:
    """The figures that training and validation share.

    `loss` weights the steps by `weights_S`; `accuracy` and `simulated_acceptance_per_position` are
    lists [S]. Simulated: each slot counts as the start of a draft of S guesses.
    """
    rows_S, drafts_S = sums["rows"].clamp(min=1), sums["drafts"].clamp(min=1)
    return {
        "loss": float((weights_S.double().cpu() * sums["loss_sums"] / rows_S).sum()),
        "accuracy": (sums["correct"] / rows_S).tolist(),
        "simulated_acceptance_per_position": (sums["accepted"] / drafts_S).tolist(),
        "simulated_accept_length": float(simulated_accept_length(sums["accepted"], sums["drafts"])),
        "supervised_tokens": int(sums["supervised_tokens"]),
    }


def training_figures(
    sums: RunningSums, weights_S: Tensor, learning_rate: float, pace: "Pace"
) -> dict[str, Figure]:
    """Those of `figures_of` and `Pace.figures`, the mean norm of gradients, and the newest learning rate."""
    on_host = sums.on_host()
    return {
        **figures_of(on_host, weights_S),
        "grad_norm": float(on_host["grad_norms"] / on_host["optimiser_steps"].clamp(min=1)),
        "learning_rate": learning_rate,
        **pace.figures(float(on_host["tokens"])),
    }


def decoding_figures(counts: DecodingCounts) -> dict[str, Figure]:
    """The figures of `job=evaluate` that validation has as well."""
    return {
        "accept_length": counts.accept_length,
        "accept_length_within_text": counts.accept_length_within_text,
        "acceptance_per_position": counts.acceptance_per_position,
    }


class Pace:
    """Seconds of training since the last `restart`, and the share of them spent waiting for the target."""

    def __init__(self, backend: Eagle3TargetBackend) -> None:
        self._backend = backend
        self._paused, self._totals_paused = 0.0, RequestTotals()
        self.restart()
        self._first, self._totals_first = self._started, self._totals_before

    def restart(self) -> None:
        self._started = time.monotonic()
        self._totals_before = self._backend.totals

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time of the body out."""
        started, totals_before = time.monotonic(), self._backend.totals
        yield
        seconds, totals = time.monotonic() - started, self._backend.totals.minus(totals_before)
        self._started += seconds
        self._totals_before = self._totals_before.plus(totals)
        self._paused += seconds
        self._totals_paused = self._totals_paused.plus(totals)

    def figures(self, tokens: float) -> dict[str, Figure]:
        """`tokens` (of all trainers, without padding) per second, and what this trainer waited for.

        `wait_share`, of its time; `wait_share_*` by kind; `request_seconds_*`: of a mean request.
        """
        seconds = max(time.monotonic() - self._started, 1e-9)
        totals = self._backend.totals.minus(self._totals_before)
        waits = {
            f"wait_share_{kind}": min(1.0, waited / seconds)
            for kind, waited in totals.waits._asdict().items()
        }
        times = {
            f"request_seconds_{part}": spent / max(totals.requests, 1)
            for part, spent in totals.times._asdict().items()
        }
        share = min(1.0, totals.seconds_waited / seconds)
        return {"tokens_per_second": tokens / seconds, "wait_share": share, **waits, **times}

    def totals(self) -> list[float]:
        """Seconds since the start of this object: by `TIMES`; pauses are for judging."""
        totals = self._backend.totals.minus(self._totals_first).minus(self._totals_paused)
        training = time.monotonic() - self._first - self._paused - totals.seconds_waited
        return [*totals.waits, self._paused, training]


def in_one_line(figures: Mapping[str, Any]) -> str:
    """Loss, accuracy of the first step, simulated accept length, throughput and waiting."""
    return (
        f"loss {figures['loss']:.3f}, accuracy {figures['accuracy'][0]:.3f}, "
        f"simulated accept length {figures['simulated_accept_length']:.2f}, "
        f"{figures['tokens_per_second']:.0f} tok/s, "
        f"waiting {figures['wait_share']:.0%}"
    )

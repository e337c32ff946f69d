"""The training loop: supervision, optimiser steps, figures, validation, checkpoints.

Supervision is requested ahead of training; the position in the data counts the sequences that all trainers
have trained on.
"""

import contextlib
import logging
import math
import threading
from collections.abc import Generator, Iterable, Iterator
from itertools import islice
from typing import Any

import torch

from eagle_rpc.config.choices import Resume
from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.data import BatchPlan
from eagle_rpc.draft import DecodingCounts, Eagle3Draft
from eagle_rpc.errors import EagleRpcError, TrainingDiverged
from eagle_rpc.report.metrics_log import Figures, MetricsLog
from eagle_rpc.report.progress import Progress
from eagle_rpc.supervision import Eagle3TargetBackend, Eagle3TargetBatch, TokenBatch
from eagle_rpc.train.checkpoint import (
    Checkpoint,
    latest_whole_checkpoint,
    remove_leftovers,
    save_target_embedding,
    write_checkpoint,
)
from eagle_rpc.train.decoding import DecodedAnswers, answers_of
from eagle_rpc.train.distributed import TrainerGroup
from eagle_rpc.train.figures import Pace, RunningSums, decoding_figures, figures_of, in_one_line
from eagle_rpc.train.learner import Learner
from eagle_rpc.train.record import RunRecord, require_same_run
from eagle_rpc.train.rundir import RunDirectory

logger = logging.getLogger(__name__)


class Trainer:
    """One trainer of a run. Each trainer of `group` constructs one and calls `train`.

    Args:
        config, objective: the sections `train` and `draft` of the configuration.
        draft: initialised, on this trainer's device, weights in fp32.
        backend: the target, with an open session.
        batches: this trainer's share of the training data.
        validation: all of the validation data, the same on every trainer; None: no validation.
        num_draft_tokens: guesses of a draft in decoding, for the accept length of a validation.
        run: the run directory; the caller has claimed it.
        record: the identity of the run, for checkpoints.
        stop: when set, training ends after the current step, with a checkpoint.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: DraftConfig,
        *,
        draft: Eagle3Draft,
        backend: Eagle3TargetBackend,
        batches: BatchPlan,
        validation: BatchPlan | None,
        num_draft_tokens: int,
        group: TrainerGroup,
        run: RunDirectory,
        record: RunRecord,
        stop: threading.Event,
    ) -> None:
        self._config = config
        self._objective = objective
        self._draft = draft
        self._backend = backend
        self._batches = batches
        self._validation = validation
        self._num_draft_tokens = num_draft_tokens
        self._answers: DecodedAnswers | None = None  # made at the first validation
        self._group = group
        self._run = run
        self._record = record
        self._stop = stop
        self.total_steps = planned_steps(config, batches)
        self.learner = Learner(draft, config, objective, group, self.total_steps)
        self._sums = self.learner.empty_sums()  # since the last line of metrics
        self._position = 0  # sequences consumed by all trainers
        self._learning_rate = 0.0
        self._last_saved = 0  # optimiser steps
        self._metrics: MetricsLog | None = None  # of the primary trainer
        self._pace = Pace(backend)
        self._latest_pace: Figures = {}

    def train(self) -> None:
        """Trains to the last step or until `stop`, from the newest checkpoint if `train.resume` is auto.

        Raises `TrainingDiverged` before a value that is not finite is saved, `CheckpointError` if the
        checkpoint is of another run, `ConfigError` if trainers start with different states. Errors of the
        backend or of the other trainers are raised after a checkpoint of the last complete step; there is
        none if a trainer with a shard of the weights is gone.
        """
        self._start()
        done, total = self.learner.steps_done, self.total_steps
        if done >= total:
            logger.info("nothing left to train: the run has done %d of %d steps", done, total)
        with contextlib.ExitStack() as stack:
            if self._group.is_primary:
                metrics = MetricsLog(self._run.metrics, self._run.tensorboard, last_step=done)
                self._metrics = stack.enter_context(contextlib.closing(metrics))
            progress = Progress("step", total, done=done, shown=self._group.is_primary)
            stack.enter_context(contextlib.closing(progress))
            batches = self._batches.batches(self._position)
            stream = stack.enter_context(supervised(self._backend, batches))
            self._pace.restart()
            try:
                while self.learner.steps_done < total and not self._told_to_stop():
                    self._train_step(stream, progress)
            except TrainingDiverged:
                raise
            except EagleRpcError as error:
                self._save_unless_saved(f"interrupted by {type(error).__name__}")
                raise
        self._group.barrier("the other trainers to finish")

    def status(self) -> dict[str, Any]:
        """Progress and pace as JSON values; other threads may call it."""
        return {"step": self.learner.steps_done, "total_steps": self.total_steps, **self._latest_pace}

    def _told_to_stop(self) -> bool:
        """Whether any trainer was told to stop; all stop after the same step."""
        if not self._group.any_(self._stop.is_set(), "the request to stop"):
            return False
        self._save_unless_saved("told to stop")
        return True

    def _save_unless_saved(self, why: str) -> None:
        if self.learner.steps_done > self._last_saved:
            if self.learner.can_snapshot:
                self._save()
            else:
                logger.warning(
                    "no checkpoint of step %d: another trainer is gone, with its shard of the weights",
                    self.learner.steps_done,
                )
        if self._group.is_primary:
            logger.info("%s: the run goes on from step %d with train.resume=auto", why, self._last_saved)

    def _train_step(self, stream: Iterator[Eagle3TargetBatch], progress: Progress) -> None:
        outcome = self.learner.learn(islice(stream, self._config.accumulation))
        self._position += self._config.accumulation * self._batches.sequences_per_batch
        self._sums.add_step(outcome.sums, outcome.grad_norm)
        self._learning_rate = outcome.learning_rate
        progress.advance(lambda: in_one_line(self._training_figures()))
        if self._due(self._config.log_every):
            self._require_finite(self._sums, "loss or gradient norm")
            figures = self._training_figures()
            self._write_metrics(figures)
            self._latest_pace = {name: figures[name] for name in ("tokens_per_second", "wait_share")}
            self._sums.zero_()
            self._pace.restart()
        with self._pace.paused():
            if self._due(self._config.validate_every):
                self._validate()
            if self._due(self._config.checkpoint_every):
                self._save()

    def _due(self, every: int) -> bool:
        """Whether an action is due that runs every `every` steps (0: never) and after the last one."""
        step = self.learner.steps_done
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _write_metrics(self, figures: Figures) -> None:
        if self._metrics is not None:
            self._metrics.write(self.learner.steps_done, figures)

    def _training_figures(self) -> Figures:
        sums = self._sums.on_host()
        return {
            **figures_of(sums, self._objective.step_decay),
            "grad_norm": float(sums["grad_norms"] / sums["optimiser_steps"].clamp(min=1)),
            "learning_rate": self._learning_rate,
            **self._pace.figures(float(sums["tokens"])),
        }

    def _validate(self) -> None:
        """Each trainer takes every `size`-th batch; the figures equal those of a single trainer."""
        if self._validation is None:
            return
        count = min(self._config.validation_batches, self._validation.batches_per_epoch)
        if count == 0:
            return
        mine = [self._validation.batch(index) for index in range(self._group.rank, count, self._group.size)]
        sums = self.learner.empty_sums()
        self._draft.eval()
        # Collectives run before the first wait for the target and after the last one.
        with (
            self.learner.ready_to_judge(),
            self._group.together("the supervision of a validation"),
            supervised(self._backend, mine) as stream,
        ):
            for batch in stream:
                self.learner.judge(batch, sums)
        counts = self._decoding_counts(mine)
        self._draft.train()
        self._group.sum_(sums.flat, "validation losses")
        self._require_finite(sums, "validation loss")
        figures = figures_of(sums.on_host(), self._objective.step_decay) | decoding_figures(counts)
        self._write_metrics({f"validation/{name}": value for name, value in figures.items()})
        if self._group.is_primary:
            logger.info(
                "step %d: validation loss %.3f, accept length %.2f (simulated over %d guesses %.2f)",
                self.learner.steps_done,
                figures["loss"],
                counts.accept_length,
                self._objective.ttt_steps,
                figures["simulated_accept_length"],
            )

    def _decoding_counts(self, batches: Iterable[TokenBatch]) -> DecodingCounts:
        """What decoding of the answers of all trainers' batches would accept; this trainer has `batches`."""
        with self.learner.whole_draft(), self._group.together("the states of validation answers"):
            if self._answers is None:
                self._answers = DecodedAnswers(
                    [text for batch in batches for text in answers_of(batch)],
                    self._backend,
                    self._record,
                    batch_size=self._config.batch_size,
                    num_draft_tokens=self._num_draft_tokens,
                )
            mine = self._answers.counts(self._draft).to_list()
        total = self._group.sum_(torch.tensor(mine), "validation drafts")
        return DecodingCounts.from_list(total.tolist())

    def _require_finite(self, sums: RunningSums, what: str) -> None:
        if sums.is_finite() and sums.supervision_is_finite:
            return
        when, dtype = f"at or shortly before step {self.learner.steps_done}", self._record.target.dtype
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

    def _save(self) -> None:
        self._require_finite(self._sums, "loss or gradient norm")
        if not self.learner.weights_are_finite():
            raise TrainingDiverged(
                f"the draft's weights must be finite, they are not after step {self.learner.steps_done}"
            )
        weights, optimiser = self.learner.snapshot()
        self._last_saved = self.learner.steps_done
        if not self._group.is_primary:
            return
        checkpoint = Checkpoint(
            step=self.learner.steps_done,
            sequences=self._position,
            record=self._record,
            weights=weights,
            optimiser=optimiser,
            running_sums=self._sums.flat.tolist(),
        )
        write_checkpoint(self._run.checkpoints, checkpoint, keep=self._config.keep_checkpoints)

    def _start(self) -> None:
        """Restores the newest checkpoint if the run resumes; checks that trainers have the same state."""
        if self._group.is_primary:
            remove_leftovers(self._run.checkpoints)
        resumes = self._config.resume is Resume.auto
        newest = latest_whole_checkpoint(self._run.checkpoints) if resumes else None
        if newest is not None:
            path, checkpoint = newest
            require_same_run(checkpoint.record, self._record)
            self.learner.load(checkpoint.weights, checkpoint.optimiser, checkpoint.step)
            self._sums.load(checkpoint.running_sums)
            self._position = checkpoint.sequences
            self.total_steps = self.learner.total_steps = planned_steps(
                self._config, self._batches, steps_done=checkpoint.step, position=checkpoint.sequences
            )
            self._last_saved = checkpoint.step
            logger.info("resuming from %s", path)
        # Of a run that was copied without it, an export could not be made.
        absent = newest is None or not self._run.target_embedding.exists()
        if absent and self._group.is_primary:
            save_target_embedding(self._run.target_embedding, self._draft.embed_tokens.weight)
        self._group.require_equal(
            {"the configuration": self._record.digest, "the draft at the start": self.learner.digest()}
        )


@contextlib.contextmanager
def supervised(
    backend: Eagle3TargetBackend, batches: Iterable[TokenBatch]
) -> Iterator[Iterator[Eagle3TargetBatch]]:
    """Supervision of the batches; requests that are in flight when the body ends are given up."""
    stream = backend.stream(batches)
    try:
        yield stream
    finally:
        if isinstance(stream, Generator):
            stream.close()


def planned_steps(config: TrainConfig, batches: BatchPlan, *, steps_done: int = 0, position: int = 0) -> int:
    """Optimiser steps of the run, `steps_done` of which have consumed the first `position` sequences."""
    if config.max_epochs is None:
        return config.max_steps
    left = config.max_epochs * batches.sequences_per_epoch - position
    steps_left = math.ceil(max(0, left) / (config.accumulation * batches.sequences_per_batch))
    return min(config.max_steps, steps_done + steps_left)

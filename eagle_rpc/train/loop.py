"""The training loop: supervision, optimiser steps, figures, validation, checkpoints.

Supervision is requested ahead of training; the position in the data counts the sequences that all trainers
have trained on.
"""

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import Any

import torch

from eagle_rpc.config.choices import Resume
from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.data import BatchPlan
from eagle_rpc.draft import Eagle3Draft
from eagle_rpc.errors import ConfigError, EagleRpcError, TrainingDiverged
from eagle_rpc.process.rundir import RunDirectory
from eagle_rpc.report.metrics_log import Figures, MetricsLog
from eagle_rpc.report.progress import Progress
from eagle_rpc.report.trackers import Tracker
from eagle_rpc.supervision import Eagle3TargetBackend, Eagle3TargetBatch
from eagle_rpc.train.checkpoint import (
    Checkpoint,
    latest_whole_checkpoint,
    point_links,
    remove_leftovers,
    save_target_embedding,
    write_checkpoint,
)
from eagle_rpc.train.distributed import TrainerGroup
from eagle_rpc.train.figures import TIMES, Pace, in_one_line, require_finite, training_figures
from eagle_rpc.train.history import ValidationHistory
from eagle_rpc.train.learner import Learner
from eagle_rpc.train.record import RunRecord, require_same_run
from eagle_rpc.train.schedule import planned_steps
from eagle_rpc.train.step_supervision import supervised
from eagle_rpc.train.validation import Validation

logger = logging.getLogger(__name__)


class Trainer:
    """One trainer of a run. Each trainer of `group` constructs one and calls `train`.

    Args:
        config, objective: the sections `train` and `draft` of the configuration.
        draft: initialised, on this trainer's device, weights in fp32.
        backend: the target, with an open session.
        batches: this trainer's share of the training data.
        validation: all of the validation data, the same on every trainer; None: no validation, and no
            `config.patience`, else `ConfigError`.
        num_draft_tokens: guesses of a draft in decoding, for the accept length of a validation.
        run: the run directory; the caller has claimed it.
        record: the identity of the run, for checkpoints.
        stop: when set, training ends after the current step, with a checkpoint.
        trackers: what the first trainer's figures also go to, by the step that the run goes on from.
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
        trackers: Callable[[int], Sequence[Tracker]] = lambda last_step: (),
    ) -> None:
        self._config = config
        self._objective = objective
        self._draft = draft
        self._backend = backend
        self._batches = batches
        self._group = group
        self._run = run
        self.record = record
        self._stop = stop
        self._trackers = trackers
        self.total_steps = planned_steps(config, batches)
        seed = record.config["run"]["seed"]
        self.learner = Learner(draft, config, objective, group, self.total_steps, seed=seed)
        self._validation = Validation(
            config,
            objective,
            draft=draft,
            learner=self.learner,
            backend=backend,
            plan=validation,
            num_draft_tokens=num_draft_tokens,
            group=group,
            record=record,
        )
        if config.patience is not None and not self._validation.is_possible:
            raise ConfigError(
                "train.patience must be null without chats to validate with, "
                f"got {config.patience}: see data.validation_path and data.validation_share"
            )
        self._history = ValidationHistory()
        self._sums = self.learner.empty_sums()  # since the last line of metrics
        self._position = 0  # sequences consumed by all trainers
        self._learning_rate = 0.0
        self._last_saved = 0  # optimiser steps
        self._metrics: MetricsLog | None = None  # of the primary trainer
        self._pace = Pace(backend)
        self.has_trained = False
        """Whether `train` has made a step."""
        self.was_stopped = False
        """Whether `train` ended before the last step because this trainer or another one was told to stop."""
        self.times = list[list[float]]()
        """Seconds of each trainer by `TIMES`, once training has ended."""
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
                metrics = MetricsLog(self._run.metrics, self._trackers(done), last_step=done)
                self._metrics = stack.enter_context(contextlib.closing(metrics))
            progress = Progress("step", total, done=done, shown=self._group.is_primary)
            stack.enter_context(contextlib.closing(progress))
            batches = self._batches.batches(self._position)
            stream = stack.enter_context(supervised(self._backend, batches))
            self._pace.restart()
            try:
                if done and self._validation_is_missing:
                    self._validate()
                    self._save()
                while not self._is_finished() and not self._told_to_stop():
                    self._train_step(stream, progress)
            except TrainingDiverged:
                raise
            except EagleRpcError as error:
                self._save_unless_saved(f"interrupted by {type(error).__name__}")
                raise
        times = torch.zeros(self._group.size, len(TIMES), dtype=torch.float64)
        times[self._group.rank] = torch.tensor(self._pace.totals())
        self.times = self._group.sum_(times, "the times of trainers").tolist()
        self._group.barrier("the other trainers to finish")

    def status(self) -> dict[str, Any]:
        """Progress and pace as JSON values; other threads may call it."""
        return {"step": self.learner.steps_done, "total_steps": self.total_steps, **self._latest_pace}

    def _told_to_stop(self) -> bool:
        """Whether any trainer was told to stop; all stop after the same step."""
        if not self._group.any_(self._stop.is_set(), "the request to stop"):
            return False
        self.was_stopped = True
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
        self.has_trained = True
        outcome = self.learner.learn(islice(stream, self._config.accumulation))
        self._position += self._config.accumulation * self._batches.sequences_per_batch
        self._sums.add_step(outcome.sums, outcome.grad_norm)
        self._learning_rate = outcome.learning_rate
        progress.advance(lambda: in_one_line(self._training_figures()))
        if self._due(self._config.log_every):
            require_finite(self._sums, "loss or gradient norm", self.learner.steps_done, self.record)
            figures = self._training_figures()
            self._write_metrics(figures)
            self._latest_pace = {name: figures[name] for name in ("tokens_per_second", "wait_share")}
            self._sums.zero_()
            self._pace.restart()
        with self._pace.paused():
            is_best = self._validation_is_missing and self._validate()
            is_last = self._history.exhaustion(self._config.patience) is not None
            if is_best or is_last or self._due(self._config.checkpoint_every):
                self._save()

    def _due(self, every: int) -> bool:
        """Whether an action is due that runs every `every` steps (0: never) and after the last one."""
        step = self.learner.steps_done
        return step == self.total_steps or (every > 0 and step % every == 0)

    def _write_metrics(self, figures: Figures) -> None:
        if self._metrics is not None:
            self._metrics.write(self.learner.steps_done, figures)

    def _training_figures(self) -> Figures:
        weights_S = self.learner.step_weights
        figures = training_figures(self._sums, weights_S, self._learning_rate, self._pace)
        if self.learner.step_weights_are_learned:
            figures["step_weights"] = weights_S.tolist()
        return figures

    def _validate(self) -> bool:
        """Writes the figures of a validation; whether it was the best one so far."""
        step, figures = self.learner.steps_done, self._validation.figures()
        self._write_metrics({f"validation/{name}": value for name, value in figures.items()})
        accept_length = figures["accept_length"]
        assert isinstance(accept_length, float)
        self._history = self._history.with_result(step, accept_length)
        is_best = self._history.best_step == step
        if self._group.is_primary:
            logger.info(
                "step %d: validation loss %.3f, accept length %.2f%s (simulated over %d guesses %.2f)",
                step,
                figures["loss"],
                accept_length,
                ", the best so far" if is_best else "",
                self._objective.ttt_steps,
                figures["simulated_accept_length"],
            )
        return is_best

    @property
    def _validation_is_missing(self) -> bool:
        """Whether the last step is to be validated and was not, as after a loss of the target."""
        due = self._validation.is_possible and self._due(self._config.validate_every)
        return due and self._history.last_step < self.learner.steps_done

    def _is_finished(self) -> bool:
        """Whether all steps are done, or validations have not improved for too long."""
        reason = self._history.exhaustion(self._config.patience)
        if reason is not None and self._group.is_primary:
            logger.info("training ends after step %d: %s", self.learner.steps_done, reason)
        return reason is not None or self.learner.steps_done >= self.total_steps

    def _save(self) -> None:
        require_finite(self._sums, "loss or gradient norm", self.learner.steps_done, self.record)
        if not self.learner.weights_are_finite():
            raise TrainingDiverged(
                f"the draft's weights must be finite, they are not after step {self.learner.steps_done}"
            )
        state = self.learner.snapshot()
        self._last_saved = self.learner.steps_done
        if not self._group.is_primary:
            return
        checkpoint = Checkpoint(
            step=self.learner.steps_done,
            sequences=self._position,
            record=self.record,
            state=state,
            running_sums=self._sums.flat.tolist(),
            history=self._history,
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
            require_same_run(checkpoint.record, self.record)
            self.learner.load(checkpoint.state, checkpoint.step)
            self._sums.load(checkpoint.running_sums)
            self._position = checkpoint.sequences
            self.total_steps = self.learner.total_steps = planned_steps(
                self._config, self._batches, steps_done=checkpoint.step, position=checkpoint.sequences
            )
            self._last_saved, self._history = checkpoint.step, checkpoint.history
            if self._group.is_primary:
                point_links(self._run.checkpoints, checkpoint)
            logger.info("resuming from %s", path)
        # Of a run that was copied without it, an export could not be made.
        absent = newest is None or not self._run.target_embedding.exists()
        trained = self._draft.embed_tokens.weight.requires_grad  # then checkpoints have it
        if absent and not trained and self._group.is_primary:
            save_target_embedding(self._run.target_embedding, self._draft.embed_tokens.weight)
        self._group.require_equal(
            {"the configuration": self.record.digest, "the draft at the start": self.learner.digest()}
        )

"""Validation: the loss of held-out rows, and what decoding of held-out answers would accept."""

from collections.abc import Iterable

import torch

from eagle_rpc.config.schema import DraftConfig, TrainConfig
from eagle_rpc.data import BatchPlan
from eagle_rpc.draft import DecodingCounts, Eagle3Draft
from eagle_rpc.report.metrics_log import Figures
from eagle_rpc.supervision import Eagle3TargetBackend, TokenBatch
from eagle_rpc.train.decoding import DecodedAnswers, answers_of
from eagle_rpc.train.distributed import TrainerGroup
from eagle_rpc.train.figures import decoding_figures, figures_of, require_finite
from eagle_rpc.train.learner import Learner
from eagle_rpc.train.record import RunRecord
from eagle_rpc.train.step_supervision import supervised


class Validation:
    """The first `config.validation_batches` micro-batches of `plan`, judged by all trainers together.

    Each trainer takes every `size`-th one; the figures equal those of a single trainer. Arguments as those of
    `Trainer`.
    """

    def __init__(
        self,
        config: TrainConfig,
        objective: DraftConfig,
        *,
        draft: Eagle3Draft,
        learner: Learner,
        backend: Eagle3TargetBackend,
        plan: BatchPlan | None,
        num_draft_tokens: int,
        group: TrainerGroup,
        record: RunRecord,
    ) -> None:
        self._config, self._objective = config, objective
        self._draft, self._learner, self._backend = draft, learner, backend
        self._plan, self._num_draft_tokens = plan, num_draft_tokens
        self._group, self._record = group, record
        self._answers: DecodedAnswers | None = None  # made at the first validation
        self._count = 0 if plan is None else min(config.validation_batches, plan.batches_per_epoch)

    @property
    def is_possible(self) -> bool:
        """Whether there is anything to validate with."""
        return self._count > 0

    def figures(self) -> Figures:
        """Judges the draft with its averaged weights if it has any; the same figures on all trainers.

        Changes nothing that training uses.
        Raises `TrainingDiverged` for a loss that is not finite, and the errors of the backend.
        """
        assert self._plan is not None
        indices = range(self._group.rank, self._count, self._group.size)
        mine = [self._plan.batch(index) for index in indices]
        sums = self._learner.empty_sums()
        self._draft.eval()
        with self._learner.averaged():
            # Collectives run before the first wait for the target and after the last one.
            with (
                self._learner.ready_to_judge(),
                self._group.together("the supervision of a validation"),
                supervised(self._backend, mine) as stream,
            ):
                for batch in stream:
                    self._learner.judge(batch, sums)
            counts = self._decoding_counts(mine)
        self._draft.train()
        self._group.sum_(sums.flat, "validation losses")
        require_finite(sums, "validation loss", self._learner.steps_done, self._record)
        return figures_of(sums.on_host(), self._learner.step_weights) | decoding_figures(counts)

    def _decoding_counts(self, batches: Iterable[TokenBatch]) -> DecodingCounts:
        """What decoding of the answers of all trainers' batches would accept; this trainer has `batches`."""
        with self._learner.whole_draft(), self._group.together("the states of validation answers"):
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

"""The head's rows of a draft vocabulary, which trainers with the encoding `hidden` fetch once a session."""

import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from eagle_rpc.service.reply_budget import ReplyBudget
from eagle_rpc.service.sessions import Session
from eagle_rpc.supervision import DraftHead, Eagle3Target, ModelInfo

# Seconds after its last use that a copy is kept.
_KEPT = 2.0


@dataclass(slots=True)
class _Copy:
    head: DraftHead
    used: float


class HeadRows:
    """One copy for each mapping; the trainers of a run ask at about the same time and share it.

    It is dropped two seconds after its last use, and counts as an unsent reply until then.
    """

    def __init__(
        self, target: Eagle3Target, info: ModelInfo, budget: ReplyBudget, clock: Callable[[], float]
    ) -> None:
        """`clock`: seconds, as `time.monotonic`."""
        self._target = target
        # Weight and bias of one row.
        self._bytes_per_row = (info.hidden_size + 1) * getattr(torch, info.dtype).itemsize
        self._budget = budget
        self._clock = clock
        self._lock = threading.Lock()
        self._copies: dict[str, _Copy] = {}  # by the mapping's digest

    def get(self, session: Session, *, num_runs: int) -> DraftHead:
        """The head's rows of the session's draft vocabulary [K, H], on the CPU.

        Raises `UnsupportedTarget` if the target offers none, and the errors of `ReplyBudget.promise`.
        """
        with self._lock:
            kept = self._copies.get(session.mapping_digest)
            if kept is None:
                kept = self._copies[session.mapping_digest] = _Copy(self._make(session, num_runs), 0.0)
            kept.used = self._clock()
            return kept.head

    def _make(self, session: Session, num_runs: int) -> DraftHead:
        ids = session.vocab.selected_token_ids
        num_bytes = len(ids) * self._bytes_per_row
        promised = self._budget.promise(
            num_bytes, run=session.spec.run, session=session.id, num_runs=num_runs
        )
        try:
            head = self._target.draft_head(ids).to(torch.device("cpu"))
        except BaseException:
            self._budget.release(promised)
            raise
        self._budget.fulfil(promised, head)
        return head

    def drop_unused(self, *, at_once: bool = False) -> None:
        """Drops the copies without a recent use, or all."""
        oldest = self._clock() - _KEPT
        with self._lock:
            self._copies = {
                digest: copy for digest, copy in self._copies.items() if copy.used > oldest and not at_once
            }

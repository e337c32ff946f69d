"""The head's rows of a draft vocabulary, which trainers with the encoding `hidden` fetch once a session."""

import threading

import torch

from eagle_rpc.process.waiting import Clock
from eagle_rpc.service.reply_budget import ReplyBudget
from eagle_rpc.service.sessions import Session
from eagle_rpc.supervision import DraftHead, Eagle3Target, ModelInfo

# Seconds after its last use that a copy is kept.
_KEPT = 2.0


class HeadRows:
    """One copy for each mapping, an unsent reply that trainers share until 2 s after its last use."""

    def __init__(self, target: Eagle3Target, info: ModelInfo, budget: ReplyBudget, clock: Clock) -> None:
        self._target = target
        # Weight and bias of one row.
        self._bytes_per_row = (info.hidden_size + 1) * getattr(torch, info.dtype).itemsize
        self._budget = budget
        self._clock = clock
        self._lock = threading.Lock()
        self._copies: dict[str, DraftHead] = {}  # by the mapping's digest
        self._used: dict[str, float] = {}  # when

    def get(self, session: Session) -> DraftHead:
        """The rows [K, H] on the CPU. Raises `UnsupportedTarget`, and as `ReplyBudget.promise`."""
        digest = session.mapping_digest
        with self._lock:
            if digest not in self._copies:
                self._copies[digest] = self._copy(session)
            self._used[digest] = self._clock()
            return self._copies[digest]

    def _copy(self, session: Session) -> DraftHead:
        ids = session.vocab.selected_token_ids
        promised = self._budget.promise(
            len(ids) * self._bytes_per_row, run=session.spec.run, session=session.id
        )
        try:
            head = self._target.draft_head(ids).to(torch.device("cpu"))
        except Exception:
            self._budget.release(promised)
            raise
        self._budget.fulfil(promised, head)
        return head

    def drop_unused(self, *, at_once: bool = False) -> None:
        """Drops the copies without a recent use, or all."""
        oldest = self._clock() - _KEPT
        with self._lock:
            for digest in [one for one in self._copies if at_once or self._used[one] <= oldest]:
                del self._copies[digest], self._used[digest]

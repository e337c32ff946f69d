"""The trainers that are registered at a target, their leases, and the draft vocabularies that they share."""

import dataclasses
import logging
import math
import secrets
import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import TargetBusy, UnknownSession
from eagle_rpc.process.waiting import Clock
from eagle_rpc.service.fairness import LONGEST_RETRY
from eagle_rpc.service.quotas import Quotas
from eagle_rpc.supervision import (
    ENCODINGS,
    DraftVocabOnDevice,
    ModelInfo,
    SessionSpec,
    TokenBatch,
    VocabMapping,
    shifted_loss_mask,
)

logger = logging.getLogger(__name__)


@dataclass(eq=False, slots=True)
class Session:
    """One trainer's registration and its use. Only `SessionTable` changes it."""

    id: str
    spec: SessionSpec  # with the ids of `vocab`
    mapping_digest: str
    vocab: DraftVocabOnDevice
    renewed: float = 0.0  # time of the last sign of life, on the table's clock
    num_requests: int = 0  # answered
    num_tokens: int = 0  # in the answers, without padding

    def __str__(self) -> str:
        """For the log, whose records must not keep the mapping alive."""
        return f"session {self.id[:8]} of {self.spec.trainer or 'an unnamed trainer'}"


def most_reply_bytes(info: ModelInfo, session: Session, tokens: TokenBatch, num_tokens: int) -> int:
    """Bytes of the reply to `num_tokens` real tokens if every row that may be supervised is."""
    per_token = ENCODINGS[session.spec.encoding].bytes_per_token(
        hidden_size=info.hidden_size,
        draft_vocab_size=len(session.vocab.selected_token_ids),
        dtype_bytes=getattr(torch, info.dtype).itemsize,
        supervised_share=int(shifted_loss_mask(tokens).sum()) / num_tokens,
        # A target that does not name its captured layers has three of them.
        num_aux_layers=len(info.aux_layer_ids) or 3,
    )
    return math.ceil(per_token * num_tokens)


class SessionTable:
    """Open sessions, each while its trainer renews the lease. Equal mappings are held once."""

    def __init__(self, config: TargetConfig, device: torch.device, clock: Clock, quotas: Quotas) -> None:
        self.quotas = quotas
        self._max_sessions, self._lease = config.max_sessions, config.session_lease
        self._device = device
        self._clock = clock
        self._lock = threading.Lock()
        self._open: dict[str, Session] = {}
        self._empty_since: float | None = None  # None before the first session

    def __iter__(self) -> Iterator[Session]:
        """The open sessions, oldest first."""
        with self._lock:
            return iter(list(self._open.values()))

    def open(self, spec: SessionSpec, mapping: VocabMapping) -> Session:
        """Registers a checked spec; raises `TargetBusy` when there are too many sessions, or too many of its run."""
        digest = mapping.digest
        with self._lock:
            if (busy := self._lack_of_room(spec.run)) is not None:
                busy.retry_after = LONGEST_RETRY
                raise busy
            shared = next((one.vocab for one in self._open.values() if one.mapping_digest == digest), None)
            vocab = shared or DraftVocabOnDevice.of(mapping, self._device)
            spec = dataclasses.replace(spec, selected_token_ids=vocab.selected_token_ids)
            session = Session(secrets.token_hex(16), spec, digest, vocab, renewed=self._clock())
            self._open[session.id] = session
        line = "%s opened, run %s: %d of %d tokens, encoding %s, rows %s"
        sizes, settings = (len(mapping), mapping.target_vocab_size), (spec.encoding, spec.rows)
        logger.info(line, str(session), spec.run or "(unnamed)", *sizes, *settings)
        return session

    def _lack_of_room(self, run: str) -> TargetBusy | None:
        quota = self.quotas.of(run).sessions
        if len(self._open) >= self._max_sessions:
            rule = f"the target must hold at most {self._max_sessions} sessions"
            return TargetBusy(f"{rule} (target.max_sessions)")
        if quota is not None and sum(one.spec.run == run for one in self._open.values()) >= quota:
            return self.quotas.refusal(run, f"hold at most {quota} sessions")
        return None

    def serves(self, mapping_digest: str, encoding: str) -> bool:
        """Whether an open session has this mapping and encoding: both were checked at the target then."""
        return any(one.mapping_digest == mapping_digest and one.spec.encoding == encoding for one in self)

    def renew(self, session_id: object) -> Session:
        """Starts the session's lease anew and returns the session; raises `UnknownSession`."""
        with self._lock:
            session = self._open.get(session_id) if isinstance(session_id, str) else None
            if session is None:
                raise UnknownSession(f"session must be the id of an open session, got {session_id!r:.80}")
            session.renewed = self._clock()
            return session

    def count(self, session: Session, num_tokens: int) -> None:
        """Counts a request of `session` that was answered; `num_tokens`: without padding."""
        with self._lock:
            session.num_requests += 1
            session.num_tokens += num_tokens

    def close(self, session_id: object) -> Session:
        """Ends one session and returns it; raises `UnknownSession`."""
        session = self.renew(session_id)
        if not self._remove(session):
            raise UnknownSession(f"session {session.id[:8]} was closed meanwhile")
        logger.info("%s closed", str(session))
        return session

    def close_silent(self) -> list[Session]:
        """Ends the sessions whose lease is over and returns them."""
        closed = [one for one in self if self.lease_left(one) <= 0 and self._remove(one)]
        for session in closed:
            logger.warning("%s closed: no sign of life for %.1f s", str(session), self._lease)
        return closed

    def _remove(self, session: Session) -> bool:
        with self._lock:
            if self._open.pop(session.id, None) is None:
                return False
            if not self._open:
                self._empty_since = self._clock()
            return True

    def lease_left(self, session: Session) -> float:
        """Seconds until the session ends without a sign of life."""
        return max(0.0, self._lease - (self._clock() - session.renewed))

    def heard_within(self, seconds: float) -> bool:
        """Whether a trainer with an open session has given a sign of life in the last `seconds`."""
        now = self._clock()
        return any(now - one.renewed < seconds for one in self)

    @property
    def seconds_unused(self) -> float:
        """Seconds since the last open session ended; 0 while a session is open, and before the first."""
        with self._lock:
            if self._open or self._empty_since is None:
                return 0.0
            return self._clock() - self._empty_since

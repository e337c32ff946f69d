"""Who is registered at the target and until when, and the draft vocabularies that they share."""

import logging
import math
import secrets
import threading
from collections.abc import Callable
from dataclasses import dataclass

import torch

from eagle_rpc.errors import TargetBusy, UnknownSession
from eagle_rpc.service.scheduler import LONGEST_RETRY
from eagle_rpc.supervision import (
    DraftVocabOnDevice,
    ModelInfo,
    SessionSpec,
    TokenBatch,
    VocabMapping,
    bytes_per_token,
    shifted_loss_mask,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """One trainer's registration; nothing in it changes."""

    id: str
    job: str
    trainer: str
    mapping_digest: str
    vocab: DraftVocabOnDevice
    encoding: str
    rows: str
    through_host: bool


def most_reply_bytes(info: ModelInfo, session: Session, tokens: TokenBatch, num_tokens: int) -> int:
    """Bytes of the reply to `num_tokens` real tokens if every row that may be supervised is."""
    per_token = bytes_per_token(
        session.encoding,
        hidden_size=info.hidden_size,
        draft_vocab_size=len(session.vocab.selected_token_ids),
        dtype_bytes=getattr(torch, info.dtype).itemsize,
        supervised_share=int(shifted_loss_mask(tokens).sum()) / num_tokens,
    )
    return math.ceil(per_token * num_tokens)


@dataclass(slots=True)
class _Lease:
    session: Session
    renewed: float
    num_requests: int = 0
    num_tokens: int = 0


@dataclass(frozen=True, slots=True)
class SessionFigures:
    """One session at a glance."""

    session: Session
    lease_left: float  # seconds
    num_requests: int  # answered with supervision
    num_tokens: int  # in them, without padding


@dataclass(slots=True)
class _SharedVocab:
    on_device: DraftVocabOnDevice
    num_sessions: int = 0


class SessionTable:
    """Open sessions by random id. Each lasts while its trainer renews the lease.

    Equal mappings are held once, for as long as a session uses them.
    """

    def __init__(self, *, max_sessions: int, lease: float, device: torch.device, clock: Callable[[], float]):
        """`lease`: seconds without a sign of life that a session outlasts; `clock`: seconds, as `time.monotonic`."""
        self._max_sessions = max_sessions
        self._lease = lease
        self._device = device
        self._clock = clock
        self._lock = threading.Lock()
        self._leases: dict[str, _Lease] = {}
        self._vocabs: dict[str, _SharedVocab] = {}

    def open(self, spec: SessionSpec, mapping: VocabMapping) -> Session:
        """Registers a checked spec; raises `TargetBusy` when there are too many sessions."""
        digest = mapping.digest
        with self._lock:
            if len(self._leases) >= self._max_sessions:
                busy = TargetBusy(
                    f"the target must hold at most {self._max_sessions} sessions (target.max_sessions)"
                )
                busy.retry_after = LONGEST_RETRY
                raise busy
            if digest not in self._vocabs:
                self._vocabs[digest] = _SharedVocab(DraftVocabOnDevice.of(mapping, self._device))
            shared = self._vocabs[digest]
            shared.num_sessions += 1
            session = Session(
                secrets.token_hex(16),
                spec.job,
                spec.trainer,
                digest,
                shared.on_device,
                spec.encoding,
                spec.rows,
                spec.through_host,
            )
            self._leases[session.id] = _Lease(session, renewed=self._clock())
        logger.info(
            "session %s opened by %s of job %s: %d of %d tokens, encoding %s, rows %s",
            session.id[:8],
            spec.trainer or "an unnamed trainer",
            spec.job or "(unnamed)",
            len(mapping),
            mapping.target_vocab_size,
            spec.encoding,
            spec.rows,
        )
        return session

    def serves(self, mapping_digest: str, encoding: str) -> bool:
        """Whether an open session has this mapping and encoding, so that both were found right for the target."""
        with self._lock:
            sessions = [lease.session for lease in self._leases.values()]
        return any(
            session.mapping_digest == mapping_digest and session.encoding == encoding for session in sessions
        )

    def renew(self, session_id: object) -> Session:
        """The session, whose lease starts anew; raises `UnknownSession`."""
        with self._lock:
            lease = self._leases.get(session_id) if isinstance(session_id, str) else None
            if lease is None:
                raise UnknownSession(f"session must be the id of an open session, got {session_id!r:.80}")
            lease.renewed = self._clock()
            return lease.session

    def count(self, session: Session, num_tokens: int) -> None:
        """One request of `session` was answered with supervision of `num_tokens` tokens."""
        with self._lock:
            if lease := self._leases.get(session.id):
                lease.num_requests += 1
                lease.num_tokens += num_tokens

    def close(self, session_id: object) -> Session:
        """Ends one session and returns it; raises `UnknownSession`."""
        session = self.renew(session_id)
        if not self._remove(session):
            raise UnknownSession(f"session {session.id[:8]} was closed meanwhile")
        logger.info("session %s closed", session.id[:8])
        return session

    def close_silent(self) -> list[Session]:
        """Ends the sessions whose lease is over and returns them."""
        now = self._clock()
        with self._lock:
            silent = [lease.session for lease in self._leases.values() if now - lease.renewed >= self._lease]
        closed = [session for session in silent if self._remove(session)]
        for session in closed:
            logger.warning(
                "session %s of %s closed: no sign of life for %.1f s",
                session.id[:8],
                session.trainer or "an unnamed trainer",
                self._lease,
            )
        return closed

    def _remove(self, session: Session) -> bool:
        with self._lock:
            if self._leases.pop(session.id, None) is None:
                return False
            shared = self._vocabs[session.mapping_digest]
            shared.num_sessions -= 1
            if shared.num_sessions == 0:
                del self._vocabs[session.mapping_digest]
            return True

    def figures(self) -> list[SessionFigures]:
        """Every open session, oldest first."""
        now = self._clock()
        with self._lock:
            return [
                SessionFigures(
                    lease.session,
                    max(0.0, self._lease - (now - lease.renewed)),
                    lease.num_requests,
                    lease.num_tokens,
                )
                for lease in self._leases.values()
            ]

"""Who is registered at the target, and the draft vocabularies that they share."""

import logging
import secrets
import threading
from dataclasses import dataclass

import torch

from eagle_rpc.errors import TargetBusy, UnknownSession
from eagle_rpc.supervision import DraftVocabOnDevice, SessionSpec, VocabMapping

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Session:
    """One trainer's registration; nothing in it changes."""

    id: str
    mapping_digest: str
    vocab: DraftVocabOnDevice
    encoding: str
    rows: str


@dataclass(slots=True)
class _SharedVocab:
    on_device: DraftVocabOnDevice
    num_sessions: int = 0


class SessionTable:
    """Open sessions by random id. Equal mappings are held once, for as long as a session uses them."""

    def __init__(self, *, max_sessions: int, device: torch.device):
        self._max_sessions = max_sessions
        self._device = device
        self._lock = threading.Lock()
        self._sessions: dict[str, Session] = {}
        self._vocabs: dict[str, _SharedVocab] = {}

    def open(self, spec: SessionSpec, mapping: VocabMapping) -> Session:
        """Registers a checked spec; raises `TargetBusy` when there are too many sessions."""
        digest = mapping.digest
        with self._lock:
            if len(self._sessions) >= self._max_sessions:
                raise TargetBusy(f"the target must hold at most {self._max_sessions} sessions (target.max_sessions)")
            if digest not in self._vocabs:
                self._vocabs[digest] = _SharedVocab(DraftVocabOnDevice.of(mapping, self._device))
            shared = self._vocabs[digest]
            shared.num_sessions += 1
            session = Session(secrets.token_hex(16), digest, shared.on_device, spec.encoding, spec.rows)
            self._sessions[session.id] = session
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

    def get(self, session_id: object) -> Session:
        """Raises `UnknownSession`."""
        with self._lock:
            session = self._sessions.get(session_id) if isinstance(session_id, str) else None
        if session is None:
            raise UnknownSession(f"session must be the id of an open session, got {session_id!r:.80}")
        return session

    def close(self, session_id: object) -> None:
        """Ends one session; raises `UnknownSession`."""
        session = self.get(session_id)
        with self._lock:
            if self._sessions.pop(session.id, None) is None:
                return
            shared = self._vocabs[session.mapping_digest]
            shared.num_sessions -= 1
            if shared.num_sessions == 0:
                del self._vocabs[session.mapping_digest]
        logger.info("session %s closed", session.id[:8])

    def stats(self) -> dict[str, int]:
        """Open sessions and the mappings that they use."""
        with self._lock:
            return {"sessions": len(self._sessions), "mappings": len(self._vocabs)}

"""How a session opens: its settings are checked, and the head is probed where the supervision needs it."""

import dataclasses
import functools
from concurrent.futures import Future

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import TargetDraining
from eagle_rpc.service.answering import AnswerDesk
from eagle_rpc.service.arguments import check_spec
from eagle_rpc.service.scheduler import ForwardScheduler
from eagle_rpc.service.sessions import SessionTable
from eagle_rpc.supervision import (
    ENCODINGS,
    Eagle3Target,
    ModelInfo,
    OpenedSession,
    SessionSpec,
    VocabMapping,
    check_encoding,
)


class SessionOpener:
    """Puts sessions that this target can serve into the table."""

    def __init__(
        self,
        target: Eagle3Target,
        info: ModelInfo,
        sessions: SessionTable,
        scheduler: ForwardScheduler,
        answers: AnswerDesk,
        config: TargetConfig,
    ) -> None:
        self._target, self._info, self._config = target, info, config
        self._sessions, self._scheduler, self._answers = sessions, scheduler, answers

    def open(self, spec: SessionSpec) -> Future[OpenedSession]:
        """As `TargetModelServer.open_session`."""
        check_spec(spec)
        if self._scheduler.draining:
            raise TargetDraining("the target is shutting down and takes no new sessions")
        mapping = VocabMapping.from_token_ids(spec.selected_token_ids, self._info.vocab_size)
        spec.expected.check(self._info)
        probe = self._is_unproved(spec, mapping)
        if probe or spec.answers:
            # A probe is a forward pass. While it waits it keeps the ids alone, not the sender's storage.
            spec = dataclasses.replace(spec, selected_token_ids=mapping.selected_token_ids)
            return self._scheduler.submit_first(functools.partial(self._open, spec, mapping, probe=probe))
        opened: Future[OpenedSession] = Future()
        opened.set_result(self._open(spec, mapping))
        return opened

    def _is_unproved(self, spec: SessionSpec, mapping: VocabMapping) -> bool:
        """Whether the head has to be probed before it serves this encoding of this draft vocabulary."""
        return ENCODINGS[spec.encoding].needs_head and not self._sessions.serves(
            mapping.digest, spec.encoding
        )

    def _open(self, spec: SessionSpec, mapping: VocabMapping, *, probe: bool = False) -> OpenedSession:
        # Several trainers may have asked before the first of them was answered.
        if probe and self._is_unproved(spec, mapping):
            check_encoding(self._target, mapping.selected_token_ids, spec.encoding)
        if spec.answers:
            self._answers.check()
        session, config = self._sessions.open(spec, mapping), self._config
        credits = config.max_answers if spec.answers else config.max_queued_per_session
        credits = min(credits, self._sessions.quotas.of(spec.run).requests or credits)
        return OpenedSession(id=session.id, credits=credits, lease=config.session_lease)

"""The target service: checks requests, keeps sessions, queues forward passes, bounds memory and queues.

Plain logic without transport: methods return values or futures of them, and raise the errors of
`eagle_rpc.errors`. The module loads no model code.
"""

import contextlib
import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import EagleRpcError, StaleIncarnation, TargetBusy, TargetDraining, TargetFailed
from eagle_rpc.process.waiting import Clock
from eagle_rpc.service.answering import AnswerDesk, Answering
from eagle_rpc.service.arguments import check_answer_request, check_request, check_spec, check_type
from eagle_rpc.service.fairness import Demand, Work
from eagle_rpc.service.forward_pass import ForwardPass, PassRequest
from eagle_rpc.service.head_rows import HeadRows
from eagle_rpc.service.reply_budget import ReplyBudget
from eagle_rpc.service.scheduler import ForwardScheduler, Passes
from eagle_rpc.service.sessions import Session, SessionTable, most_reply_bytes
from eagle_rpc.service.status import Throughput, describe_load, describe_memory
from eagle_rpc.supervision import (
    ENCODINGS,
    AnswerPrompt,
    AnswerRequest,
    DraftHead,
    EncodedSupervision,
    GenerateRequest,
    HeartbeatReply,
    ModelInfo,
    OpenedSession,
    PlainTarget,
    PromptAnswer,
    SessionSpec,
    VocabMapping,
    as_target,
    check_encoding,
    describe_target,
    device_of,
    own_storage,
)

logger = logging.getLogger(__name__)

# Seconds that `close` waits for a forward pass under way.
_STOP_TIMEOUT = 30.0
# Longest time in seconds between two looks at leases, deadlines and sent replies.
_LOOK_INTERVAL = 1.0
_PROBE_ELEMENTS = 2**16


class TargetModelServer:
    """One replica.

    A session ends with `disconnect`, or when its trainer has sent neither a request nor a heartbeat for
    `target.session_lease` seconds. A forward pass that runs for it goes on.
    """

    def __init__(
        self,
        target: PlainTarget,
        config: TargetConfig,
        *,
        incarnation: str | None = None,
        answering: Answering | None = None,
        passes: Passes | None = None,
        clock: Clock = time.monotonic,
    ):
        """`incarnation`: of this process, random by default; `answering` None: it answers no prompts.

        `passes` None: the target runs in this process, as `ForwardPass`.

        Raises `ConfigError` if limits of `config` exceed the model's.
        """
        self._target = as_target(target)
        self._config = config
        self._clock = clock
        self._started = clock()
        self._first_request: float | None = None  # when it came
        self._info = describe_target(
            self._target,
            max_length=config.max_length,
            max_batch_tokens=config.max_batch_tokens,
            chunk_rows=config.chunk_rows,
            incarnation=incarnation,
        )
        self._embeddings = own_storage(target.get_input_embeddings().weight.cpu())
        self.device = device_of(self._target)
        """The device of the supervision: the target's, or its last one."""
        self.sessions = SessionTable(config, self.device, clock)
        self.throughput = Throughput(clock)
        demand = Demand(clock)
        self._answers = AnswerDesk(answering, config, demand, clock)
        passes = passes or ForwardPass(self._target, config)
        self._scheduler = ForwardScheduler(passes, self._answers, config, demand, clock)
        self._budget = ReplyBudget(config, demand)
        self._heads = HeadRows(self._target, self._info, self._budget, clock)
        self._closed = threading.Event()
        self._expiry = threading.Thread(target=self._expire_regularly, name="expiry", daemon=True)
        self._expiry.start()

    # --- for trainers

    def model_info(self) -> ModelInfo:
        """The target's identity and limits."""
        return self._info

    def input_embeddings(self) -> Tensor:
        """The token embedding [V, H] in the target's dtype, on the CPU; all callers get the same tensor."""
        return self._embeddings

    def output_embeddings(self, session: str) -> DraftHead:
        """The head's rows of the session's draft vocabulary [K, H], ascending by target id, on the CPU.

        Raises `UnknownSession`, `UnsupportedTarget`, `TargetBusy` as `generate`.
        """
        return self._heads.get(self.sessions.renew(session))

    def probe_transfer(self) -> Tensor:
        """0, 1, 2, ... as int32 [65536] on the target's device: to test the transport."""
        return torch.arange(_PROBE_ELEMENTS, dtype=torch.int32, device=self.device)

    def open_session(self, spec: SessionSpec) -> Future[OpenedSession]:
        """Registers a trainer: at once, or after a probe of the head, which runs before waiting requests.

        Raises `InvalidRequest` for the mapping or a setting, `TargetMismatch`, `TargetDraining`,
        `TargetBusy`; from the future also `UnsupportedTarget` if the encoding would not be exact, or if the
        session is for answers and this target gives none.
        """
        check_spec(spec)
        if self._scheduler.draining:
            raise TargetDraining("the target is shutting down and takes no new sessions")
        mapping = VocabMapping.from_token_ids(spec.selected_token_ids, self._info.vocab_size)
        spec.expected.check(self._info)
        probe = ENCODINGS[spec.encoding].needs_head and not self.sessions.serves(
            mapping.digest, spec.encoding
        )
        if probe or spec.answers:
            # A probe is a forward pass. While it waits it keeps the ids alone, not the sender's storage.
            spec = dataclasses.replace(spec, selected_token_ids=mapping.selected_token_ids)
            return self._scheduler.submit_first(functools.partial(self._open, spec, mapping, probe=probe))
        opened: Future[OpenedSession] = Future()
        opened.set_result(self._open(spec, mapping))
        return opened

    def set_vocab_mapping(self, selected_token_ids: Tensor) -> Future[OpenedSession]:
        """The reference's call: `open_session` with default settings for the draft vocabulary [K]."""
        return self.open_session(SessionSpec(selected_token_ids=selected_token_ids))

    def _open(self, spec: SessionSpec, mapping: VocabMapping, *, probe: bool = False) -> OpenedSession:
        # Several trainers may have asked before the first of them was answered.
        if probe and not self.sessions.serves(mapping.digest, spec.encoding):
            check_encoding(self._target, mapping.selected_token_ids, spec.encoding)
        if spec.answers:
            self._answers.check()
        session, config = self.sessions.open(spec, mapping), self._config
        credits = config.max_answers if spec.answers else config.max_queued_per_session
        return OpenedSession(id=session.id, credits=credits, lease=config.session_lease)

    def generate(self, request: GenerateRequest) -> Future[EncodedSupervision]:
        """The supervision of one batch; on a GPU ready in the order of the device's default stream.

        Raises `InvalidRequest`, `StaleIncarnation`, `UnknownSession`, `TargetDraining`, `TargetBusy` with the
        seconds until the next try; from the future `RequestExpired`, `TargetOutOfMemory`, `TargetFailed` too.
        """
        with self._refusals_counted():
            check_request(request)
            session, info = self._session_of(request), self._info
            request.tokens.check(
                vocab_size=info.vocab_size, max_length=info.max_length, max_tokens=info.max_batch_tokens
            )
            try:
                return self._submit(session, request)
            except TargetBusy as busy:
                busy.retry_after = self._scheduler.retry_after
                raise

    def _submit(self, session: Session, request: GenerateRequest) -> Future[EncodedSupervision]:
        tokens = request.tokens
        num_tokens = int(tokens.attention_mask.sum())
        num_bytes = most_reply_bytes(self._info, session, tokens, num_tokens)
        promised = self._budget.promise(num_bytes, run=session.spec.run, session=session.id)

        def record(outcome: EncodedSupervision | EagleRpcError) -> None:
            if isinstance(outcome, EagleRpcError):
                self._budget.release(promised)
                self.throughput.count(outcome.code)
            else:
                self._budget.fulfil(promised, outcome)
                self.sessions.count(session, num_tokens)
                self.throughput.count("ok", tokens=num_tokens, reply_bytes=outcome.num_bytes)
                if outcome.times is not None:
                    self.throughput.add_times(outcome.times)

        try:
            # A sender may ship views of larger storages, which no bound counts.
            kept = PassRequest(session, tokens.map_tensors(own_storage))
            work = self._work(session, request, kept, record)
            self._scheduler.submit(work)
        except BaseException:
            self._budget.release(promised)
            raise
        return work.answer

    def answer(self, request: AnswerRequest) -> Future[PromptAnswer]:
        """The answer to one prompt, decoded between forward passes; `cancel` ends it at any time.

        Raises as `generate`; from the future also `UnsupportedTarget` for a target that answers no prompts.
        """
        with self._refusals_counted():
            check_answer_request(request)
            session, prompt = self._session_of(request), request.prompt
            prompt.check(vocab_size=self._info.vocab_size, max_length=self._info.max_length)

            def record(outcome: PromptAnswer | EagleRpcError) -> None:
                if isinstance(outcome, EagleRpcError):
                    self.throughput.count(outcome.code)
                else:
                    self.sessions.count(session, len(outcome.token_ids))
                    self.throughput.count("ok", answer_tokens=len(outcome.token_ids))

            content = dataclasses.replace(prompt, token_ids=own_storage(prompt.token_ids))
            work = self._work(session, request, content, record)
            self._scheduler.submit_prompt(work)
            return work.answer

    @contextlib.contextmanager
    def _refusals_counted(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.throughput.count(error.code if isinstance(error, EagleRpcError) else TargetFailed.code)
            raise

    def _session_of(self, request: GenerateRequest | AnswerRequest) -> Session:
        """The request's session, whose lease starts anew. Raises `StaleIncarnation`, `UnknownSession`."""
        if request.incarnation != self._info.incarnation:
            meant = f"the request is for incarnation {request.incarnation:.80}"
            raise StaleIncarnation(f"{meant}, this is {self._info.incarnation}")
        return self.sessions.renew(request.session)

    def _work(
        self,
        session: Session,
        request: GenerateRequest | AnswerRequest,
        content: PassRequest | AnswerPrompt,
        record: Callable[[Any], None],
    ) -> Work:
        now = self._clock()
        self._first_request = now if self._first_request is None else self._first_request
        return Work(
            content,
            run=session.spec.run,
            session=session.id,
            request_id=request.request_id,
            deadline=now + request.seconds_left,
            record=record,
            arrived=now,
        )

    def cancel(self, session: str, request_ids: list[str]) -> int:
        """Ends waiting requests and all prompts of these ids with `RequestExpired`; returns their number."""
        check_type("request_ids", request_ids, list)
        for request_id in request_ids:
            check_type("request_id", request_id, str)
        return self._scheduler.cancel(self.sessions.renew(session).id, frozenset(request_ids))

    def heartbeat(self, session: str) -> HeartbeatReply:
        """Renews the session's lease. Raises `UnknownSession`."""
        self.sessions.renew(session)
        return HeartbeatReply(incarnation=self._info.incarnation, draining=self._scheduler.draining)

    def disconnect(self, session: str) -> None:
        """Ends this session and drops its waiting requests; other sessions go on. Raises `UnknownSession`."""
        closed = self.sessions.close(session)
        self._scheduler.drop_session(closed.id, "was disconnected")

    def status(self) -> dict[str, Any]:
        """Identity, load and memory of this replica, in types that JSON has.

        `uptime`, `asked_seconds`: seconds since the start and since the first request; `max_reply_bytes`: the
        bound of `reply_bytes_held`; `paused`: why it takes no requests for now, empty if it does; the rest as
        in `ModelInfo`, `Throughput` and `describe_load`.
        """
        now = self._clock()
        identity = "architecture hidden_size vocab_size dtype weights_fingerprint incarnation".split()
        return {
            **{name: getattr(self._info, name) for name in identity},
            "uptime": now - self._started,
            "asked_seconds": 0.0 if self._first_request is None else now - self._first_request,
            "max_reply_bytes": self._config.max_reply_bytes,
            "paused": self._scheduler.paused,
            **self.throughput.describe(),
            **describe_load(self.sessions, self._scheduler, self._answers, self._budget),
            **describe_memory(self._target.devices),
        }

    # --- for the process that serves

    @property
    def failure(self) -> str | None:
        """Why this target can run no further pass; null while it can."""
        return self._scheduler.failure

    def _expire_regularly(self) -> None:
        while not self._closed.wait(min(_LOOK_INTERVAL, self._config.session_lease / 4)):
            self.expire()

    def expire(self) -> None:
        """Ends silent sessions, late requests and unused copies; a thread calls it every second."""
        for session in self.sessions.close_silent():
            self._scheduler.drop_session(session.id, "fell silent")
        self._scheduler.drop_expired()
        self._heads.drop_unused()

    def pause(self, reason: str) -> None:
        """Hands waiting requests back and refuses new ones, as a target that drains, until `resume`."""
        self._scheduler.pause(reason)

    def resume(self) -> None:
        """Takes requests again. Sessions have lived on."""
        self._scheduler.resume()

    def drain(self, timeout: float) -> bool:
        """Refuses new work and waits up to `timeout` seconds for the queue; whether all was answered."""
        return self._scheduler.drain(timeout)

    def wait_sent(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds until RPC has sent all replies; whether it has."""
        self._heads.drop_unused(at_once=True)
        return self._budget.wait_sent(timeout)

    def close(self) -> bool:
        """Ends the threads, and waiting requests with `TargetDraining`. Whether they ended within 30 s."""
        self._closed.set()
        ended = self._scheduler.stop(_STOP_TIMEOUT)
        self._expiry.join(_STOP_TIMEOUT)
        if not ended:
            logger.warning("a forward pass still runs %.0f s after the target was closed", _STOP_TIMEOUT)
        return ended

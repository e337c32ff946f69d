"""The target service: checks requests, keeps sessions, queues forward passes, bounds memory and queues.

Plain logic without transport: methods return values or futures of them, and raise the errors of
`eagle_rpc.errors`. The module loads no model code.
"""

import dataclasses
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import StaleIncarnation, TargetBusy
from eagle_rpc.process.waiting import Clock
from eagle_rpc.service.accounts import Accounts
from eagle_rpc.service.answering import AnswerDesk, Answering
from eagle_rpc.service.arguments import check_answer_request, check_request, check_type
from eagle_rpc.service.fairness import Demand, Work
from eagle_rpc.service.forward_pass import ForwardPass, PassRequest
from eagle_rpc.service.head_rows import HeadRows
from eagle_rpc.service.opening import SessionOpener
from eagle_rpc.service.passes import Passes
from eagle_rpc.service.quotas import Quotas
from eagle_rpc.service.reply_budget import ReplyBudget
from eagle_rpc.service.scheduler import ForwardScheduler
from eagle_rpc.service.sessions import Session, SessionTable, most_reply_bytes
from eagle_rpc.service.status import Throughput, describe_load, describe_memory
from eagle_rpc.supervision import (
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
    as_target,
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
        demand = Demand(clock, Quotas(config.quotas))
        self.sessions = SessionTable(config, self.device, clock, demand.quotas)
        self.throughput = Throughput(clock)
        self._answers = AnswerDesk(answering, config, demand, clock)
        passes = passes or ForwardPass(self._target, config)
        self._scheduler = ForwardScheduler(passes, self._answers, config, demand, clock)
        self._opener = SessionOpener(
            self._target, self._info, self.sessions, self._scheduler, self._answers, config
        )
        self._budget = ReplyBudget(config, demand)
        self._accounts = Accounts(self._budget, self.sessions, self.throughput)
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
        return self._opener.open(spec)

    def set_vocab_mapping(self, selected_token_ids: Tensor) -> Future[OpenedSession]:
        """The reference's call: `open_session` with default settings for the draft vocabulary [K]."""
        return self.open_session(SessionSpec(selected_token_ids=selected_token_ids))

    def generate(self, request: GenerateRequest) -> Future[EncodedSupervision]:
        """The supervision of one batch; on a GPU ready in the order of the device's default stream.

        Raises `InvalidRequest`, `StaleIncarnation`, `UnknownSession`, `TargetDraining`, `TargetBusy` with the
        seconds until the next try; from the future `RequestExpired`, `TargetOutOfMemory`, `TargetFailed` too.
        """
        with self.throughput.refusals_counted():
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
        with self._accounts.of_batch(session, num_tokens=num_tokens, num_bytes=num_bytes) as record:
            # A sender may ship views of larger storages, which no bound counts.
            kept = PassRequest(session, tokens.map_tensors(own_storage))
            work = self._work(session, request, kept, record)
            self._scheduler.submit(work)
        return work.answer

    def answer(self, request: AnswerRequest) -> Future[PromptAnswer]:
        """The answer to one prompt, decoded between forward passes; `cancel` ends it at any time.

        Raises as `generate`; from the future also `UnsupportedTarget` for a target that answers no prompts.
        """
        with self.throughput.refusals_counted():
            check_answer_request(request)
            session, prompt = self._session_of(request), request.prompt
            prompt.check(vocab_size=self._info.vocab_size, max_length=self._info.max_length)
            content = dataclasses.replace(prompt, token_ids=own_storage(prompt.token_ids))
            work = self._work(session, request, content, self._accounts.of_prompt(session))
            self._scheduler.submit_prompt(work)
            return work.answer

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
        self.throughput.note_request()
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

        `uptime`: seconds since the start; `max_reply_bytes`: the bound of `reply_bytes_held`; `paused`: why it
        takes no requests for now, empty if it does; the rest as in `ModelInfo`, `Throughput.describe` and
        `describe_load`.
        """
        identity = "architecture hidden_size vocab_size dtype weights_fingerprint incarnation".split()
        return {
            **{name: getattr(self._info, name) for name in identity},
            "uptime": self._clock() - self._started,
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

"""The target service: checks requests, keeps sessions, runs one forward pass at a time, and bounds what it holds for others.

Plain logic: it returns envelopes or futures of them and knows no transport. Importing this module loads no model code,
because an RRef proxy imports the class on the trainer's side.
"""

import dataclasses
import functools
import logging
import threading
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.rpc.functions import async_execution
from torch.futures import Future

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import StaleIncarnation, TargetBusy, TargetDraining
from eagle_rpc.service.demand import Demand
from eagle_rpc.service.draft_heads import DraftHeads
from eagle_rpc.service.endpoint import check_name, check_seconds, check_type, compact, future_of, replies
from eagle_rpc.service.forward_pass import ForwardPass, PassRequest
from eagle_rpc.service.reply_budget import ReplyBudget, ReplyBytes
from eagle_rpc.service.scheduler import ForwardScheduler
from eagle_rpc.service.sessions import Session, SessionTable, most_reply_bytes
from eagle_rpc.service.status import describe_load, describe_memory
from eagle_rpc.service.throughput import Throughput
from eagle_rpc.supervision import (
    DraftHead,
    GenerateRequest,
    ModelInfo,
    Ok,
    OpenedSession,
    Pulse,
    Reply,
    SessionSpec,
    TargetExpectation,
    TokenBatch,
    VocabMapping,
    own_storage,
)
from eagle_rpc.target.supervise import check_encoding, describe_target, device_of

logger = logging.getLogger(__name__)

# Seconds that `close` waits for a forward pass under way.
_STOP_TIMEOUT = 30.0
# Seconds between two looks at leases, deadlines and sent replies at most.
_LOOK_INTERVAL = 1.0
_PROBE_ELEMENTS = 2**16


class TargetModelServer:
    """One replica. Every method answers with a `Reply` or a future of one, and raises nothing.

    The types in the signatures are those of `Ok.value`. A session ends with `disconnect`, or when its trainer has sent
    neither request nor heartbeat for `target.session_lease` seconds; a forward pass that runs for it goes on.
    """

    def __init__(
        self,
        target: Any,
        config: TargetConfig,
        *,
        incarnation: str | None = None,
        clock: Callable[[], float] = time.monotonic,
    ):
        """`target`: an `Eagle3Target`; `incarnation`: the process's, where it has one already; `clock`: seconds.

        Raises `ConfigError` if limits of `config` exceed the model's.
        """
        self._target = target
        self._config = config
        self._clock = clock
        self._started = clock()
        self._info = describe_target(target, config, incarnation)
        self._embeddings = own_storage(target.get_input_embeddings().weight.cpu())
        self._device = device_of(target)
        self._sessions = SessionTable(
            max_sessions=config.max_sessions, lease=config.session_lease, device=self._device, clock=clock
        )
        self._reply_devices = [self._device] if self._device.type == "cuda" else []
        self._scheduler = ForwardScheduler(
            ForwardPass(target, config),
            max_queued=config.max_queued_requests,
            max_queued_per_session=config.max_queued_per_session,
            clock=clock,
            devices=self._reply_devices,
        )
        self._demand = Demand(clock)
        self._budget = ReplyBudget(
            max_bytes=config.max_reply_bytes, max_bytes_per_session=config.max_reply_bytes_per_session
        )
        self._heads = DraftHeads(target, self._info, self._budget, clock)
        self._throughput = Throughput(clock)
        self._closed = threading.Event()
        self._caretaker = threading.Thread(target=self._take_care, name="caretaker", daemon=True)
        self._caretaker.start()

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a server never travels, but with CUDA torch looks for tensors in an RRef's value by pickling it."""
        return {}

    @replies
    def model_info(self) -> ModelInfo:
        """The target's identity and limits."""
        return self._info

    @replies
    def input_embeddings(self) -> Tensor:
        """The raw token embedding [V, H] in the target's dtype, on the CPU, which seeds the draft's. One tensor for everybody."""
        return self._embeddings

    @replies
    def output_embeddings(self, session: str) -> DraftHead:
        """The head's rows of the session's draft vocabulary [K, H], in ascending order of target ids, on the CPU.

        Failures: `unknown_session`, `unsupported_target`, `busy` as `generate`.
        """
        opened = self._sessions.renew(session)
        return self._heads.get(opened, num_jobs=self._demand.note(opened.job))

    @async_execution
    def probe_transfer(self) -> Future:
        """A future of `Reply[Tensor]`: 0, 1, 2, … as int32 [65536] on the target's device, to see whether it arrives as it left."""
        answered: Future = Future(devices=self._reply_devices or None)
        answered.set_result(Ok(torch.arange(_PROBE_ELEMENTS, dtype=torch.int32, device=self._device)))
        return answered

    @async_execution
    def open_session(self, spec: SessionSpec) -> Future:
        """Registers a trainer: a future of `Reply[OpenedSession]`.

        Done at once, but where the head has to be probed first, which takes its turn before the requests that wait.
        Failures: `invalid_request` for the mapping or a setting, `target_mismatch` for what the trainer expects,
        `unsupported_target` where the encoding would not be exact, `busy`, `draining`.
        """
        return future_of(self._begin_session(spec))

    @async_execution
    def set_vocab_mapping(self, selected_token_ids: Tensor) -> Future:
        """The reference's call: a session with default settings; answers as `open_session`."""
        return future_of(self._begin_session(SessionSpec(selected_token_ids=selected_token_ids)))

    @replies
    def _begin_session(self, spec: SessionSpec) -> OpenedSession | Future:
        check_type("spec", spec, SessionSpec)
        for name in ("encoding", "rows", "job", "trainer"):
            check_name(name, getattr(spec, name))
        check_type("expected", spec.expected, TargetExpectation)
        check_type("through_host", spec.through_host, bool)
        spec.check()
        if self._scheduler.draining:
            raise TargetDraining("the target is shutting down and takes no new sessions")
        mapping = VocabMapping.from_token_ids(spec.selected_token_ids, self._info.vocab_size)
        spec.expected.check(self._info)
        if spec.encoding != "hidden" or self._sessions.serves(mapping.digest, spec.encoding):
            return self._open(spec, mapping)
        # A probe of the head is a forward pass, and there is one thread for those. What waits for it keeps no more than its ids.
        spec = dataclasses.replace(spec, selected_token_ids=mapping.selected_token_ids)
        return self._scheduler.submit_first(functools.partial(self._probe_and_open, spec, mapping))

    def _probe_and_open(self, spec: SessionSpec, mapping: VocabMapping) -> OpenedSession:
        # Several trainers may have asked before the first of them was answered.
        if not self._sessions.serves(mapping.digest, spec.encoding):
            check_encoding(self._target, mapping.selected_token_ids, spec.encoding)
        return self._open(spec, mapping)

    def _open(self, spec: SessionSpec, mapping: VocabMapping) -> OpenedSession:
        session = self._sessions.open(spec, mapping)
        return OpenedSession(
            id=session.id, credits=self._config.max_queued_per_session, lease=self._config.session_lease
        )

    @async_execution
    def generate(self, request: GenerateRequest) -> Future:
        """Supervision of one batch: a future of `Reply[EncodedSupervision]`.

        Failures: `invalid_request`, `stale_incarnation`, `unknown_session`, `draining`, `busy` at once, the last with the
        time to wait until the next try; `expired`, `out_of_memory`, `failed`, and those again, later.
        """
        accepted = self._enqueue(request)
        if not isinstance(accepted, Ok):
            self._throughput.refused(accepted.code)
        return future_of(accepted)

    @replies
    def _enqueue(self, request: GenerateRequest) -> Future:
        check_type("request", request, GenerateRequest)
        check_name("request_id", request.request_id)
        check_type("incarnation", request.incarnation, str)
        check_type("tokens", request.tokens, TokenBatch)
        check_seconds("seconds_left", request.seconds_left)
        info = self._info
        if request.incarnation != info.incarnation:
            raise StaleIncarnation(
                f"the request is for incarnation {request.incarnation:.80}, this is {info.incarnation}"
            )
        session = self._sessions.renew(request.session)
        request.tokens.check(
            vocab_size=info.vocab_size, max_length=info.max_length, max_tokens=info.max_batch_tokens
        )
        try:
            return self._submit(
                session, request.request_id, request.tokens, self._clock() + request.seconds_left
            )
        except TargetBusy as busy:
            busy.retry_after = self._scheduler.retry_after
            raise

    def _submit(self, session: Session, request_id: str, tokens: TokenBatch, deadline: float) -> Future:
        num_jobs = self._demand.note(session.job)
        num_tokens = int(tokens.attention_mask.sum())
        num_bytes = most_reply_bytes(self._info, session, tokens, num_tokens)
        promised = self._budget.promise(num_bytes, job=session.job, session=session.id, num_jobs=num_jobs)
        try:
            return self._scheduler.submit(
                PassRequest(session, compact(tokens)),
                job=session.job,
                session=session.id,
                request_id=request_id,
                deadline=deadline,
                num_jobs=num_jobs,
                settle=functools.partial(self._settle, session, promised, num_tokens),
            )
        except BaseException:
            self._budget.release(promised)
            raise

    def _settle(self, session: Session, promised: ReplyBytes, num_tokens: int, reply: Reply) -> None:
        """Keeps the books of a request that was accepted, just before its reply goes out."""
        if isinstance(reply, Ok):
            self._budget.fulfil(promised, reply.value)
            self._sessions.count(session, num_tokens)
            self._throughput.answered(num_tokens, reply.value.num_bytes)
        else:
            self._budget.release(promised)
            self._throughput.refused(reply.code)

    @replies
    def cancel(self, session: str, request_ids: list[str]) -> int:
        """Drops those of the session's requests that have not started; their answer is `expired`. How many there were."""
        check_type("request_ids", request_ids, list)
        for request_id in request_ids:
            check_type("request_id", request_id, str)
        return self._scheduler.cancel(self._sessions.renew(session).id, frozenset(request_ids))

    @replies
    def heartbeat(self, session: str) -> Pulse:
        """Renews the session's lease."""
        self._sessions.renew(session)
        return Pulse(incarnation=self._info.incarnation, draining=self._scheduler.draining)

    @replies
    def status(self) -> dict[str, Any]:
        """What this replica is, holds and does, in types that JSON has.

        `uptime`: seconds; `max_reply_bytes`: the bound of `reply_bytes_held`; the rest as `ModelInfo` and `describe_load` say.
        """
        info = self._info
        return {
            "architecture": info.architecture,
            "hidden_size": info.hidden_size,
            "vocab_size": info.vocab_size,
            "dtype": info.dtype,
            "weights_fingerprint": info.weights_fingerprint,
            "incarnation": info.incarnation,
            "uptime": self._clock() - self._started,
            "max_reply_bytes": self._config.max_reply_bytes,
            **describe_load(self._sessions, self._scheduler, self._budget, self._throughput),
            **describe_memory(self._device),
        }

    @replies
    def disconnect(self, session: str) -> None:
        """Ends this session and drops its requests that have not started; the server and other sessions go on."""
        closed = self._sessions.close(session)
        self._scheduler.drop_session(closed.id, "was disconnected")

    def _take_care(self) -> None:
        while not self._closed.wait(min(_LOOK_INTERVAL, self._config.session_lease / 4)):
            self.let_go()

    def let_go(self) -> None:
        """Ends silent sessions and frees what nobody waits for; the server does so by itself every second or oftener."""
        for session in self._sessions.close_silent():
            self._scheduler.drop_session(session.id, "fell silent")
        self._scheduler.drop_expired()
        self._heads.drop_unused()

    @replies
    def drain(self, timeout: float) -> bool:
        """Refuses new sessions and requests, which heartbeats tell, and waits up to `timeout` seconds for the queue.

        Whether everything was answered.
        """
        check_seconds("timeout", timeout)
        return self._scheduler.drain(timeout)

    @replies
    def wait_sent(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds until RPC has written every reply's tensors; whether it has.

        What is unsent when RPC shuts down is lost.
        """
        check_seconds("timeout", timeout)
        self._heads.drop_unused(at_once=True)
        return self._budget.wait_sent(timeout)

    @replies
    def close(self) -> bool:
        """Ends the server's threads; requests that wait are answered `draining`. Whether they ended within 30 s."""
        self._closed.set()
        ended = self._scheduler.stop(_STOP_TIMEOUT)
        self._caretaker.join(_STOP_TIMEOUT)
        if not ended:
            logger.warning("a forward pass still runs %.0f s after the target was closed", _STOP_TIMEOUT)
        return ended

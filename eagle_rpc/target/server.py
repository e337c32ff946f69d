"""The target service: checks requests, keeps sessions, runs one forward pass at a time.

Plain logic: it returns envelopes or futures of them and knows no transport. Importing this module loads no model code,
because an RRef proxy imports the class on the trainer's side.
"""

import functools
import logging
import math
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.rpc.functions import async_execution
from torch.futures import Future

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import EagleRpcError, InvalidRequest, TargetDraining
from eagle_rpc.supervision import (
    DraftHead,
    EncodedSupervision,
    Failure,
    GenerateRequest,
    ModelInfo,
    Ok,
    Reply,
    SessionSpec,
    TargetExpectation,
    TokenBatch,
    VocabMapping,
    failure_of,
)
from eagle_rpc.target.scheduler import ForwardScheduler
from eagle_rpc.target.sessions import Session, SessionTable
from eagle_rpc.target.supervise import check_encoding, describe_target, device_of, exact_draft_head, own_storage, supervise

logger = logging.getLogger(__name__)

# Seconds that `close` waits for a forward pass under way.
_STOP_TIMEOUT = 30.0


def _replies(method: Callable[..., Any]) -> Callable[..., Reply]:
    """Turns a method's value into `Ok` and whatever it raises into a typed `Failure`: senders may send anything."""

    @functools.wraps(method)
    def reply(*args: Any, **kwargs: Any) -> Reply:
        try:
            return Ok(method(*args, **kwargs))
        except EagleRpcError as error:
            return failure_of(error)
        except Exception as error:
            logger.exception("%s failed", method.__name__)
            return Failure("failed", f"{type(error).__name__}: {error}")

    return reply


class TargetModelServer:
    """One replica. Every method answers with a `Reply` (`generate`: a future of one) and raises nothing.

    The types in the signatures are those of `Ok.value`.
    """

    def __init__(self, target: Any, config: TargetConfig):
        """`target`: an `Eagle3Target`. Raises `ConfigError` if limits of `config` exceed the model's."""
        self._target = target
        self._chunk_rows = config.chunk_rows
        self._info = describe_target(target, config)
        device = device_of(target)
        self._sessions = SessionTable(max_sessions=config.max_sessions, device=device)
        self._scheduler = ForwardScheduler(max_queued=config.max_queued_requests, devices=[device] if device.type == "cuda" else [])

    def __getstate__(self) -> dict[str, Any]:
        """Nothing: a server never travels, but with CUDA torch looks for tensors in an RRef's value by pickling it."""
        return {}

    @_replies
    def model_info(self) -> ModelInfo:
        """The target's identity and limits."""
        return self._info

    @_replies
    def input_embeddings(self) -> Tensor:
        """The raw token embedding [V, H] in the target's dtype, which seeds the draft's."""
        return own_storage(self._target.get_input_embeddings().weight)

    @_replies
    def output_embeddings(self, session: str) -> DraftHead:
        """The head's rows of the session's draft vocabulary [K, H], in ascending order of target ids."""
        return exact_draft_head(self._target, self._sessions.get(session).vocab.selected_token_ids)

    @_replies
    def open_session(self, spec: SessionSpec) -> str:
        """Registers a trainer and answers with the session's id.

        Failures: `invalid_request` for the mapping or a setting, `target_mismatch` for what the trainer expects,
        `unsupported_target` where the encoding would not be exact, `busy`, `draining`.
        """
        _check_type("spec", spec, SessionSpec)
        for name in ("encoding", "rows", "job", "trainer"):
            _check_type(name, getattr(spec, name), str)
        _check_type("expected", spec.expected, TargetExpectation)
        spec.check()
        if self._scheduler.draining:
            raise TargetDraining("the target is shutting down and takes no new sessions")
        mapping = VocabMapping.from_token_ids(spec.selected_token_ids, self._info.vocab_size)
        spec.expected.check(self._info)
        check_encoding(self._target, mapping.selected_token_ids, spec.encoding)
        return self._sessions.open(spec, mapping).id

    def set_vocab_mapping(self, selected_token_ids: Tensor) -> Reply:
        """The reference's call: a session with default settings; answers as `open_session`."""
        return self.open_session(SessionSpec(selected_token_ids=selected_token_ids))

    @async_execution
    def generate(self, request: GenerateRequest) -> Future:
        """Supervision of one batch: a future of `Reply[EncodedSupervision]`.

        Failures: `invalid_request`, `unknown_session`, `busy`, `draining` at once; `expired`, `out_of_memory`, `failed` later.
        """
        accepted = self._enqueue(request)
        if isinstance(accepted, Ok):
            return accepted.value
        refused: Future = Future()
        refused.set_result(accepted)
        return refused

    @_replies
    def _enqueue(self, request: GenerateRequest) -> Future:
        _check_type("request", request, GenerateRequest)
        _check_type("request_id", request.request_id, str)
        _check_type("tokens", request.tokens, TokenBatch)
        _check_seconds("seconds_left", request.seconds_left)
        session = self._sessions.get(request.session)
        info = self._info
        request.tokens.check(vocab_size=info.vocab_size, max_length=info.max_length, max_tokens=info.max_batch_tokens)
        work = functools.partial(self._supervise, session, request.tokens)
        return self._scheduler.submit(work, session=session.id, deadline=time.monotonic() + request.seconds_left)

    def _supervise(self, session: Session, tokens: TokenBatch) -> EncodedSupervision:
        encoded = supervise(
            self._target, tokens, session.vocab, encoding=session.encoding, rows=session.rows, chunk_rows=self._chunk_rows
        )
        # TensorPipe aborts the process on a CUDA tensor without elements.
        return encoded if encoded.supervised_rows.numel() else encoded.to(torch.device("cpu"))

    @_replies
    def heartbeat(self, session: str) -> str:
        """The incarnation of this server, if the session is open."""
        self._sessions.get(session)
        return self._info.incarnation

    @_replies
    def stats(self) -> dict[str, int]:
        """Open sessions and mappings, requests queued and answered by outcome."""
        return {**self._sessions.stats(), **self._scheduler.stats()}

    @_replies
    def disconnect(self, session: str) -> None:
        """Ends this session and drops its requests that have not started; the server and other sessions go on."""
        self._sessions.close(session)
        self._scheduler.drop_session(session)

    @_replies
    def drain(self, timeout: float) -> bool:
        """Refuses new sessions and requests and waits up to `timeout` seconds for the queue; whether it is empty."""
        _check_seconds("timeout", timeout)
        return self._scheduler.drain(timeout)

    @_replies
    def close(self) -> bool:
        """Ends the forward thread; requests that wait are answered `draining`. Whether the thread ended in time."""
        ended = self._scheduler.stop(_STOP_TIMEOUT)
        if not ended:
            logger.warning("a forward pass still runs %.0f s after the target was closed", _STOP_TIMEOUT)
        return ended


def _check_type(name: str, value: Any, wanted: type) -> None:
    if not isinstance(value, wanted):
        raise InvalidRequest(f"{name} must be a {wanted.__name__}, got {type(value).__name__}")


def _check_seconds(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
        raise InvalidRequest(f"{name} must be a positive, finite number of seconds, got {value!r:.80}")

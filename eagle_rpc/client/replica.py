"""One target as a trainer sees it: the link, this trainer's session there, and how it has been doing."""

import logging
import threading
import time
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle_rpc.errors import TargetFailed, UnknownSession
from eagle_rpc.rpc import Link, PendingCall
from eagle_rpc.supervision import (
    DraftHead,
    GenerateRequest,
    ModelInfo,
    OpenedSession,
    SessionSpec,
    TokenBatch,
)

logger = logging.getLogger(__name__)

SERVICE_NAME = "target"
# A control call only validates and answers; this much means that the peer is stuck.
CONTROL_TIMEOUT = 10.0
# Weight of the newest request in the average of a replica's pace.
_NEWEST = 0.3


class Attempt(NamedTuple):
    """A call that belongs to a session."""

    call: PendingCall
    session: str


class Replica:
    """One incarnation of a target. Every call is bounded; refusals arrive as the exceptions of their codes."""

    def __init__(self, name: str, link: Link, *, request_timeout: float, stop: threading.Event) -> None:
        """`stop`: once set, nothing is waited for any longer."""
        self.name = name
        self.link = link
        self.info: ModelInfo = link.control("model_info", timeout=CONTROL_TIMEOUT).result()
        self.session: OpenedSession | None = None
        self.draining = False
        self.silent = False
        self.not_before = 0.0  # time.monotonic until which it has asked not to be asked
        self.seconds_per_request: float | None = (
            None  # at the target, without waiting for the requests before
        )
        self._last_answer = time.monotonic()
        self._under_way: dict[str, float] = {}  # request id -> when it was sent
        self._request_timeout = request_timeout
        self._stop = stop

    @property
    def usable(self) -> bool:
        """Whether new requests may go there."""
        return self.session is not None and not self.draining and not self.silent

    @property
    def state(self) -> str:
        """In one word, for people."""
        return (
            "silent"
            if self.silent
            else "draining"
            if self.draining
            else "serving"
            if self.session
            else "connecting"
        )

    @property
    def seconds_without_answer(self) -> float:
        """Since the last request was answered, or since the connection was made."""
        return time.monotonic() - self._last_answer

    @property
    def num_outstanding(self) -> int:
        return len(self._under_way)

    def has_credit(self, now: float) -> bool:
        """Whether it takes one more request at this moment."""
        return (
            self.session is not None
            and self.num_outstanding < self.session.credits
            and now >= self.not_before
        )

    def expected_wait(self, now: float, *, usual_pace: float) -> float:
        """Seconds that one more request would take there, going by the latest ones and by the one that waits longest.

        `usual_pace` stands in for the seconds a request of a replica that has not answered any yet.
        """
        pace = usual_pace if self.seconds_per_request is None else self.seconds_per_request
        oldest = max((now - sent for sent in self._under_way.values()), default=0.0)
        return (self.num_outstanding + 1) * max(pace, oldest / max(1, self.num_outstanding))

    def input_embeddings(self) -> Any:
        """[V, H] tensor."""
        return self._fetch("input_embeddings")

    def output_embeddings(self) -> DraftHead:
        """The head's rows of the session's draft vocabulary. Raises `UnknownSession` while there is none."""
        if self.session is None:
            raise UnknownSession(f"{self.name} has no session of this trainer yet")
        return self._fetch("output_embeddings", self.session.id)

    def open_session(self, spec: SessionSpec) -> None:
        spec = replace(spec, through_host=not self._reaches_this_gpu)
        # The first session with the hidden encoding probes the head, which waits for the target's forward thread.
        call = self.link.control("open_session", spec, timeout=self._request_timeout)
        self.session = call.result()

    @cached_property
    def _reaches_this_gpu(self) -> bool:
        """Whether tensors on the target's GPU arrive here on one, as they left: drivers and containers decide, so it is tried."""
        if not self.link.between_gpus:
            return False
        try:
            probe: Tensor = self._fetch("probe_transfer")
        except TargetFailed as error:
            fault = str(error)
        else:
            whole = torch.equal(probe.cpu(), torch.arange(len(probe), dtype=probe.dtype))
            fault = (
                ""
                if probe.is_cuda and whole
                else f"the probe arrived on {probe.device}" + ("" if whole else " and damaged")
            )
        if fault:
            logger.warning("supervision of %s goes through host memory: %s", self.name, fault)
        else:
            logger.info(
                "supervision of %s comes from its GPU to %s, as a probe has shown", self.name, probe.device
            )
        return not fault

    def disconnect(self) -> None:
        """Ends this trainer's session; the server lives on."""
        session, self.session = self.session, None
        if session is not None:
            self.link.control("disconnect", session.id, timeout=CONTROL_TIMEOUT).result()

    def send(self, request_id: str, tokens: TokenBatch) -> Attempt:
        """Starts one request; the deadline travels with it as seconds remaining."""
        assert self.session is not None
        request = GenerateRequest(
            session=self.session.id,
            incarnation=self.info.incarnation,
            request_id=request_id,
            tokens=tokens,
            seconds_left=self._request_timeout,
        )
        self._under_way[request_id] = time.monotonic()
        call = self.link.call(
            "generate", request, what=f"request {request_id}", timeout=self._request_timeout
        )
        return Attempt(call, self.session.id)

    def beat(self, *, timeout: float) -> Attempt:
        """Starts a heartbeat, which renews the session's lease."""
        assert self.session is not None
        return Attempt(self.link.control("heartbeat", self.session.id, timeout=timeout), self.session.id)

    def settle(self, request_id: str, *, answered: bool) -> None:
        """Nothing more is awaited for this request; an answer tells the pace."""
        sent = self._under_way.pop(request_id, None)
        if sent is not None and answered:
            now = time.monotonic()
            seconds, self._last_answer = now - max(sent, self._last_answer), now
            before = seconds if self.seconds_per_request is None else self.seconds_per_request
            self.seconds_per_request = before + _NEWEST * (seconds - before)

    def cancel(self, request_ids: list[str]) -> None:
        """Tells the target that nobody waits for these; whether it hears it makes no difference to anybody here."""
        if self.session is not None and request_ids:
            self.link.control("cancel", self.session.id, request_ids, timeout=CONTROL_TIMEOUT)

    def _fetch(self, method: str, *arguments: Any) -> Any:
        call = self.link.call(method, *arguments, what=method, timeout=self._request_timeout)
        return call.result(unless=lambda: self.silent or self._stop.is_set())

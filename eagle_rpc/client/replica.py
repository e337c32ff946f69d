"""One target as a trainer sees it: link, session and pace; and the choice of the target for a request."""

import logging
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.errors import TargetFailed, UnknownSession
from eagle_rpc.rpc import Link, ServiceCall
from eagle_rpc.supervision import (
    AnswerPrompt,
    AnswerRequest,
    DraftHead,
    GenerateRequest,
    ModelInfo,
    OpenedSession,
    SessionSpec,
    TokenBatch,
)

logger = logging.getLogger(__name__)

# Control calls are answered at once; after this time the peer is stuck.
CONTROL_TIMEOUT = 10.0
# Weight of the newest request in the average of a replica's pace.
_NEWEST = 0.3
# A measured pace, while nothing is under way, is half forgotten after so many times itself.
_HALF_FORGOTTEN = 3
# Expected waits that differ by less count as equal: paces of equal replicas differ by chance.
_EQUAL_WAITS = 1.2


class SessionCall(NamedTuple):
    """A call under way in a session."""

    call: ServiceCall
    session: str
    sent: float  # by time.monotonic


class Trip(NamedTuple):
    """The way of a request to the target that answered it, and back; times by time.monotonic."""

    target: str
    sent: float
    received: float


class Replica:
    """One incarnation of a target. Every call is bounded, and raises the error that the target answers."""

    def __init__(self, name: str, link: Link, settings: ClientSettings, stop: threading.Event) -> None:
        """Asks the target for its identity. `stop`: once set, waiting ends."""
        self.name = name
        self.link = link
        self.session: OpenedSession | None = None
        self.draining = False
        self.silent = False
        self.retired: float | None = None  # time.monotonic since which others are used instead
        self.not_before = 0.0  # time.monotonic until which it wants no request
        self.seconds_per_request: float | None = None  # at the target, without waiting for earlier requests
        self.last_sign = self.last_answer = time.monotonic()  # of a heartbeat, of a request
        self.heartbeat: SessionCall | None = None  # under way
        self._under_way: dict[str, float] = {}  # request id -> when it was sent
        self._request_timeout, self._prefetch = settings.request_timeout, settings.prefetch
        self._silence = settings.silence
        self._stop = stop
        self.info: ModelInfo = self._control("model_info")

    @property
    def usable(self) -> bool:
        """Whether it takes new requests."""
        return not (self.session is None or self.draining or self.silent or self.retired is not None)

    @property
    def state(self) -> str:
        """`silent`, `draining`, `retired`, `connecting` or `serving`."""
        if self.silent:
            return "silent"
        if self.draining:
            return "draining"
        if self.retired is not None:
            return "retired"
        return "connecting" if self.session is None else "serving"

    @property
    def num_outstanding(self) -> int:
        return len(self._under_way)

    def has_credit(self, now: float) -> bool:
        """Whether it takes one more request at `now` (of time.monotonic)."""
        return (
            self.session is not None
            and self.num_outstanding < self.session.credits
            and now >= self.not_before
        )

    def expected_wait(self, now: float, *, usual_pace: float) -> float:
        """Seconds that one more request would take, judged by the pace and by the oldest request.

        `usual_pace`: seconds per request of a replica that has not answered any yet.
        """
        pace = self._expected_pace(now, usual_pace)
        oldest = max((now - sent for sent in self._under_way.values()), default=0.0)
        return (self.num_outstanding + 1) * max(pace, oldest / max(1, self.num_outstanding))

    def _expected_pace(self, now: float, usual: float) -> float:
        """The measured pace, which nears `usual` as it gets old: a slow moment must not count until the end, since
        a replica that is avoided is not measured again.
        """
        measured = self.seconds_per_request
        if measured is None:
            return usual
        if self._under_way or measured <= usual:
            return measured
        return usual + (measured - usual) * 0.5 ** ((now - self.last_answer) / (_HALF_FORGOTTEN * measured))

    # --- the session

    def open_session(self, spec: SessionSpec) -> OpenedSession:
        spec = replace(spec, through_host=not self._gpus_connected)
        # The first session that needs the head waits for the forward thread, which probes it.
        opened: OpenedSession = self._control("open_session", spec, timeout=self._request_timeout)
        self.last_sign = time.monotonic()
        self.session = replace(opened, credits=min(opened.credits, self._prefetch))
        return self.session

    def disconnect(self) -> None:
        """Ends this trainer's session; the server goes on."""
        session, self.session = self.session, None
        if session is not None:
            self._control("disconnect", session.id)

    def send_heartbeat(self) -> SessionCall:
        """Starts a heartbeat, which renews the session's lease."""
        assert self.session is not None
        call = self.link.control("heartbeat", self.session.id, timeout=self._silence)
        self.heartbeat = SessionCall(call, self.session.id, time.monotonic())
        return self.heartbeat

    def status(self) -> dict[str, Any]:
        """The target's report about itself, as `TargetModelServer.status` gives it."""
        report: dict[str, Any] = self._control("status")
        return report

    def input_embeddings(self) -> Tensor:
        """The token embedding [V, H]."""
        return self._fetch("input_embeddings")

    def output_embeddings(self) -> DraftHead:
        """The head's rows of the draft vocabulary. Raises `UnknownSession` if there is no session."""
        if self.session is None:
            raise UnknownSession(f"{self.name} has no session of this trainer yet")
        return self._fetch("output_embeddings", self.session.id)

    # --- requests

    def send(self, request_id: str, content: TokenBatch | AnswerPrompt) -> SessionCall:
        """Starts one request, which carries its deadline as seconds remaining."""
        assert self.session is not None
        request: GenerateRequest | AnswerRequest
        fields: dict[str, Any] = {
            "session": self.session.id,
            "incarnation": self.info.incarnation,
            "request_id": request_id,
            "seconds_left": self._request_timeout,
        }
        if isinstance(content, TokenBatch):
            method, request = "generate", GenerateRequest(tokens=content, **fields)
        else:
            method, request = "answer", AnswerRequest(prompt=content, **fields)
        sent = self._under_way[request_id] = time.monotonic()
        what, timeout = f"request {request_id}", self._request_timeout
        call = self.link.call(method, request, what=what, timeout=timeout)
        return SessionCall(call, self.session.id, sent)

    def finish(self, request_id: str, *, answered: bool) -> None:
        """Forgets a request that has ended; an answer updates the pace."""
        sent = self._under_way.pop(request_id, None)
        if sent is not None and answered:
            now = time.monotonic()
            seconds, self.last_answer = now - max(sent, self.last_answer), now
            before = seconds if self.seconds_per_request is None else self.seconds_per_request
            self.seconds_per_request = before + _NEWEST * (seconds - before)

    def cancel(self, request_id: str) -> None:
        """Tells the target that the answer is not needed. It does no harm if this is lost."""
        if self.session is not None:
            self.link.control("cancel", self.session.id, [request_id], timeout=CONTROL_TIMEOUT)

    # --- the link

    @cached_property
    def _gpus_connected(self) -> bool:
        """Whether tensors on the target's GPU arrive intact on a GPU here. Only a try shows it."""
        if not self.link.between_gpus:
            return False
        fault = self._transfer_fault()
        if fault:
            logger.warning("supervision of %s goes through host memory: %s", self.name, fault)
        else:
            logger.info("supervision of %s comes from GPU to GPU, a probe arrived intact", self.name)
        return not fault

    def _transfer_fault(self) -> str:
        try:
            probe: Tensor = self._fetch("probe_transfer")
        except TargetFailed as error:
            return str(error)
        whole = torch.equal(probe.cpu(), torch.arange(len(probe), dtype=probe.dtype))
        if probe.is_cuda and whole:
            return ""
        return f"the probe arrived on {probe.device}" + ("" if whole else " and damaged")

    def _control(self, method: str, *arguments: Any, timeout: float = CONTROL_TIMEOUT) -> Any:
        return self.link.control(method, *arguments, timeout=timeout).result()

    def _fetch(self, method: str, *arguments: Any) -> Any:
        """The tensors that `method` answers with. The wait ends early if the target falls silent."""
        call = self.link.call(method, *arguments, what=method, timeout=self._request_timeout)
        return call.result(unless=lambda: self.silent or self._stop.is_set())


class Router:
    """Chooses the replica with the shortest expected wait, so that a slow replica gets fewer requests.

    Equal replicas take turns. Trainers start at different ones, so that they do not all ask the same one.
    """

    def __init__(self, *, offset: int) -> None:
        self._turn = offset

    def choose(self, replicas: Sequence[Replica], now: float) -> Replica | None:
        """A replica that has a credit at `now` (of time.monotonic), None if there is none."""
        willing = [replica for replica in replicas if replica.has_credit(now)]
        if not willing:
            return None
        start = self._turn % len(willing)
        self._turn += 1
        paces = [one.seconds_per_request for one in willing if one.seconds_per_request is not None]
        usual = min(paces, default=0.0)
        waits = [(one.expected_wait(now, usual_pace=usual), one) for one in willing[start:] + willing[:start]]
        longest = _EQUAL_WAITS * min(wait for wait, _ in waits)
        return min((one for wait, one in waits if wait <= longest), key=lambda one: one.num_outstanding)

"""One target server as a trainer sees it: its RRef, this trainer's session there, and the requests under way."""

import time
from typing import Any

from eagle_rpc.errors import RequestExpired, TargetBusy
from eagle_rpc.rpc import PendingCall, connect
from eagle_rpc.supervision import DraftHead, EncodedSupervision, GenerateRequest, ModelInfo, SessionSpec, TokenBatch, unwrap

SERVICE_NAME = "target"
# A control call only validates and answers; half a minute means that the peer is stuck.
_CONTROL_TIMEOUT = 30.0
_BUSY_RETRY_SECONDS = 0.05


class Replica:
    """Calls on one `TargetModelServer`. Every wait is bounded; refusals arrive as the exceptions of their codes."""

    def __init__(self, worker: str, *, request_timeout: float) -> None:
        self.name = worker
        self.num_outstanding = 0
        self._request_timeout = request_timeout
        self._rref = connect(worker, SERVICE_NAME, timeout=_CONTROL_TIMEOUT)
        self._session: str | None = None

    def model_info(self) -> ModelInfo:
        return self._call("model_info")

    def input_embeddings(self) -> Any:
        """[V, H] tensor."""
        return self._call("input_embeddings", timeout=self._request_timeout)

    def open_session(self, spec: SessionSpec) -> None:
        # The first session with the hidden encoding probes the head, which runs the model.
        self._session = self._call("open_session", spec, timeout=self._request_timeout)

    def output_embeddings(self) -> DraftHead:
        return self._call("output_embeddings", self._session, timeout=self._request_timeout)

    def generate(self, request_id: str, tokens: TokenBatch) -> "PendingSupervision":
        """Sends a request and returns at once."""
        assert self._session is not None, "open a session first"
        self.num_outstanding += 1
        return PendingSupervision(self, request_id, tokens, deadline=time.monotonic() + self._request_timeout)

    def disconnect(self) -> None:
        """Ends this trainer's session; the server lives on."""
        if self._session is not None:
            self._call("disconnect", self._session)
            self._session = None

    def send(self, request_id: str, tokens: TokenBatch, *, seconds_left: float) -> PendingCall:
        """One attempt of a request; the deadline travels with it as seconds remaining."""
        assert self._session is not None
        request = GenerateRequest(session=self._session, request_id=request_id, tokens=tokens, seconds_left=seconds_left)
        future = self._rref.rpc_async(timeout=seconds_left).generate(request)
        return PendingCall(future, peer=self.name, what=f"request {request_id}", timeout=seconds_left)

    def _call(self, method: str, *arguments: Any, timeout: float = _CONTROL_TIMEOUT) -> Any:
        future = getattr(self._rref.rpc_async(timeout=timeout), method)(*arguments)
        reply = PendingCall(future, peer=self.name, what=method, timeout=timeout).result()
        return unwrap(reply, sender=self.name)


class PendingSupervision:
    """A request under way at a replica. A busy target is asked again until the request's deadline."""

    def __init__(self, replica: Replica, request_id: str, tokens: TokenBatch, *, deadline: float) -> None:
        self._replica = replica
        self._request_id = request_id
        self._tokens = tokens
        self._deadline = deadline
        self._call = replica.send(request_id, tokens, seconds_left=deadline - time.monotonic())

    def result(self) -> EncodedSupervision:
        """Waits for the reply, until the deadline at most."""
        try:
            while True:
                try:
                    return unwrap(self._call.result(), sender=self._replica.name)
                except TargetBusy as busy:
                    self._send_again(busy)
        finally:
            self.abandon()

    def abandon(self) -> None:
        """The replica owes nothing more; a reply that still comes is dropped."""
        self._replica.num_outstanding -= 1

    def _send_again(self, busy: TargetBusy) -> None:
        seconds_left = self._deadline - time.monotonic() - _BUSY_RETRY_SECONDS
        if seconds_left <= 0:
            raise RequestExpired(f"request {self._request_id} found {self._replica.name} busy until its deadline: {busy}") from busy
        time.sleep(_BUSY_RETRY_SECONDS)
        self._call = self._replica.send(self._request_id, self._tokens, seconds_left=seconds_left)

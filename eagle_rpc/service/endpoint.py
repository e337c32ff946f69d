"""The target server as RPC calls it: the only module on the target's side that knows envelopes.

An RRef proxy imports this module at the caller, so it loads no model code.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor
from torch.distributed.rpc.functions import async_execution

from eagle_rpc.errors import EagleRpcError
from eagle_rpc.rpc.envelope import Ok, Reply, failure_of, reply_of
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import GenerateRequest, SessionSpec

# The methods that peers may call. A server is drained and closed only by the process that started it.
CONTROL_METHODS = frozenset(
    "cancel disconnect generate heartbeat input_embeddings model_info open_session output_embeddings "
    "probe_transfer set_vocab_mapping status".split()
)


class TargetEndpoint:
    """Calls a `TargetModelServer`; answers with a `Reply` or a torch future of one, and raises nothing."""

    def __init__(self, server: TargetModelServer) -> None:
        self._server = server

    def __getstate__(self) -> dict[str, Any]:
        """Empty: an endpoint never travels, but with CUDA torch pickles an RRef's value to find tensors."""
        return {}

    def model_info(self) -> Reply:
        return reply_of(self._server.model_info)

    def input_embeddings(self) -> Reply:
        return reply_of(self._server.input_embeddings)

    def output_embeddings(self, session: str) -> Reply:
        return reply_of(lambda: self._server.output_embeddings(session))

    def cancel(self, session: str, request_ids: list[str]) -> Reply:
        return reply_of(lambda: self._server.cancel(session, request_ids))

    def heartbeat(self, session: str) -> Reply:
        return reply_of(lambda: self._server.heartbeat(session))

    def status(self) -> Reply:
        return reply_of(self._server.status)

    def disconnect(self, session: str) -> Reply:
        return reply_of(lambda: self._server.disconnect(session))

    @async_execution
    def open_session(self, spec: SessionSpec) -> torch.futures.Future[Reply]:
        return self._reply_later(lambda: self._server.open_session(spec))

    @async_execution
    def set_vocab_mapping(self, selected_token_ids: Tensor) -> torch.futures.Future[Reply]:
        return self._reply_later(lambda: self._server.set_vocab_mapping(selected_token_ids))

    @async_execution
    def generate(self, request: GenerateRequest) -> torch.futures.Future[Reply]:
        return self._reply_later(lambda: self._server.generate(request))

    @async_execution
    def probe_transfer(self) -> torch.futures.Future[Reply]:
        reply = self._future()
        reply.set_result(reply_of(self._server.probe_transfer))
        return reply

    def _reply_later(self, start: Callable[[], Future[Any]]) -> torch.futures.Future[Reply]:
        """Starts a call; returns the future of its reply, also where `start` raises."""
        reply, started = self._future(), reply_of(start)
        if isinstance(started, Ok):
            started.value.add_done_callback(lambda done: reply.set_result(_reply_of_done(done)))
        else:
            reply.set_result(started)
        return reply

    def _future(self) -> torch.futures.Future[Reply]:
        """A future that may hold tensors of the target's device."""
        device = self._server.device
        return torch.futures.Future(devices=[device] if device.type == "cuda" else None)


def _reply_of_done(done: Future[Any]) -> Reply:
    # `result` would raise, and a traceback keeps the request's tensors until the garbage collector runs.
    error = done.exception()
    if error is None:
        return Ok(done.result())
    assert isinstance(error, EagleRpcError), "the server completes futures with its own errors"
    return failure_of(error)

"""The target server as RPC calls it: the only module on the target's side that knows envelopes.

An RRef proxy imports this module at the caller, so it loads no model code.
"""

from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import torch
from torch.distributed.rpc.functions import async_execution

from eagle_rpc.errors import EagleRpcError
from eagle_rpc.rpc.envelope import Ok, Reply, failure_of, reply_of
from eagle_rpc.service.server import TargetModelServer

# The methods that peers may call. A server is drained and closed only by the process that started it.
CONTROL_METHODS = frozenset(
    "answer cancel disconnect generate heartbeat input_embeddings model_info open_session output_embeddings "
    "probe_transfer set_vocab_mapping status".split()
)


def _at_once(method: Callable[..., Any]) -> Callable[..., Reply]:
    """The endpoint's form of a method of the server that returns its value."""

    def call(self: "TargetEndpoint", *arguments: Any) -> Reply:
        return reply_of(lambda: method(self.server, *arguments))

    return call


def _later(method: Callable[..., Future[Any]]) -> Callable[..., torch.futures.Future[Reply]]:
    """The endpoint's form of a method of the server that returns a future, or raises."""

    def call(self: "TargetEndpoint", *arguments: Any) -> torch.futures.Future[Reply]:
        reply, started = _future(self.server), reply_of(lambda: method(self.server, *arguments))
        if isinstance(started, Ok):
            started.value.add_done_callback(lambda done: _complete(reply, done, self.server.device))
        else:
            reply.set_result(started)
        return reply

    return async_execution(call)


class TargetEndpoint:
    """Calls a `TargetModelServer`; answers with a `Reply` or a torch future of one, and raises nothing."""

    def __init__(self, server: TargetModelServer) -> None:
        self.server = server

    def __getstate__(self) -> dict[str, Any]:
        """Empty: an endpoint never travels, but with CUDA torch pickles an RRef's value to find tensors."""
        return {}

    model_info = _at_once(TargetModelServer.model_info)
    input_embeddings = _at_once(TargetModelServer.input_embeddings)
    output_embeddings = _at_once(TargetModelServer.output_embeddings)
    cancel = _at_once(TargetModelServer.cancel)
    heartbeat = _at_once(TargetModelServer.heartbeat)
    status = _at_once(TargetModelServer.status)
    disconnect = _at_once(TargetModelServer.disconnect)
    open_session = _later(TargetModelServer.open_session)
    set_vocab_mapping = _later(TargetModelServer.set_vocab_mapping)
    generate = _later(TargetModelServer.generate)
    answer = _later(TargetModelServer.answer)

    @async_execution
    def probe_transfer(self) -> torch.futures.Future[Reply]:
        reply = _future(self.server)
        reply.set_result(reply_of(self.server.probe_transfer))
        return reply


def _future(server: TargetModelServer) -> torch.futures.Future[Reply]:
    """A future that may hold tensors of the target's device."""
    device = server.device
    return torch.futures.Future(devices=[device] if device.type == "cuda" else None)


def _complete(reply: torch.futures.Future[Reply], done: Future[Any], device: torch.device) -> None:
    """Hands over the answer, on the forward thread or, if it is there already, on the caller's RPC thread."""
    if device.type == "cuda":
        # torch sends tensors in the order of this thread's stream; they were made on the default stream.
        torch.cuda.current_stream(device).wait_stream(torch.cuda.default_stream(device))
    reply.set_result(_reply_of_done(done))


def _reply_of_done(done: Future[Any]) -> Reply:
    # `result` would raise, and a traceback keeps the request's tensors until the garbage collector runs.
    error = done.exception()
    if error is None:
        return Ok(done.result())
    assert isinstance(error, EagleRpcError), "the server completes futures with its own errors"
    return failure_of(error)

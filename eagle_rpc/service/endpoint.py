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
from eagle_rpc.service.stage_server import StageServer


def _offered(method: Callable[..., Any]) -> Callable[..., torch.futures.Future[Reply]]:
    """The endpoint's form of a method of the server, which returns its value or a future of it, or raises."""

    def call(self: "TargetEndpoint | StageEndpoint", *arguments: Any) -> torch.futures.Future[Reply]:
        device = self.server.device
        # On a GPU the future must name it, since the reply may hold its tensors.
        reply = torch.futures.Future[Reply](devices=[device] if device.type == "cuda" else None)
        started = reply_of(lambda: method(self.server, *arguments))
        if isinstance(started, Ok) and isinstance(started.value, Future):
            started.value.add_done_callback(lambda done: _complete(reply, done, device))
        else:
            reply.set_result(started)
        return reply

    return async_execution(call)


class TargetEndpoint:
    """Calls a `TargetModelServer`; answers with a torch future of a `Reply`, and raises nothing."""

    def __init__(self, server: TargetModelServer) -> None:
        self.server = server

    def __getstate__(self) -> dict[str, Any]:
        """Empty: an endpoint never travels, but with CUDA torch pickles an RRef's value to find tensors."""
        return {}

    answer = _offered(TargetModelServer.answer)
    cancel = _offered(TargetModelServer.cancel)
    disconnect = _offered(TargetModelServer.disconnect)
    generate = _offered(TargetModelServer.generate)
    heartbeat = _offered(TargetModelServer.heartbeat)
    input_embeddings = _offered(TargetModelServer.input_embeddings)
    model_info = _offered(TargetModelServer.model_info)
    open_session = _offered(TargetModelServer.open_session)
    output_embeddings = _offered(TargetModelServer.output_embeddings)
    probe_transfer = _offered(TargetModelServer.probe_transfer)
    set_vocab_mapping = _offered(TargetModelServer.set_vocab_mapping)
    status = _offered(TargetModelServer.status)


class StageEndpoint:
    """Calls a `StageServer` of a stage behind the first one, in the same way."""

    def __init__(self, server: StageServer) -> None:
        self.server = server

    def __getstate__(self) -> dict[str, Any]:
        """Empty, as that of `TargetEndpoint`."""
        return {}

    beat = _offered(StageServer.beat)
    begin = _offered(StageServer.begin)
    draft_head = _offered(StageServer.draft_head)
    join_chain = _offered(StageServer.join_chain)
    probe_head = _offered(StageServer.probe_head)
    stage_info = _offered(StageServer.stage_info)
    take = _offered(StageServer.take)


CONTROL_METHODS = frozenset(name for name in vars(TargetEndpoint) if not name.startswith("_"))
"""The methods that peers may call. A server is drained and closed only by the process that started it."""
STAGE_METHODS = frozenset(name for name in vars(StageEndpoint) if not name.startswith("_"))
"""The methods that the other stages of a target may call."""


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

"""The rate of a server by itself: its queue is never empty, and its replies are dropped."""

import time
import uuid
from collections import deque
from concurrent.futures import Future
from typing import Any

import torch
from measuring import synchronise

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import EncodedSupervision, GenerateRequest, SessionSpec, TokenBatch, VocabMapping

_WARM_UP = 3  # requests
_MOST_BYTES = 2**35


def served_rate(
    target: Any,
    tokens: TokenBatch,
    mapping: VocabMapping,
    *,
    encoding: str,
    chunk_rows: int,
    requests: int,
    device: torch.device,
) -> float:
    """Tokens per second of a `TargetModelServer` in this process that gets requests for `tokens` only."""
    num_tokens = tokens.input_ids.numel()
    config = TargetConfig(
        model="random",
        chunk_rows=chunk_rows,
        max_batch_tokens=num_tokens,
        max_reply_bytes=_MOST_BYTES,
        max_reply_bytes_per_session=_MOST_BYTES,
    )
    server = TargetModelServer(target, config)
    spec = SessionSpec(selected_token_ids=mapping.selected_token_ids, encoding=encoding, rows="loss_mask")
    session = server.open_session(spec).result().id
    incarnation = server.model_info().incarnation
    on_host = tokens.to(torch.device("cpu"))

    def send() -> Future[EncodedSupervision]:
        request = GenerateRequest(
            session=session,
            incarnation=incarnation,
            request_id=uuid.uuid4().hex,
            tokens=on_host,
            seconds_left=600.0,
        )
        return server.generate(request)

    # One a device, one behind them, and one that waits.
    under_way, started = deque(send() for _ in range(len(target.devices) + 2)), 0.0
    for number in range(_WARM_UP + requests):
        under_way.popleft().result()
        # A reply counts when its bytes are there.
        synchronise_reply(device)
        if number == _WARM_UP - 1:
            started = time.perf_counter()
        under_way.append(send())
    seconds = time.perf_counter() - started
    server.close()
    synchronise(device)
    return requests * num_tokens / seconds


def synchronise_reply(device: torch.device) -> None:
    """Waits for the current stream, which carries replies; passes have a stream of their own."""
    if device.type == "cuda":
        torch.cuda.current_stream(device).synchronize()

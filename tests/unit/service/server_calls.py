"""What the tests of the server ask it."""

import torch

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import EagleRpcError
from eagle_rpc.supervision import GenerateRequest, SessionSpec, TokenBatch

WAIT = 20.0
SELECTED = torch.tensor([40, 3, 4, 5, 60, 61, 77, 96])


class Clock:
    """Seconds that pass when told."""

    def __init__(self):
        self.now = 1000.0

    def __call__(self):
        return self.now


def config(**changes):
    return TargetConfig(**{"model": "tiny", "max_batch_tokens": 100, "chunk_rows": 5, **changes})


def tokens_of(batch=2, length=9, seed=0, packed=False):
    generator = torch.Generator().manual_seed(seed)
    mask = torch.arange(length)[None] < torch.randint(4, length + 1, (batch, 1), generator=generator)
    return TokenBatch(
        input_ids=torch.randint(3, 97, (batch, length), generator=generator),
        attention_mask=mask.long(),
        loss_mask=mask.long(),
        segment_ids=(torch.arange(length)[None] >= 3).long().repeat(batch, 1) if packed else None,
    )


def try_to_open(server, **fields):
    """The answer to `open_session`; raises its error."""
    return server.open_session(SessionSpec(**{"selected_token_ids": SELECTED, **fields})).result(WAIT)


def open_session(server, **fields):
    """The id of a new session."""
    return try_to_open(server, **fields).id


def error_of(call, *args, **fields):
    """The error of this package that a call raises, at once or from its future."""
    try:
        answer = call(*args, **fields)
    except EagleRpcError as error:
        return error
    return answer.exception(WAIT)


_next_id = iter(range(10**9))


def request(server, session, tokens=None, seconds_left=WAIT, request_id=None):
    return GenerateRequest(
        session=session,
        incarnation=server.model_info().incarnation,
        request_id=f"r{next(_next_id)}" if request_id is None else request_id,
        tokens=tokens or tokens_of(),
        seconds_left=seconds_left,
    )


def send(server, session, *args, **fields):
    """The future of the supervision of one request."""
    return server.generate(request(server, session, *args, **fields))


def ask(server, session, *args, **fields):
    """The supervision of one request; raises its error."""
    return send(server, session, *args, **fields).result(WAIT)

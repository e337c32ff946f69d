"""What the tests of the server ask it."""

import torch

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import GenerateRequest, SessionSpec, TokenBatch, unwrap

WAIT = 20.0
SELECTED = torch.tensor([40, 3, 4, 5, 60, 61, 77, 96])


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


def open_session(server, **fields):
    return unwrap(server.open_session(SessionSpec(**{"selected_token_ids": SELECTED, **fields})), sender="target0")


def ask(server, session, tokens=None, seconds_left=WAIT):
    request = GenerateRequest(session=session, request_id="r", tokens=tokens or tokens_of(), seconds_left=seconds_left)
    return server.generate(request).wait()

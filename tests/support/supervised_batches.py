"""The supervision of a batch, by a server and by a co-located target, and its comparison bit for bit."""

import torch

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.service.server import TargetModelServer
from eagle_rpc.supervision import (
    Eagle3TargetBackend,
    Eagle3TargetBatch,
    GenerateRequest,
    PlainTarget,
    SessionSettings,
    SessionSpec,
    TokenBatch,
    VocabMapping,
    decode_supervision,
)
from eagle_rpc.target.colocated import ColocatedEagle3TargetModel

SECONDS = 60.0


def request_for(
    server: TargetModelServer, session: str, tokens: TokenBatch, number: int = 0
) -> GenerateRequest:
    return GenerateRequest(
        session=session,
        incarnation=server.model_info().incarnation,
        request_id=f"r{number}",
        tokens=tokens,
        seconds_left=SECONDS,
    )


def served(
    target: PlainTarget, config: TargetConfig, mapping: VocabMapping, encoding: str, tokens: TokenBatch
) -> Eagle3TargetBatch:
    """By a server of its own, whose forward passes run in another thread."""
    server = TargetModelServer(target, config)
    spec = SessionSpec(selected_token_ids=mapping.selected_token_ids, encoding=encoding, rows="loss_mask")
    session = server.open_session(spec).result().id
    encoded = server.generate(request_for(server, session, tokens)).result()
    head = server.output_embeddings(session).to(server.device)
    server.close()
    return decode_supervision(encoded, tokens, head)


def colocated(
    target: PlainTarget, config: TargetConfig, mapping: VocabMapping, encoding: str, rows: str = "loss_mask"
) -> ColocatedEagle3TargetModel:
    """In this thread, with an open session."""
    backend = ColocatedEagle3TargetModel(target, config, SessionSettings(encoding=encoding, rows=rows))
    backend.open_session(mapping)
    return backend


def supervision_of(backend: Eagle3TargetBackend, tokens: TokenBatch) -> Eagle3TargetBatch:
    masks = tokens.attention_mask, tokens.loss_mask, tokens.segment_ids
    return backend.generate_batch(tokens.input_ids, *masks)


def assert_same_supervision(left: Eagle3TargetBatch, right: Eagle3TargetBatch) -> None:
    names = "aux_hidden_states supervised_rows log_normalizer argmax position_mask target_probs"
    for name in names.split():
        assert torch.equal(getattr(left, name), getattr(right, name)), name

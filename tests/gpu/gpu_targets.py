"""Random targets for a GPU, and batches for them.

Legend: B batch, T sequence.
"""

import torch

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.service.forward_pass import PassRequest
from eagle_rpc.service.sessions import Session
from eagle_rpc.supervision import DraftVocabOnDevice, SessionSpec, TokenBatch, VocabMapping

VOCAB = 5000
RANDOM = {
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 8,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
    "initializer_range": 0.05,
}
MAPPING = VocabMapping.from_token_ids(torch.arange(0, VOCAB, 4), VOCAB)
FORMS = {
    "eager": {"fused_rows": False, "fused_mlp": False},
    "fused": {},
    "compiled": {"compile_shapes": ["4x256", "4x512"], "compile_packed": True},
}


def config_of(form, **changes):
    return TargetConfig(
        **{
            "model": "",
            "random": RANDOM,
            "dtype": DType.bfloat16,
            "chunk_rows": 300,
            **FORMS[form],
            **changes,
        }
    )


def batch_of(batch, length, packed=False, device="cpu"):
    generator = torch.Generator().manual_seed(length)
    mask = torch.arange(length)[None] < torch.randint(
        length // 2, length + 1, (batch, 1), generator=generator
    )
    return TokenBatch(
        input_ids=torch.randint(VOCAB, (batch, length), generator=generator),
        attention_mask=mask.long(),
        loss_mask=(mask & (torch.rand(batch, length, generator=generator) < 0.8)).long(),
        segment_ids=(torch.arange(length)[None] >= length // 3).long().repeat(batch, 1) if packed else None,
    ).to(torch.device(device))


def pass_request(tokens, device, encoding="hidden"):
    """Of a session with `MAPPING`; replies stay on the device."""
    vocab = DraftVocabOnDevice.of(MAPPING, torch.device(device))
    spec = SessionSpec(
        selected_token_ids=vocab.selected_token_ids, encoding=encoding, rows="loss_mask", through_host=False
    )
    session = Session(id="a", spec=spec, mapping_digest=MAPPING.digest, vocab=vocab)
    return PassRequest(session=session, tokens=tokens)

"""A tiny random target, and batches for it."""

import torch

from eagle_rpc.config.choices import DType
from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import Eagle3TargetBatch, TokenBatch, VocabMapping

VOCAB_SIZE = 96
DRAFT_VOCAB_SIZE = 40

TINY_LLAMA = {
    "model_type": "llama",
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCAB_SIZE,
    "max_position_embeddings": 64,
}


def tiny_target_config(**changes: object) -> TargetConfig:
    return TargetConfig(
        **{
            "model": "tiny",
            "random": TINY_LLAMA,
            "dtype": DType.float32,
            "device": "cpu",
            "aux_layer_ids": [0, 2, 4],
            **changes,
        }
    )


def tiny_mapping() -> VocabMapping:
    ids = torch.randperm(VOCAB_SIZE, generator=torch.Generator().manual_seed(5))[:DRAFT_VOCAB_SIZE]
    return VocabMapping.from_token_ids(ids, VOCAB_SIZE)


def tiny_batch(seed: int, *, batch: int = 3, length: int = 12) -> TokenBatch:
    """Random ids, lengths and loss masks; padded on the right."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, VOCAB_SIZE, (batch, length), generator=draw)
    lengths = torch.randint(4, length + 1, (batch, 1), generator=draw)
    real = torch.arange(length)[None] < lengths
    supervised = real & (torch.rand(batch, length, generator=draw) < 0.7)
    return TokenBatch(input_ids=ids * real, attention_mask=real.long(), loss_mask=supervised.long())


def tensors_of(batch: Eagle3TargetBatch) -> dict[str, torch.Tensor]:
    """Everything that training reads."""
    return {
        "aux_hidden_states": batch.aux_hidden_states,
        "supervised_rows": batch.supervised_rows,
        "target_probs": batch.target_probs,
        "position_mask": batch.position_mask,
        "log_normalizer": batch.log_normalizer,
        "argmax": batch.argmax,
        "input_ids": batch.input_ids,
        "loss_mask": batch.loss_mask,
    }

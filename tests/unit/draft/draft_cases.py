"""Small drafts and batches that the tests of this room share."""

import torch
from torch import Tensor

from eagle_rpc.draft import Eagle3Draft, Eagle3DraftConfig
from eagle_rpc.supervision import Eagle3TargetBatch, StoredProbs, TokenBatch, shifted_loss_mask

VOCAB = 23
DRAFT_VOCAB = 11
HIDDEN = 12


def tiny_config(**changes) -> Eagle3DraftConfig:
    fields = {
        "hidden_size": HIDDEN,
        "intermediate_size": 20,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 6,
        "vocab_size": VOCAB,
        "draft_vocab_size": DRAFT_VOCAB,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100.0,
        "rope_scaling": None,
        "max_position_embeddings": 64,
    }
    return Eagle3DraftConfig(**(fields | changes))


def tiny_draft(dtype: torch.dtype = torch.float64, **changes) -> Eagle3Draft:
    """Weights large enough that every term matters, norms away from one."""
    embedding = torch.randn(VOCAB, HIDDEN, generator=torch.Generator().manual_seed(1))
    draft = Eagle3Draft(tiny_config(**changes), embedding)
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in draft.parameters():
            if parameter.requires_grad:
                offset = 1.0 if parameter.dim() == 1 else 0.0
                parameter.copy_(offset + 0.4 * torch.randn(parameter.shape, generator=generator))
    return draft.to(dtype)


def random_chat(length: int, supervised: list[int], seed: int) -> dict[str, Tensor]:
    """One chat: ids and aux of its tokens, and supervision of the rows in `supervised`."""
    generator = torch.Generator().manual_seed(seed)
    loss_mask = torch.zeros(length, dtype=torch.int64)
    loss_mask[[row + 1 for row in supervised]] = 1
    return {
        "ids": torch.randint(0, VOCAB, (length,), generator=generator),
        "aux": torch.randn(length, 3 * HIDDEN, generator=generator, dtype=torch.float64),
        "loss_mask": loss_mask,
        "rows": torch.tensor(supervised, dtype=torch.int64),
        "probs": (3 * torch.randn(len(supervised), DRAFT_VOCAB, generator=generator)).softmax(dim=-1),
    }


def batch_of(
    rows_of_chats: list[list[dict[str, Tensor]]], length: int, filler: int = 0, packed: bool = False
) -> Eagle3TargetBatch:
    """One row of the batch for every list of chats, packed one after the other, then padded with `filler`."""
    size = len(rows_of_chats)
    ids = torch.full((size, length), filler)
    attention_mask, loss_mask, segment_ids = (torch.zeros(size, length, dtype=torch.int64) for _ in range(3))
    aux = torch.full((size, length, 3 * HIDDEN), float(filler), dtype=torch.float64)
    supervised_rows, probs = [], []
    for b, chats in enumerate(rows_of_chats):
        start = 0
        for segment, chat in enumerate(chats):
            end = start + len(chat["ids"])
            ids[b, start:end], aux[b, start:end], loss_mask[b, start:end] = (
                chat["ids"],
                chat["aux"],
                chat["loss_mask"],
            )
            attention_mask[b, start:end] = 1
            segment_ids[b, start:] = segment
            supervised_rows.append(chat["rows"] + b * length + start)
            probs.append(chat["probs"])
            start = end
        segment_ids[b, start:] = len(chats)
    tokens = TokenBatch(
        input_ids=ids,
        attention_mask=attention_mask,
        loss_mask=loss_mask,
        segment_ids=segment_ids if packed else None,
    )
    return supervised_batch(tokens, aux, torch.cat(supervised_rows), torch.cat(probs))


def supervised_batch(tokens: TokenBatch, aux: Tensor, rows: Tensor, probs_NK: Tensor) -> Eagle3TargetBatch:
    assert bool(shifted_loss_mask(tokens).flatten()[rows].all()), (
        "a supervised row lies outside the loss mask"
    )
    return Eagle3TargetBatch(
        tokens=tokens,
        aux_hidden_states=aux,
        supervised_rows=rows,
        targets=StoredProbs(probs_NK),
        log_normalizer=torch.full((len(rows),), float("nan")),
        argmax=probs_NK.argmax(dim=-1),
    )


def gradients(draft: Eagle3Draft) -> dict[str, Tensor]:
    return {name: parameter.grad for name, parameter in draft.named_parameters() if parameter.requires_grad}

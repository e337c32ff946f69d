"""How supervision travels: encoders of the target side beside decoders of the trainer's.

Legend: B batch, T sequence, R real tokens, N supervised rows, H target hidden, V target vocab, K draft vocab.
"""

from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision.batch import Eagle3TargetBatch, ProjectedTargets, StoredLogits, StoredProbs
from eagle_rpc.supervision.head import DraftHead
from eagle_rpc.supervision.tokens import TokenBatch, shifted_loss_mask
from eagle_rpc.supervision.vocab import VocabMapping

ENCODINGS = ("probs", "logits", "hidden")
ROW_RULES = ("position_mask", "loss_mask")


@dataclass(kw_only=True, slots=True)
class EncodedSupervision:
    """One reply. Padding, and rows that no loss reads, are not in it."""

    encoding: str
    aux: Tensor  # [R, 3H] target dtype, real tokens in order
    supervised_rows: Tensor  # [N] int32, flat b * T + t, ascending
    values: Tensor  # probs: [N, K] fp32; logits: [N, K] target dtype; hidden: [N, H] target dtype
    log_normalizer: Tensor  # [N] fp32
    argmax: Tensor  # [N] int32, draft id or -1

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors on the wire."""
        tensors = (self.aux, self.supervised_rows, self.values, self.log_normalizer, self.argmax)
        return sum(tensor.numel() * tensor.element_size() for tensor in tensors)

    def to(self, device: torch.device) -> "EncodedSupervision":
        moved = {field.name: value.to(device) for field in fields(self) if isinstance(value := getattr(self, field.name), Tensor)}
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class DraftVocabOnDevice:
    """A mapping's two lookup tables where the target runs."""

    selected_token_ids: Tensor  # [K] int64
    draft_ids: Tensor  # [V] int64, -1 outside

    @classmethod
    def of(cls, mapping: VocabMapping, device: torch.device) -> "DraftVocabOnDevice":
        return cls(mapping.selected_token_ids.to(device), mapping.draft_ids.to(device))


def encode_supervision(
    output: Any, tokens: TokenBatch, vocab: DraftVocabOnDevice, *, encoding: str, rows: str, chunk_rows: int
) -> EncodedSupervision:
    """Turns a target's output into the reply for one batch.

    `output` is what `Eagle3Target.generate_batch` returned. The head runs on rows that the loss mask selects, at most
    `chunk_rows` at a time, so no more than [chunk_rows, V] logits exist. Raises `InvalidRequest` if `encoding` needs
    last hidden states that the target does not give.
    """
    last_hidden_BTH = getattr(output, "last_hidden_state", None)
    if encoding == "hidden" and last_hidden_BTH is None:
        raise InvalidRequest("encoding hidden needs a target that returns last_hidden_state; use encoding logits")
    candidates = shifted_loss_mask(tokens).flatten().nonzero().squeeze(1)
    pieces = [
        _encode_rows(flat_rows, logits_NV, last_hidden_BTH, vocab, encoding=encoding, rows=rows)
        for flat_rows, logits_NV in _row_logits(output, candidates, chunk_rows)
    ]
    columns = [torch.cat(column) for column in zip(*pieces, strict=True)]
    real = tokens.attention_mask.bool()
    supervised_rows, values, log_normalizer, argmax = columns
    return EncodedSupervision(
        encoding=encoding,
        aux=output.aux_hidden_states[real],
        supervised_rows=supervised_rows.int(),
        values=values,
        log_normalizer=log_normalizer,
        argmax=argmax.int(),
    )


def _row_logits(output: Any, rows: Tensor, chunk_rows: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Full-vocab logits [n, V] of the flat shifted `rows`, in chunks; one empty chunk when there are no rows."""
    for chunk in rows.split(chunk_rows):
        if getattr(output, "logits", None) is not None:
            yield chunk, output.logits.flatten(0, 1)[chunk]
        else:
            yield chunk, output.project(output.last_hidden_state.flatten(0, 1)[chunk + 1])


def _encode_rows(
    flat_rows: Tensor, logits_NV: Tensor, last_hidden_BTH: Tensor | None, vocab: DraftVocabOnDevice, *, encoding: str, rows: str
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    # Exact for every format, and the argmax of bf16 is several times slower on a CPU.
    wide_NV = logits_NV.float()
    argmax_N = vocab.draft_ids[wide_NV.argmax(dim=-1)]
    log_normalizer_N = wide_NV.logsumexp(dim=-1)
    keep = slice(None) if rows == "loss_mask" else argmax_N >= 0
    kept_rows = flat_rows[keep]
    if encoding == "hidden":
        assert last_hidden_BTH is not None
        values = last_hidden_BTH.flatten(0, 1)[kept_rows + 1]
    else:
        # Columns first: whole rows of the vocabulary would be copied otherwise.
        values = logits_NV.index_select(1, vocab.selected_token_ids)[keep]
        if encoding == "probs":
            values = values.float().softmax(dim=-1)
    return kept_rows, values, log_normalizer_N[keep], argmax_N[keep]


def decode_supervision(encoded: EncodedSupervision, tokens: TokenBatch, head: DraftHead | None) -> Eagle3TargetBatch:
    """The batch that `encoded` stands for; `tokens` are the ones that were sent, on the device of `encoded`.

    `head` holds the target's draft rows and is needed for `hidden` only.
    """
    batch, length = tokens.shape
    aux = encoded.aux.new_zeros(batch, length, encoded.aux.shape[-1])
    aux[tokens.attention_mask.bool()] = encoded.aux
    if encoded.encoding == "hidden":
        assert head is not None, "the hidden encoding needs the draft rows of the target's head"
        targets = ProjectedTargets(encoded.values, head)
    else:
        targets = StoredProbs(encoded.values) if encoded.encoding == "probs" else StoredLogits(encoded.values)
    return Eagle3TargetBatch(
        tokens=tokens,
        aux_hidden_states=aux,
        supervised_rows=encoded.supervised_rows.long(),
        targets=targets,
        log_normalizer=encoded.log_normalizer,
        argmax=encoded.argmax.long(),
    )


def bytes_per_token(
    encoding: str, *, hidden_size: int, draft_vocab_size: int, dtype_bytes: int, supervised_share: float = 1.0
) -> float:
    """Wire bytes of one real token whose row is supervised with probability `supervised_share`."""
    row = {"probs": 4 * draft_vocab_size, "logits": dtype_bytes * draft_vocab_size, "hidden": dtype_bytes * hidden_size}[encoding]
    # Row index, log-normaliser and argmax take four bytes each.
    return 3 * hidden_size * dtype_bytes + supervised_share * (row + 12)

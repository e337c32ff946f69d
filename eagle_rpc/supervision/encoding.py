"""How supervision travels: encoders of the target side beside decoders of the trainer's.

Legend: B batch, T sequence, R real tokens, N supervised rows, H target hidden, V target vocab, K draft vocab.
"""

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision.batch import Eagle3TargetBatch, ProjectedTargets, StoredLogits, StoredProbs
from eagle_rpc.supervision.head import DraftHead
from eagle_rpc.supervision.rows import RowsRead, read_rows
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
    read = _read_candidates(output, candidates, vocab, encoding=encoding, chunk_rows=chunk_rows)
    argmax_N = vocab.draft_ids[read.argmax]
    keep = None if rows == "loss_mask" else (argmax_N >= 0).nonzero().squeeze(1)
    supervised_rows = _kept(candidates, keep)
    if encoding == "hidden":
        assert last_hidden_BTH is not None
        values = last_hidden_BTH.flatten(0, 1)[supervised_rows + 1]
    else:
        assert read.selected is not None
        values = _kept(read.selected, keep)
    return EncodedSupervision(
        encoding=encoding,
        aux=output.aux_hidden_states[tokens.attention_mask.bool()],
        supervised_rows=supervised_rows.int(),
        values=values,
        log_normalizer=_kept(read.log_normalizer, keep),
        argmax=_kept(argmax_N, keep).int(),
    )


def _kept(column: Tensor, keep: Tensor | None) -> Tensor:
    """The rows `keep` of a column, which is not copied if those are all."""
    return column if keep is None or len(keep) == len(column) else column[keep]


def _read_candidates(output: Any, candidates: Tensor, vocab: DraftVocabOnDevice, *, encoding: str, chunk_rows: int) -> RowsRead:
    """What the flat shifted rows `candidates` hold; `selected` are what `encoding` sends of them, probabilities for `probs`.

    Results are written where they stay, chunk by chunk, so that one chunk's logits are all that exists beside them.
    """
    columns_K = None if encoding == "hidden" else vocab.selected_token_ids
    log_normalizer_N = torch.empty(len(candidates), dtype=torch.float32, device=candidates.device)
    argmax_N = torch.empty_like(candidates)
    selected_NK: Tensor | None = None
    start = 0
    # Without candidates there is one empty chunk, whose dtype counts.
    for chunk in candidates.split(chunk_rows):
        read = _read_chunk(output, chunk, columns_K)
        place = slice(start, start := start + len(chunk))
        log_normalizer_N[place], argmax_N[place] = read.log_normalizer, read.argmax
        if read.selected is not None:
            values_NK = read.selected.float().softmax(dim=-1) if encoding == "probs" else read.selected
            if selected_NK is None:
                selected_NK = values_NK.new_empty(len(candidates), values_NK.shape[1])
            selected_NK[place] = values_NK
    return RowsRead(log_normalizer_N, argmax_N, selected_NK)


def _read_chunk(output: Any, rows: Tensor, columns_K: Tensor | None) -> RowsRead:
    """Their full-vocab logits exist in here only."""
    if getattr(output, "logits", None) is not None:
        return read_rows(output.logits.flatten(0, 1)[rows], columns_K)
    logits_NV = output.project(output.last_hidden_state.flatten(0, 1)[rows + 1])
    return getattr(output, "read_rows", read_rows)(logits_NV, columns_K)


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

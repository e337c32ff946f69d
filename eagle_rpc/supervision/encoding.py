"""How supervision travels: encoders of the target side beside decoders of the trainer's.

Legend: B batch, T sequence, R real tokens, N supervised rows, H target hidden, V target vocab, K draft vocab.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision.batch import Eagle3TargetBatch, ProjectedTargets, StoredLogits, StoredProbs
from eagle_rpc.supervision.draft_head import DraftHead
from eagle_rpc.supervision.rows import RowsRead, read_rows
from eagle_rpc.supervision.storage import to_device
from eagle_rpc.supervision.tokens import BatchRows, TokenBatch, true_places
from eagle_rpc.supervision.vocab import VocabMapping

ENCODINGS = ("probs", "logits", "hidden")
ROW_RULES = ("position_mask", "loss_mask")
# Rows that a CPU reads at a time, so that what it makes of them stays in its caches.
_CPU_ROWS = 32


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

    def map_tensors(self, move: Callable[[Tensor], Tensor]) -> "EncodedSupervision":
        """The same reply with what `move` makes of its tensors."""
        moved = {
            field.name: move(value)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


@dataclass(frozen=True, slots=True)
class DraftVocabOnDevice:
    """A mapping's two lookup tables where the target runs."""

    selected_token_ids: Tensor  # [K] int64
    draft_ids: Tensor  # [V] int64, -1 outside

    @classmethod
    def of(cls, mapping: VocabMapping, device: torch.device) -> "DraftVocabOnDevice":
        return cls(mapping.selected_token_ids.to(device), mapping.draft_ids.to(device))


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSupervision:
    """A target's output with what its head says of the rows that may be supervised, which takes nearly all of the time."""

    encoding: str
    rows: BatchRows
    aux_hidden_states: Tensor  # [B, T, 3H]
    last_hidden_state: Tensor | None  # [B, T, H]; with `hidden`
    log_normalizer: Tensor  # [N] fp32
    argmax: Tensor  # [N] int64, draft id or -1
    selected: Tensor | None  # [N, K], without `hidden`: logits, or probabilities

    def encode(self, rule: str) -> EncodedSupervision:
        """The reply with the rows that `rule` (of `ROW_RULES`) keeps; on a GPU their number has to be waited for."""
        keep = None if rule == "loss_mask" else (self.argmax >= 0).nonzero().squeeze(1)
        supervised_rows = _kept(self.rows.supervisable, keep)
        if self.last_hidden_state is not None:
            values = self.last_hidden_state.flatten(0, 1).index_select(0, supervised_rows + 1)
        else:
            assert self.selected is not None
            values = _kept(self.selected, keep)
        return EncodedSupervision(
            encoding=self.encoding,
            aux=self.aux_hidden_states.flatten(0, 1).index_select(0, self.rows.real),
            supervised_rows=supervised_rows.int(),
            values=values,
            log_normalizer=_kept(self.log_normalizer, keep),
            argmax=_kept(self.argmax, keep).int(),
        )


def encode_supervision(
    output: Any, tokens: TokenBatch, vocab: DraftVocabOnDevice, *, encoding: str, rows: str, chunk_rows: int
) -> EncodedSupervision:
    """Turns a target's output for `tokens`, of any device, into the reply: `read_supervision`, then `encode` with the rule `rows`."""
    where = BatchRows.of(tokens).to(output.aux_hidden_states.device)
    return read_supervision(output, where, vocab, encoding=encoding, chunk_rows=chunk_rows).encode(rows)


def read_supervision(
    output: Any, rows: BatchRows, vocab: DraftVocabOnDevice, *, encoding: str, chunk_rows: int
) -> ReadSupervision:
    """Runs the head on the rows that may be supervised and reads its logits, without waiting for a GPU.

    `output` is what `Eagle3Target.generate_batch` returned. The head runs on at most `chunk_rows` at a time, so no more than
    [chunk_rows, V] logits exist. Raises `InvalidRequest` if `encoding` needs last hidden states that the target does not give.
    """
    last_hidden_BTH = getattr(output, "last_hidden_state", None)
    if encoding == "hidden" and last_hidden_BTH is None:
        raise InvalidRequest(
            "encoding hidden needs a target that returns last_hidden_state; use encoding logits"
        )
    reader = _RowReader(
        output, rows.supervisable, None if encoding == "hidden" else vocab.selected_token_ids, encoding
    )
    # Without rows there is one empty chunk, whose dtype counts.
    for chunk in rows.supervisable.split(chunk_rows):
        reader.read(chunk)
    return ReadSupervision(
        encoding=encoding,
        rows=rows,
        aux_hidden_states=output.aux_hidden_states,
        last_hidden_state=last_hidden_BTH if encoding == "hidden" else None,
        log_normalizer=reader.log_normalizer,
        argmax=vocab.draft_ids[reader.argmax],
        selected=reader.selected,
    )


def _kept(column: Tensor, keep: Tensor | None) -> Tensor:
    """The rows `keep` of a column, which is not copied if those are all."""
    return column if keep is None or len(keep) == len(column) else column.index_select(0, keep)


class _RowReader:
    """Reads rows chunk by chunk and writes what they hold where it stays, so that no more than a chunk's logits exist beside it."""

    def __init__(self, output: Any, rows: Tensor, columns_K: Tensor | None, encoding: str) -> None:
        self._output, self._columns_K, self._encoding = output, columns_K, encoding
        self._num_rows, self._num_read = len(rows), 0
        self.log_normalizer = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        self.argmax = torch.empty_like(rows)  # of the full vocabulary
        self.selected: Tensor | None = None

    def read(self, chunk: Tensor) -> None:
        """The next rows; their logits are gone when it returns."""
        logits_NV = self._logits(chunk)
        for part_NV in (logits_NV,) if logits_NV.is_cuda else logits_NV.split(_CPU_ROWS):
            self._keep(getattr(self._output, "read_rows", read_rows)(part_NV, self._columns_K))

    def _logits(self, rows: Tensor) -> Tensor:
        if getattr(self._output, "logits", None) is not None:
            return self._output.logits.flatten(0, 1)[rows]
        return self._output.project(self._output.last_hidden_state.flatten(0, 1)[rows + 1])

    def _keep(self, read: RowsRead) -> None:
        place = slice(self._num_read, self._num_read + len(read.argmax))
        self._num_read = place.stop
        self.log_normalizer[place], self.argmax[place] = read.log_normalizer, read.argmax
        if read.selected is not None:
            values_NK = read.selected.float().softmax(dim=-1) if self._encoding == "probs" else read.selected
            if self.selected is None:
                self.selected = values_NK.new_empty(self._num_rows, values_NK.shape[1])
            self.selected[place] = values_NK


def decode_supervision(
    encoded: EncodedSupervision, tokens: TokenBatch, head: DraftHead | None
) -> Eagle3TargetBatch:
    """The batch that `encoded` stands for, on its device; `tokens` are the ones that were sent. From the CPU they make no GPU wait.

    `head` holds the target's draft rows and is needed for `hidden` only.
    """
    if encoded.encoding == "hidden":
        assert head is not None, "the hidden encoding needs the draft rows of the target's head"
        targets = ProjectedTargets(encoded.values, head)
    else:
        targets = StoredProbs(encoded.values) if encoded.encoding == "probs" else StoredLogits(encoded.values)
    return Eagle3TargetBatch(
        tokens=tokens.to(encoded.aux.device),
        aux_hidden_states=_dense_aux(encoded.aux, tokens),
        supervised_rows=encoded.supervised_rows.long(),
        targets=targets,
        log_normalizer=encoded.log_normalizer,
        argmax=encoded.argmax.long(),
    )


def _dense_aux(aux: Tensor, tokens: TokenBatch) -> Tensor:
    """[B, T, 3H], zero at padding."""
    batch, length = tokens.shape
    if len(aux) < batch * length:
        real = to_device(true_places(tokens.attention_mask.bool()), aux.device)
        aux = aux.new_zeros(batch * length, aux.shape[-1]).index_copy_(0, real, aux)
    return aux.view(batch, length, -1)


def bytes_per_token(
    encoding: str, *, hidden_size: int, draft_vocab_size: int, dtype_bytes: int, supervised_share: float = 1.0
) -> float:
    """Wire bytes of one real token whose row is supervised with probability `supervised_share`."""
    row = {
        "probs": 4 * draft_vocab_size,
        "logits": dtype_bytes * draft_vocab_size,
        "hidden": dtype_bytes * hidden_size,
    }[encoding]
    # Row index, log-normaliser and argmax take four bytes each.
    return 3 * hidden_size * dtype_bytes + supervised_share * (row + 12)

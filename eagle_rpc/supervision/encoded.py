"""Supervision on the wire: read from a target's output, encoded, and decoded at the trainer.

Legend: B batch, T sequence, R real tokens, N supervised rows, H target hidden, C captured layers, W width of all
captured states, V target vocab, K draft vocab.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision.batch import Eagle3TargetBatch
from eagle_rpc.supervision.encodings import ENCODINGS, DraftHead, DraftTargets, LogitEncoding
from eagle_rpc.supervision.fp8_states import from_fp8, to_fp8
from eagle_rpc.supervision.output import AnyOutput, TargetOutput, logits_of
from eagle_rpc.supervision.request_times import ServiceTimes
from eagle_rpc.supervision.rows import RowsRead, read_rows
from eagle_rpc.supervision.tensors import to_device
from eagle_rpc.supervision.tokens import BatchRows, TokenBatch, true_places
from eagle_rpc.supervision.vocab import DraftVocabOnDevice

# Rows that a CPU reads at a time, so that intermediate results stay in its caches.
_CPU_ROWS = 32


@dataclass(kw_only=True, slots=True)
class EncodedSupervision:
    """One reply. It holds no padding and no row that the loss does not read."""

    encoding: str
    aux: Tensor  # [R, W] target dtype or float8, real tokens in order
    supervised_rows: Tensor  # [N] int32, flat b * T + t, ascending
    values: Tensor  # [N, ...] in the form of the encoding
    log_normalizer: Tensor  # [N] fp32, logsumexp over V
    argmax: Tensor  # [N] int32, draft id or -1
    aux_scales: Tensor | None = None  # [R, C] fp32, with float8 states
    value_scales: Tensor | None = None  # [N, 1] fp32, with float8 states
    times: ServiceTimes | None = None  # of its request, once a server has answered it

    @property
    def num_bytes(self) -> int:
        """Bytes of the tensors on the wire."""
        return sum(tensor.numel() * tensor.element_size() for tensor in self._tensors().values())

    def map_tensors(self, function: Callable[[Tensor], Tensor]) -> "EncodedSupervision":
        """The same reply with `function` applied to each tensor."""
        tensors = {name: function(tensor) for name, tensor in self._tensors().items()}
        return EncodedSupervision(encoding=self.encoding, times=self.times, **tensors)

    def _tensors(self) -> dict[str, Tensor]:
        named = ((field.name, getattr(self, field.name)) for field in fields(self))
        return {name: value for name, value in named if isinstance(value, Tensor)}


@dataclass(frozen=True, kw_only=True, slots=True)
class ReadSupervision:
    """A target's output, with the head's figures for the rows that may be supervised: most of the work."""

    encoding: type[DraftTargets]
    rows: BatchRows
    aux_hidden_states: Tensor  # [B, T, W]
    last_hidden_state: Tensor | None  # [B, T, H]; for encodings that need the head
    values: Tensor | None  # [N, ...]; for the others
    log_normalizer: Tensor  # [N] fp32
    argmax: Tensor  # [N] int64, draft id or -1

    def encode(self, rule: str) -> EncodedSupervision:
        """The reply with the rows that `rule` (of `ROW_RULES`) keeps. On a GPU it waits, as N is a shape."""
        keep = None if rule == "loss_mask" else (self.argmax >= 0).nonzero().squeeze(1)
        supervised_rows = _kept(self.rows.supervisable, keep)
        aux, aux_scales = self._travelling(self.aux_hidden_states, self.rows.real)
        if self.last_hidden_state is not None:
            values, value_scales = self._travelling(self.last_hidden_state, supervised_rows + 1)
        else:
            assert self.values is not None
            values, value_scales = _kept(self.values, keep), None
        return EncodedSupervision(
            encoding=self.encoding.name,
            aux=aux,
            supervised_rows=supervised_rows.int(),
            values=values,
            log_normalizer=_kept(self.log_normalizer, keep),
            argmax=_kept(self.argmax, keep).int(),
            aux_scales=aux_scales,
            value_scales=value_scales,
        )

    def _travelling(self, states: Tensor, places: Tensor) -> tuple[Tensor, Tensor | None]:
        """The states [B, T, ...] at flat places as the encoding sends them, and their scales."""
        if self.encoding.fp8_states:
            assert self.last_hidden_state is not None, "encodings of float8 states need the head"
            return to_fp8(states.flatten(0, 1), places, self.last_hidden_state.shape[-1])
        return states.flatten(0, 1).index_select(0, places), None


def _kept(column: Tensor, keep: Tensor | None) -> Tensor:
    """The rows `keep` of a column; no copy if these are all rows."""
    return column if keep is None or len(keep) == len(column) else column.index_select(0, keep)


def encode_supervision(
    output: AnyOutput,
    tokens: TokenBatch,
    vocab: DraftVocabOnDevice,
    *,
    encoding: str,
    rows: str,
    chunk_rows: int,
) -> EncodedSupervision:
    """The reply to `tokens` (on any device) from a target's output; `rows` is one of `ROW_RULES`."""
    places = BatchRows.of(tokens).to(output.aux_hidden_states.device)
    return read_supervision(output, places, vocab, encoding=encoding, chunk_rows=chunk_rows).encode(rows)


def read_supervision(
    output: AnyOutput, rows: BatchRows, vocab: DraftVocabOnDevice, *, encoding: str, chunk_rows: int
) -> ReadSupervision:
    """Runs the head on the rows that may be supervised and reads its logits, without waiting for a GPU.

    `encoding` is a name of `ENCODINGS`. The head runs on `chunk_rows` rows at a time, so there are never more
    than [chunk_rows, V] logits. Raises `InvalidRequest` if the encoding needs last hidden states and `output`
    has none.
    """
    form = ENCODINGS[encoding]
    last_hidden_state = output.last_hidden_state if isinstance(output, TargetOutput) else None
    if form.needs_head and last_hidden_state is None:
        raise InvalidRequest(
            f"encoding {encoding} needs a target that returns last_hidden_state; use encoding logits"
        )
    reader = _RowReader(output, rows.supervisable, form, vocab.selected_token_ids)
    # Without rows there is one empty chunk: its dtype counts.
    for chunk in rows.supervisable.split(chunk_rows):
        reader.read(chunk)
    return ReadSupervision(
        encoding=form,
        rows=rows,
        aux_hidden_states=output.aux_hidden_states,
        last_hidden_state=last_hidden_state if form.needs_head else None,
        values=reader.values,
        log_normalizer=reader.log_normalizer,
        argmax=vocab.draft_ids[reader.argmax],
    )


class _RowReader:
    """Reads rows chunk by chunk into tensors of all rows, so that only one chunk's logits exist at a time."""

    def __init__(self, output: AnyOutput, rows: Tensor, encoding: type[DraftTargets], ids_K: Tensor) -> None:
        """`rows`: flat places; `ids_K`: target ids of the draft vocabulary."""
        self._output = output
        self._read_rows = output.read_rows if isinstance(output, TargetOutput) else read_rows
        self._encode = encoding.encode if issubclass(encoding, LogitEncoding) else None
        self._columns_K = None if self._encode is None else ids_K
        self._num_rows, self._num_read = len(rows), 0
        self.log_normalizer = torch.empty(len(rows), dtype=torch.float32, device=rows.device)
        self.argmax = torch.empty_like(rows)  # target ids
        self.values: Tensor | None = None

    def read(self, chunk: Tensor) -> None:
        """Reads the next rows. Their logits are freed when it returns."""
        logits_NV = logits_of(self._output, chunk)
        for slice_NV in (logits_NV,) if logits_NV.is_cuda else logits_NV.split(_CPU_ROWS):
            self._store(self._read_rows(slice_NV, self._columns_K))

    def _store(self, read: RowsRead) -> None:
        place = slice(self._num_read, self._num_read + len(read.argmax))
        self._num_read = place.stop
        self.log_normalizer[place], self.argmax[place] = read.log_normalizer, read.argmax
        if self._encode is not None and read.selected is not None:
            values = self._encode(read.selected)
            if self.values is None:
                self.values = values.new_empty(self._num_rows, *values.shape[1:])
            self.values[place] = values


def decode_supervision(
    encoded: EncodedSupervision, tokens: TokenBatch, head: DraftHead | None
) -> Eagle3TargetBatch:
    """The batch of `tokens` and their reply, on the reply's device. Tokens on the CPU make no GPU wait.

    `head`: the draft rows of the target's head, for encodings that need them.
    """
    aux, values = (
        _readable(states, scales, head)
        for states, scales in ((encoded.aux, encoded.aux_scales), (encoded.values, encoded.value_scales))
    )
    return Eagle3TargetBatch(
        tokens=tokens,
        aux_hidden_states=_dense_aux(aux, tokens),
        supervised_rows=encoded.supervised_rows.long(),
        targets=ENCODINGS[encoded.encoding](values, head),
        log_normalizer=encoded.log_normalizer,
        argmax=encoded.argmax.long(),
    )


def _readable(states: Tensor, scales: Tensor | None, head: DraftHead | None) -> Tensor:
    if scales is None:
        return states
    assert head is not None, "encodings of float8 states need the draft rows of the target's head"
    return from_fp8(states, scales, head.weight.dtype)


def _dense_aux(aux: Tensor, tokens: TokenBatch) -> Tensor:
    """[B, T, W], zero at padding."""
    batch, length = tokens.shape
    if len(aux) < batch * length:
        real = to_device(true_places(tokens.attention_mask.bool()), aux.device)
        aux = aux.new_zeros(batch * length, aux.shape[-1]).index_copy_(0, real, aux)
    return aux.view(batch, length, -1)

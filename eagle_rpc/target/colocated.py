"""The target in the trainer's own process.

Legend: B batch, T sequence, H target hidden, V target vocab.
"""

import time
from collections.abc import Iterable, Iterator

from torch import Tensor

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision import (
    ENCODINGS,
    DraftHead,
    DraftVocabOnDevice,
    Eagle3TargetBatch,
    ModelInfo,
    PlainTarget,
    RequestTimes,
    RequestTotals,
    SessionSettings,
    TokenBatch,
    VocabMapping,
    Waits,
    as_target,
    check_encoding,
    decode_supervision,
    describe_target,
    device_of,
    own_storage,
    supervise,
)


class ColocatedEagle3TargetModel:
    """An `Eagle3TargetBackend` that runs the target in the calling thread.

    It encodes and decodes as the remote one does, so both give the same bits.
    """

    def __init__(
        self, target: PlainTarget, config: TargetConfig, settings: SessionSettings | None = None
    ) -> None:
        """Of `settings`, `encoding` and `rows` count. Raises `ConfigError` for limits beyond the model's."""
        self._target = as_target(target)
        self._chunk_rows = config.chunk_rows
        self._settings = settings or SessionSettings()
        self._info = describe_target(
            self._target,
            max_length=config.max_length,
            max_batch_tokens=config.max_batch_tokens,
            chunk_rows=config.chunk_rows,
        )
        self._vocab: DraftVocabOnDevice | None = None
        self._head: DraftHead | None = None
        self._totals = RequestTotals()

    def model_info(self) -> ModelInfo:
        """The target's identity and limits."""
        return self._info

    def input_embeddings(self) -> Tensor:
        """The token embedding [V, H], the start of the draft's; it shares memory with the target's."""
        return own_storage(self._target.get_input_embeddings().weight)

    def open_session(self, mapping: VocabMapping) -> None:
        """Sets the draft vocabulary of all later calls.

        Raises `InvalidRequest` for bad settings or mappings, `UnsupportedTarget` for an inexact encoding.
        """
        self._settings.check()
        if mapping.target_vocab_size != self._info.vocab_size:
            wanted, found = self._info.vocab_size, mapping.target_vocab_size
            raise InvalidRequest(f"the mapping must be made for {wanted} target tokens, got one for {found}")
        check_encoding(self._target, mapping.selected_token_ids, self._settings.encoding)
        self._vocab, self._head = DraftVocabOnDevice.of(mapping, device_of(self._target)), None
        if ENCODINGS[self._settings.encoding].needs_head:
            self.output_embeddings()

    def output_embeddings(self) -> DraftHead:
        """The head's rows of the session's draft vocabulary."""
        if self._head is None:
            vocab = self._vocab_for("output_embeddings")
            self._head = self._target.draft_head(vocab.selected_token_ids)
        return self._head

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> Eagle3TargetBatch:
        """Supervision of one batch of [B, T] tensors; raises `InvalidRequest` for a bad one."""
        tokens = TokenBatch(
            input_ids=input_ids, attention_mask=attention_mask, loss_mask=loss_mask, segment_ids=segment_ids
        )
        return self._supervise(tokens)

    def stream(self, batches: Iterable[TokenBatch]) -> Iterator[Eagle3TargetBatch]:
        """Supervision of every batch in order, each made when it is asked for."""
        return map(self._supervise, batches)

    def _supervise(self, tokens: TokenBatch) -> Eagle3TargetBatch:
        vocab, info, started = self._vocab_for("generate_batch"), self._info, time.monotonic()
        tokens.check(vocab_size=info.vocab_size, max_length=info.max_length, max_tokens=info.max_batch_tokens)
        form = {"encoding": self._settings.encoding, "rows": self._settings.rows}
        encoded = supervise(self._target, tokens, vocab, **form, chunk_rows=self._chunk_rows)
        computed = time.monotonic()
        batch = decode_supervision(encoded, tokens, self._head)
        ended = time.monotonic()
        times = RequestTimes(forward=computed - started, decode=ended - computed)
        self._totals = self._totals.plus(RequestTotals(1, times, Waits(compute=ended - started)))
        return batch

    def _vocab_for(self, call: str) -> DraftVocabOnDevice:
        if self._vocab is None:
            raise InvalidRequest(f"open_session must come before {call}, got no draft vocabulary")
        return self._vocab

    @property
    def totals(self) -> RequestTotals:
        """Seconds spent in the target since the start; all of them are waits for it."""
        return self._totals

    def close(self) -> None:
        """Drops the draft vocabulary."""
        self._vocab = self._head = None

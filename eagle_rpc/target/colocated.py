"""The target in the trainer's own process, behind the surface that the remote one has."""

import time
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import InvalidRequest
from eagle_rpc.supervision import (
    DraftHead,
    DraftVocabOnDevice,
    Eagle3TargetBatch,
    ModelInfo,
    SessionSpec,
    TokenBatch,
    VocabMapping,
    decode_supervision,
    own_storage,
)
from eagle_rpc.target.supervise import check_encoding, describe_target, device_of, exact_draft_head, supervise


class ColocatedEagle3TargetModel:
    """An `Eagle3TargetBackend` that runs the target where it is called.

    Batches pass the same encoder and decoder as remote ones, so both give the same bits.
    """

    def __init__(self, target: Any, config: TargetConfig, *, encoding: str, rows: str):
        """`target`: an `Eagle3Target`; `encoding`, `rows`: as of `SessionSpec`.

        Raises `ConfigError` for limits beyond the model's.
        """
        self._target = target
        self._chunk_rows = config.chunk_rows
        self._encoding = encoding
        self._rows = rows
        self._info = describe_target(target, config)
        self._vocab: DraftVocabOnDevice | None = None
        self._head: DraftHead | None = None
        self._seconds_waited = 0.0

    def model_info(self) -> ModelInfo:
        """The target's identity and limits."""
        return self._info

    def input_embeddings(self) -> Tensor:
        """The raw token embedding [V, H], which seeds the draft's; shares memory with the target's."""
        return own_storage(self._target.get_input_embeddings().weight)

    def open_session(self, mapping: VocabMapping) -> None:
        """Fixes the draft vocabulary of everything that follows.

        Raises `InvalidRequest` for settings, `UnsupportedTarget` where the encoding would not be exact.
        """
        SessionSpec(
            selected_token_ids=mapping.selected_token_ids, encoding=self._encoding, rows=self._rows
        ).check()
        if mapping.target_vocab_size != self._info.vocab_size:
            raise InvalidRequest(
                f"the mapping must be made for {self._info.vocab_size} target tokens, got one for {mapping.target_vocab_size}"
            )
        check_encoding(self._target, mapping.selected_token_ids, self._encoding)
        self._vocab = DraftVocabOnDevice.of(mapping, device_of(self._target))
        self._head = (
            exact_draft_head(self._target, self._vocab.selected_token_ids)
            if self._encoding == "hidden"
            else None
        )

    def output_embeddings(self) -> DraftHead:
        """The head's rows of the session's draft vocabulary."""
        if self._vocab is None:
            raise InvalidRequest("open_session must come before output_embeddings, got no draft vocabulary")
        return self._head or exact_draft_head(self._target, self._vocab.selected_token_ids)

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> Eagle3TargetBatch:
        """Supervision of one batch of [B, T] tensors; raises `InvalidRequest` for a bad one."""
        if self._vocab is None:
            raise InvalidRequest("open_session must come before generate_batch, got no draft vocabulary")
        started = time.monotonic()
        tokens = TokenBatch(
            input_ids=input_ids, attention_mask=attention_mask, loss_mask=loss_mask, segment_ids=segment_ids
        )
        info = self._info
        tokens.check(vocab_size=info.vocab_size, max_length=info.max_length, max_tokens=info.max_batch_tokens)
        encoded = supervise(
            self._target,
            tokens,
            self._vocab,
            encoding=self._encoding,
            rows=self._rows,
            chunk_rows=self._chunk_rows,
        )
        batch = decode_supervision(encoded, tokens, self._head)
        self._seconds_waited += time.monotonic() - started
        return batch

    def stream(self, batches: Iterable[TokenBatch]) -> Iterator[Eagle3TargetBatch]:
        """Supervision of every batch in order, each made when it is asked for."""
        for tokens in batches:
            yield self.generate_batch(
                tokens.input_ids, tokens.attention_mask, tokens.loss_mask, tokens.segment_ids
            )

    @property
    def seconds_waited(self) -> float:
        """Seconds spent in the target since the start."""
        return self._seconds_waited

    def close(self) -> None:
        """Forgets the draft vocabulary."""
        self._vocab = self._head = None

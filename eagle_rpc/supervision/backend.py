"""The target as training sees it, in this process or elsewhere."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

from eagle_rpc.supervision.batch import Eagle3TargetBatch
from eagle_rpc.supervision.encodings import DraftHead
from eagle_rpc.supervision.request_times import RequestTotals
from eagle_rpc.supervision.session import ModelInfo
from eagle_rpc.supervision.tokens import TokenBatch
from eagle_rpc.supervision.vocab import VocabMapping


class Eagle3TargetBackend(Protocol):
    """Remote and co-located targets satisfy this."""

    def model_info(self) -> ModelInfo:
        """The target's identity and limits."""

    def input_embeddings(self) -> Tensor:
        """The token embedding [V, H], the start of the draft's."""

    def open_session(self, mapping: VocabMapping) -> None:
        """Sets the draft vocabulary of all later calls."""

    def output_embeddings(self) -> DraftHead:
        """The head's rows of the session's draft vocabulary."""

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> Eagle3TargetBatch:
        """Waits for the supervision of one batch of [B, T] tensors."""

    def stream(self, batches: Iterable[TokenBatch]) -> Iterator[Eagle3TargetBatch]:
        """Supervision of every batch, in order; later batches are under way while the caller works."""

    @property
    def totals(self) -> RequestTotals:
        """Where the time of all requests went since the start, and what the caller waited for."""

    def close(self) -> None:
        """Ends the session; the target goes on."""

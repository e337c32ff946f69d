"""What training sees of a target, wherever it runs."""

from collections.abc import Iterable, Iterator
from typing import Protocol

from torch import Tensor

from eagle_rpc.supervision.batch import Eagle3TargetBatch
from eagle_rpc.supervision.draft_head import DraftHead
from eagle_rpc.supervision.session import ModelInfo
from eagle_rpc.supervision.tokens import TokenBatch
from eagle_rpc.supervision.vocab import VocabMapping


class Eagle3TargetBackend(Protocol):
    """Remote, co-located and cached targets satisfy this."""

    def model_info(self) -> ModelInfo:
        """The target's identity and limits."""

    def input_embeddings(self) -> Tensor:
        """The token embedding [V, H], which seeds the draft's."""

    def open_session(self, mapping: VocabMapping) -> None:
        """Fixes the draft vocabulary of everything that follows."""

    def output_embeddings(self) -> DraftHead:
        """The head's rows of the session's draft vocabulary."""

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> Eagle3TargetBatch:
        """Supervision of one batch of [B, T] tensors; waits for it."""

    def stream(self, batches: Iterable[TokenBatch]) -> Iterator[Eagle3TargetBatch]:
        """Supervision of every batch in order, with several under way while the caller works."""

    @property
    def seconds_waited(self) -> float:
        """Seconds that the caller has been blocked on supervision since the start."""

    def close(self) -> None:
        """Ends the session. The target lives on."""

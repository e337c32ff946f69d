"""What a target model returns from one forward pass, and what may serve as a target.

Legend: B batch, T sequence, H target hidden, V target vocab, N rows.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from eagle_rpc.supervision.rows import RowsRead, read_rows


@dataclass(kw_only=True, slots=True)
class TargetOutput:
    """One forward pass, unshifted and without logits: `project` makes those of chosen rows."""

    aux_hidden_states: Tensor  # [B, T, 3H]
    last_hidden_state: Tensor  # [B, T, H], what the head reads
    project: Callable[[Tensor], Tensor]  # [N, H] -> [N, V], the model's own head
    read_rows: Callable[[Tensor, Tensor | None], RowsRead] = read_rows  # as of that function


class Eagle3Target(Protocol):
    """Any object with these two methods serves as a target. Tokens come on its device; with a true `takes_host_tokens` on any.

    `generate_batch` returns a `TargetOutput`, or, as NeMo AutoModel's target wrapper does, an object with
    `aux_hidden_states` [B, T, 3H] and `logits` [B, T, V] that are already shifted left by one.
    """

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, **packing: Tensor
    ) -> Any:
        """Runs the target once on [B, T] ids. `segment_ids` [B, T] is passed only for packed batches."""

    def get_input_embeddings(self) -> nn.Embedding:
        """The token embedding [V, H]."""

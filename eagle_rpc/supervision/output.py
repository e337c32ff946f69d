"""What a target returns from one forward pass.

Legend: B batch, T sequence, H target hidden, W width of all captured states, V target vocab, N rows, K draft
vocab.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from eagle_rpc.supervision.rows import RowsRead, read_rows


@dataclass(kw_only=True, slots=True)
class TargetOutput:
    """Hidden states, not shifted. There are no logits: the head runs on chosen rows only."""

    aux_hidden_states: Tensor  # [B, T, W]
    last_hidden_state: Tensor  # [B, T, H], the input of the head
    project: Callable[[Tensor], Tensor]  # [N, H] -> [N, V], the model's own head
    read_rows: Callable[[Tensor, Tensor | None], RowsRead] = read_rows  # `rows.read_rows` or an equal of it


class ShiftedLogits(Protocol):
    """The output of NeMo AutoModel's target wrapper."""

    aux_hidden_states: Tensor  # [B, T, W]
    logits: Tensor  # [B, T, V], shifted left by one


AnyOutput = TargetOutput | ShiftedLogits


def logits_of(output: AnyOutput, rows: Tensor) -> Tensor:
    """[N, V]: the logits that judge the flat rows b * T + t, which are those of position t + 1."""
    if isinstance(output, TargetOutput):
        return output.project(output.last_hidden_state.flatten(0, 1)[rows + 1])
    return output.logits.flatten(0, 1)[rows]

"""Forward passes for requests: each by itself, or several small ones, which leave a GPU half idle, in one.

Together only for sessions that allow it: a matrix product of another shape rounds differently.

Legend: B batch, T sequence.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.supervision import EncodedSupervision, TokenBatch, encode_supervision
from eagle_rpc.target.sessions import Session
from eagle_rpc.target.supervise import device_of, run_target

# Tokens computed together for each that the requests would take by themselves: company must not waste what it saves.
_MOST_PADDING = 1.25
# What a target's output holds for each row.
_BY_ROW = ("aux_hidden_states", "last_hidden_state", "logits")


@dataclass(frozen=True, eq=False, slots=True)
class PassRequest:
    """What one session wants supervised."""

    session: Session
    tokens: TokenBatch


class ForwardPass:
    """Runs the target on requests; each gets the supervision of its own tokens in its session's form."""

    def __init__(self, target: Any, config: TargetConfig) -> None:
        """`target`: an `Eagle3Target`."""
        self._target = target
        self._device = device_of(target)
        self._max_shared_tokens = config.max_shared_tokens
        self._chunk_rows = config.chunk_rows

    def admits(self, aboard: Sequence[PassRequest], another: PassRequest) -> bool:
        """Whether `another` may run with those `aboard`: by its session, in size, in length, and packed like them."""
        requests = [*aboard, another]
        if not all(request.session.share_forward for request in requests):
            return False
        shapes = [request.tokens.shape for request in requests]
        padded = sum(batch for batch, _ in shapes) * max(length for _, length in shapes)
        alone = sum(batch * length for batch, length in shapes)
        alike = len({request.tokens.segment_ids is None for request in requests}) == 1
        return alike and padded <= min(self._max_shared_tokens, _MOST_PADDING * alone)

    @torch.no_grad()
    def run(self, aboard: Sequence[PassRequest]) -> list[EncodedSupervision]:
        """The supervision of each, on the target's device or, where RPC cannot take it from there, on the CPU."""
        batches = [request.tokens.to(self._device) for request in aboard]
        if len(batches) == 1:
            return [self._encode(run_target(self._target, batches[0]), batches[0], aboard[0].session)]
        output = run_target(self._target, _stack(batches))
        encoded, first = [], 0
        for request, tokens in zip(aboard, batches, strict=True):
            batch, length = tokens.shape
            part = _part_of(output, slice(first, first + batch), length)
            encoded.append(self._encode(part, tokens, request.session))
            first += batch
        return encoded

    def _encode(self, output: Any, tokens: TokenBatch, session: Session) -> EncodedSupervision:
        encoded = encode_supervision(
            output, tokens, session.vocab, encoding=session.encoding, rows=session.rows, chunk_rows=self._chunk_rows
        )
        # TensorPipe aborts the process on a CUDA tensor without elements.
        through_host = session.through_host or not encoded.supervised_rows.numel()
        return encoded.to(torch.device("cpu")) if through_host else encoded


def _stack(batches: Sequence[TokenBatch]) -> TokenBatch:
    """All rows in one batch, padded on the right to the longest."""
    longest = max(tokens.shape[1] for tokens in batches)

    def column(name: str) -> Tensor:
        return torch.cat([F.pad(getattr(tokens, name), (0, longest - tokens.shape[1])) for tokens in batches])

    return TokenBatch(
        input_ids=column("input_ids"),
        attention_mask=column("attention_mask"),
        loss_mask=column("loss_mask"),
        segment_ids=None if batches[0].segment_ids is None else column("segment_ids"),
    )


def _part_of(output: Any, rows: slice, length: int) -> Any:
    """What a target returned for some rows, up to `length`."""
    parts = {name: getattr(output, name)[rows, :length] for name in _BY_ROW if getattr(output, name, None) is not None}
    wholes = {name: getattr(output, name) for name in ("project", "read_rows") if hasattr(output, name)}
    return SimpleNamespace(**parts, **wholes)

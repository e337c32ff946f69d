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
from eagle_rpc.service.sessions import Session
from eagle_rpc.supervision import (
    BatchRows,
    EncodedSupervision,
    ReadSupervision,
    TokenBatch,
    read_supervision,
    to_host,
)
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
    """Runs the target on requests; each gets the supervision of its own tokens in its session's form.

    A GPU runs targets on a stream of its own, so that replies are encoded, copied to the host and sent while the next pass runs.
    Nothing here waits for it before `StartedPass.finish`.
    """

    def __init__(self, target: Any, config: TargetConfig) -> None:
        """`target`: an `Eagle3Target`."""
        self._target = target
        self._device = device_of(target)
        self._stream = torch.cuda.Stream(self._device) if self.overlaps else None
        self._max_shared_tokens = config.max_shared_tokens
        self._chunk_rows = config.chunk_rows

    @property
    def overlaps(self) -> bool:
        """Whether one pass may be started before the one before it is finished."""
        return self._device.type == "cuda"

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
    def start(self, aboard: Sequence[PassRequest]) -> "StartedPass":
        """Runs the pass, or gives it to the GPU."""
        if self._stream is None:
            return StartedPass(self._run(aboard), aboard, self._device, None)
        # What earlier passes left may be overwritten once their replies are encoded.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # Whoever waits for it leaves the core to others.
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            return StartedPass(self._run(aboard), aboard, self._device, self._stream.record_event(done))

    def _run(self, aboard: Sequence[PassRequest]) -> list[ReadSupervision]:
        batches = [request.tokens for request in aboard]
        if len(batches) == 1:
            return [self._read(run_target(self._target, batches[0]), aboard[0])]
        output = run_target(self._target, _stack(batches))
        read, first = [], 0
        for request in aboard:
            batch, length = request.tokens.shape
            read.append(self._read(_part_of(output, slice(first, first + batch), length), request))
            first += batch
        return read

    def _read(self, output: Any, request: PassRequest) -> ReadSupervision:
        session, rows = request.session, BatchRows.of(request.tokens).to(self._device)
        return read_supervision(
            output, rows, session.vocab, encoding=session.encoding, chunk_rows=self._chunk_rows
        )


class StartedPass:
    """A pass that is done on a CPU, and that a GPU works on."""

    def __init__(
        self,
        read: list[ReadSupervision],
        aboard: Sequence[PassRequest],
        device: torch.device,
        done: torch.cuda.Event | None,
    ) -> None:
        self._read, self._aboard, self._device, self._done = read, aboard, device, done

    @property
    def is_done(self) -> bool:
        """Whether `finish` would not have to wait for the target."""
        return self._done is None or self._done.query()

    @torch.no_grad()
    def finish(self) -> list[EncodedSupervision]:
        """The supervision of each request, on the target's device or, where RPC cannot take it from there, on the CPU.

        Once: what the target left is given up. On a GPU the replies are in the order of the current stream.
        """
        read, self._read = self._read, []
        if self._done is not None:
            # So that no more than one other pass is ahead, and a pass that failed on the GPU fails here.
            self._done.synchronize()
        return [self._encode(one, request.session) for one, request in zip(read, self._aboard, strict=True)]

    def _encode(self, read: ReadSupervision, session: Session) -> EncodedSupervision:
        encoded = read.encode(session.rows)
        # TensorPipe aborts the process on a CUDA tensor without elements.
        if self._done is None or not (session.through_host or encoded.supervised_rows.numel() == 0):
            return encoded
        on_host = encoded.map_tensors(to_host)
        torch.cuda.current_stream(self._device).synchronize()
        return on_host


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
    parts = {
        name: getattr(output, name)[rows, :length]
        for name in _BY_ROW
        if getattr(output, name, None) is not None
    }
    wholes = {name: getattr(output, name) for name in ("project", "read_rows") if hasattr(output, name)}
    return SimpleNamespace(**parts, **wholes)

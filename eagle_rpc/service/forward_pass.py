"""One forward pass of the target for one request."""

from dataclasses import dataclass
from typing import Any

import torch

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
        self._chunk_rows = config.chunk_rows

    @property
    def overlaps(self) -> bool:
        """Whether one pass may be started before the one before it is finished."""
        return self._device.type == "cuda"

    @torch.no_grad()
    def start(self, request: PassRequest) -> "StartedPass":
        """Runs the pass, or gives it to the GPU."""
        if self._stream is None:
            return StartedPass(self._run(request), request.session, self._device, None)
        # What earlier passes left may be overwritten once their replies are encoded.
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        # Whoever waits for it leaves the core to others.
        done = torch.cuda.Event(blocking=True)
        with torch.cuda.stream(self._stream):
            read = self._run(request)
            return StartedPass(read, request.session, self._device, self._stream.record_event(done))

    def _run(self, request: PassRequest) -> ReadSupervision:
        session, tokens = request.session, request.tokens
        output = run_target(self._target, tokens)
        rows = BatchRows.of(tokens).to(self._device)
        return read_supervision(
            output, rows, session.vocab, encoding=session.encoding, chunk_rows=self._chunk_rows
        )


class StartedPass:
    """A pass that is done on a CPU, and that a GPU works on."""

    def __init__(
        self,
        read: ReadSupervision,
        session: Session,
        device: torch.device,
        done: torch.cuda.Event | None,
    ) -> None:
        self._read: ReadSupervision | None = read
        self._session, self._device, self._done = session, device, done

    @property
    def is_done(self) -> bool:
        """Whether `finish` would not have to wait for the target."""
        return self._done is None or self._done.query()

    @torch.no_grad()
    def finish(self) -> EncodedSupervision:
        """The supervision, on the target's device or, where RPC cannot take it from there, on the CPU.

        Once: what the target left is given up. On a GPU the reply is in the order of the current stream.
        """
        read, self._read = self._read, None
        assert read is not None, "a pass is finished once"
        if self._done is not None:
            # So that no more than one other pass is ahead, and a pass that failed on the GPU fails here.
            self._done.synchronize()
        return self._encode(read, self._session)

    def _encode(self, read: ReadSupervision, session: Session) -> EncodedSupervision:
        encoded = read.encode(session.rows)
        # TensorPipe aborts the process on a CUDA tensor without elements.
        if self._done is None or not (session.through_host or encoded.supervised_rows.numel() == 0):
            return encoded
        on_host = encoded.map_tensors(to_host)
        torch.cuda.current_stream(self._device).synchronize()
        return on_host

"""One forward pass of the target for one request, and the errors that it may end with."""

import contextlib
import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import EagleRpcError, TargetFailed, TargetLost, TargetOutOfMemory
from eagle_rpc.service.sessions import Session
from eagle_rpc.supervision import (
    BatchRows,
    Eagle3Target,
    EncodedSupervision,
    ReadSupervision,
    TokenBatch,
    device_of,
    read_supervision,
    run_target,
    to_host,
)

logger = logging.getLogger(__name__)

# The CPU allocator's message; torch has no exception class for it.
_CPU_OUT_OF_MEMORY = "DefaultCPUAllocator: can't allocate memory"


@dataclass(frozen=True, eq=False, slots=True)
class PassRequest:
    """The tokens that one session wants supervised."""

    session: Session
    tokens: TokenBatch


class ForwardPass:
    """Runs the target on requests.

    Each GPU of the target runs it on a stream of its own, so that replies are encoded, copied to the host and
    sent while the next pass runs. Nothing here waits for a GPU before `StartedPass.finish`.
    """

    def __init__(self, target: Eagle3Target, config: TargetConfig) -> None:
        self._target = target
        self._device = device_of(target)
        on_gpus = all(device.type == "cuda" for device in target.devices)
        self._streams = [torch.cuda.Stream(device) for device in target.devices] if on_gpus else []
        self._chunk_rows = config.chunk_rows

    @property
    def most_before(self) -> int:
        """Unfinished passes beside which one more may start: each GPU works on one while the next one waits."""
        return len(self._streams)

    @torch.no_grad()
    def start(self, request: PassRequest) -> "StartedPass":
        """Runs the pass, or gives it to the GPUs."""
        if not self._streams:
            return StartedPass(self._run(request), request.session, self._device, None)
        last = self._streams[-1]
        # Memory of earlier passes may be overwritten only when their replies are encoded.
        last.wait_stream(torch.cuda.current_stream(self._device))
        # A blocking event leaves the core to other threads while one waits for it.
        done = torch.cuda.Event(blocking=True)
        with contextlib.ExitStack() as current:
            for stream in self._streams:
                current.enter_context(torch.cuda.stream(stream))
            read = self._run(request)
            return StartedPass(read, request.session, self._device, last.record_event(done))

    def _run(self, request: PassRequest) -> ReadSupervision:
        session, tokens = request.session, request.tokens
        output = run_target(self._target, tokens)
        rows, encoding = BatchRows.of(tokens).to(self._device), session.spec.encoding
        return read_supervision(output, rows, session.vocab, encoding=encoding, chunk_rows=self._chunk_rows)


class StartedPass:
    """A pass that a GPU works on, or that is done on a CPU."""

    def __init__(
        self, read: ReadSupervision, session: Session, device: torch.device, done: torch.cuda.Event | None
    ) -> None:
        self._read: ReadSupervision | None = read
        self._session, self._device, self._done = session, device, done

    @property
    def is_done(self) -> bool:
        """Whether `finish` would not wait for the GPU. Raises the error of a GPU that has failed."""
        return self._done is None or self._done.query()

    def wait(self) -> None:
        """Waits for the GPU. Raises its error if the pass failed there."""
        if self._done is not None:
            self._done.synchronize()

    @torch.no_grad()
    def finish(self) -> EncodedSupervision:
        """The supervision, on the target's device, or on the CPU where RPC cannot take it from there.

        To be called once: the target's output is dropped. On a GPU the tensors are ready in the order of the
        current stream.
        """
        read, self._read = self._read, None
        assert read is not None, "a pass is finished once"
        self.wait()
        encoded = read.encode(self._session.spec.rows)
        # TensorPipe aborts the process on a CUDA tensor without elements.
        through_host = self._session.spec.through_host or encoded.supervised_rows.numel() == 0
        if self._done is None or not through_host:
            return encoded
        on_host = encoded.map_tensors(to_host)
        torch.cuda.current_stream(self._device).synchronize()
        return on_host


def outcome_of(run: Callable[[], Any]) -> Any:
    """The value of `run`, or the `EagleRpcError` for the exception that it raised. Raises `TargetLost`."""
    try:
        return run()
    except TargetLost:
        # It ends the forward thread, and with it the target.
        raise
    except EagleRpcError as error:
        return error
    except Exception as error:
        # A model's own code and the libraries below it raise any class; it ends one request, not the thread.
        if is_out_of_memory(error):
            logger.warning("a request failed for lack of memory: %s", error)
            return TargetOutOfMemory(f"the target ran out of memory; send fewer tokens at a time ({error})")
        logger.exception("a forward pass failed")
        return TargetFailed(f"{type(error).__name__}: {error}")


def is_out_of_memory(error: BaseException) -> bool:
    """Whether torch, Python or the CPU allocator raised `error` for lack of memory."""
    return isinstance(error, torch.OutOfMemoryError | MemoryError) or _CPU_OUT_OF_MEMORY in str(error)

"""Time by stage of one batch: layers, capture, the head's projection, reading its logits, the rest of the encoding."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from eagle_rpc.supervision import DraftVocabOnDevice, TokenBatch, encode_supervision
from eagle_rpc.target.capture import AuxStates


class Stopwatch:
    """Sums of time inside wrapped functions: the device's time on a GPU, the clock's on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._spans: dict[str, list[tuple[Any, Any]]] = {}

    def timed(self, stage: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*arguments: Any, **named: Any) -> Any:
            with self.span(stage):
                return function(*arguments, **named)

        return run

    @contextmanager
    def span(self, stage: str) -> Iterator[None]:
        before = self._now()
        yield
        self._spans.setdefault(stage, []).append((before, self._now()))

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def milliseconds(self, stage: str) -> float:
        if self._on_gpu:
            torch.cuda.synchronize()
            return sum(before.elapsed_time(after) for before, after in self._spans.get(stage, []))
        return 1e3 * sum(after - before for before, after in self._spans.get(stage, []))


@torch.no_grad()
def stage_milliseconds(
    target: Any, tokens: TokenBatch, vocab: DraftVocabOnDevice, *, encoding: str, chunk_rows: int
) -> dict[str, float]:
    """Milliseconds of each stage of one batch, as `supervise` runs it."""
    watch = Stopwatch(tokens.input_ids.device)
    write = AuxStates.write
    AuxStates.write = watch.timed("capture", write)
    try:
        packing = {} if tokens.segment_ids is None else {"segment_ids": tokens.segment_ids}
        with watch.span("layers"):
            output = target.generate_batch(
                tokens.input_ids, tokens.attention_mask, tokens.loss_mask, **packing
            )
    finally:
        AuxStates.write = write
    output.project = watch.timed("projection", output.project)
    output.read_rows = watch.timed("reading", output.read_rows)
    with watch.span("encode"):
        encode_supervision(output, tokens, vocab, encoding=encoding, rows="loss_mask", chunk_rows=chunk_rows)
    spent = {
        stage: watch.milliseconds(stage) for stage in ("layers", "capture", "projection", "reading", "encode")
    }
    return {
        **spent,
        "layers": spent["layers"] - spent["capture"],
        "encode": spent["encode"] - spent["projection"] - spent["reading"],
    }

"""Decoder layers through `torch.compile`, for a few fixed shapes that are compiled when the target starts.

Layers are compiled one by one, so a deep model costs as much as one layer of each kind. Only `forward` is
compiled, so hooks still see the layers' outputs, and only while a batch runs, so other users of the model see
its own layers. Legend: B batch, T sequence, H target hidden.
"""

import logging
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._dynamo.exc import FailOnRecompileLimitHit, RecompileError, TorchDynamoException
from torch.nn import functional as F

from eagle_rpc.config.texts import parse_pair
from eagle_rpc.errors import InvalidRequest, TargetFailed, UnsupportedTarget
from eagle_rpc.target.capture import AuxStates
from eagle_rpc.target.chat_attention import ChatAttention, are_plain

logger = logging.getLogger(__name__)

_BACKEND = "inductor"
# Graphs of one shape on one device. Models have few kinds of decoder layers; one graph for every layer would
# take hours.
_KINDS_OF_LAYERS = 4


class Shape(NamedTuple):
    """Sequences, and tokens of each, of a compiled forward pass."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


class Buckets:
    """The compiled shapes, and how a batch of any shape is cut and padded to them."""

    def __init__(self, shapes: Sequence[str]) -> None:
        """`shapes`: at least one, each `BxT`, as in `target.compile_shapes`."""
        sizes = {Shape(*parse_pair(shape)) for shape in shapes}
        # By length, then by batch: the first shape that holds a batch is the smallest.
        self.shapes = sorted(sizes, key=lambda shape: (shape.length, shape.batch))

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that fits."""
        return self.shapes[-1].length

    def pieces(self, batch: int, length: int) -> Iterator[tuple[slice, Shape]]:
        """Sequences of the batch that run together, and the shape that they are padded to.

        Raises `InvalidRequest` if a sequence is longer than the longest shape.
        """
        if length > self.longest:
            raise InvalidRequest(
                f"input_ids must be at most {self.longest} tokens long (target.compile_shapes), got {length}"
            )
        fitting = min(shape.length for shape in self.shapes if shape.length >= length)
        candidates = [shape for shape in self.shapes if shape.length == fitting]
        start = 0
        while start < batch:
            shape = next((shape for shape in candidates if shape.batch >= batch - start), candidates[-1])
            yield slice(start, min(start + shape.batch, batch)), shape
            start += shape.batch


class CompiledForward:
    """The base model with a compiled `forward` in every decoder layer."""

    def __init__(
        self,
        attention: ChatAttention,
        layers: Sequence[nn.Module],
        buckets: Buckets,
        *,
        packed: bool,
        mode: str,
    ) -> None:
        """`attention` of the base model; `layers` to compile; `packed`: rows may hold several chats.

        `mode` of `torch.compile`.
        """
        self._attention, self._layers, self._packed, self._mode = attention, layers, packed, mode
        self.buckets = buckets
        self._forwards = [
            torch.compile(layer.forward, dynamic=False, fullgraph=True, backend=_BACKEND, mode=mode)
            for layer in layers
        ]

    @property
    def form(self) -> str:
        """Mode and shapes, for `ModelInfo.form`."""
        return f"compiled ({self._mode}) for {' '.join(map(str, self.buckets.shapes))}"

    @torch.inference_mode()
    def compile(self, devices: Sequence[torch.device]) -> None:
        """Compiles every shape, also for packed chats if they are allowed, by running it over `devices`. Logs
        its progress.

        Raises `UnsupportedTarget` if layers do not compile whole or are of too many kinds.
        """
        started = time.monotonic()
        kind = type(self._layers[0]).__name__
        packings = (False, True) if self._packed else (False,)
        forms = [(shape, packed) for shape in self.buckets.shapes for packed in packings]
        limit = len(forms) * _KINDS_OF_LAYERS * len(devices)
        bounded = torch._dynamo.config.patch(
            recompile_limit=limit, accumulated_recompile_limit=limit, fail_on_recompile_limit_hit=True
        )
        for number, (shape, packed) in enumerate(forms, start=1):
            form = f"{shape}{' packed' if packed else ''}"
            logger.info("compiling %s for shape %d of %d, %s", kind, number, len(forms), form)
            ids_BT = torch.zeros(shape, dtype=torch.int64, device=devices[0])
            # Position 0 everywhere: every token is a chat of its own.
            positions_BT = torch.zeros(shape, dtype=torch.int64) if packed else None
            try:
                with bounded, self._compiled_layers():
                    self._attention.run(ids_BT, positions_BT, compiled=True)
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                rule = f"{kind} must compile whole and alike in all layers, or target.compile_shapes be empty"
                raise UnsupportedTarget(f"{rule}: {error}") from error
        logger.info("compiled %d shapes in %.1f s", len(forms), time.monotonic() - started)

    def run(self, input_ids: Tensor, positions_BT: Tensor | None, aux: AuxStates) -> Tensor:
        """Last hidden states [B, T, H]; arguments as in `ChatAttention.run`.

        Raises `InvalidRequest` if no compiled shape fits, `TargetFailed` if torch would compile again.
        """
        batch, length = input_ids.shape
        pieces = []
        try:
            with torch._dynamo.config.patch(error_on_recompile=True), self._compiled_layers():
                for rows, shape in self.buckets.pieces(batch, length):
                    aux.rows = rows
                    positions = (
                        None if positions_BT is None else self._padded_positions(positions_BT[rows], shape)
                    )
                    ids = _padded(input_ids[rows], shape)
                    hidden_BTH = self._attention.run(ids, positions, compiled=True)
                    pieces.append(hidden_BTH[: rows.stop - rows.start, :length])
        except RecompileError as error:
            raise TargetFailed(
                f"the compiled target met an input that it was not compiled for: {error}"
            ) from error
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _padded_positions(self, positions_BT: Tensor, shape: Shape) -> Tensor:
        plain = are_plain(positions_BT)
        if not (self._packed or plain):
            raise InvalidRequest(
                "segment_ids must be absent where target.compile_packed is false, got packed chats"
            )
        batch, length = positions_BT.shape
        # Padding on the right is one more chat of a packed row; a plain row stays plain.
        index_L = torch.arange(shape.length - length) + (length if plain else 0)
        padded_BT = torch.cat((positions_BT, index_L.expand(batch, -1)), dim=1)
        return torch.cat((padded_BT, torch.arange(shape.length).expand(shape.batch - batch, -1)))

    @contextmanager
    def _compiled_layers(self) -> Iterator[None]:
        try:
            for layer, forward in zip(self._layers, self._forwards, strict=True):
                layer.forward = forward
            yield
        finally:
            for layer in self._layers:
                vars(layer).pop("forward", None)


def _padded(tensor_BT: Tensor, shape: Shape) -> Tensor:
    """`tensor_BT` with zeros on the right and below, up to `shape`."""
    batch, length = tensor_BT.shape
    return F.pad(tensor_BT, (0, shape.length - length, 0, shape.batch - batch))

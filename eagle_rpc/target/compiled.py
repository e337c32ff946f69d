"""Decoder layers through `torch.compile`, at a few fixed shapes that are compiled when the target starts.

Every layer is compiled by itself, so a model of many layers costs as much as one of each kind. Nothing but `forward` is
compiled, so hooks see the layers' outputs, and only while a batch runs, so whoever else uses the model has its own layers.
Legend: B batch, T sequence, H target hidden.
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
from eagle_rpc.target.attention import ChatAttention, are_plain
from eagle_rpc.target.capture import AuxStates

logger = logging.getLogger(__name__)

_BACKEND = "inductor"
# Graphs of one shape: a model has few kinds of decoder layers, and one whose every layer is its own would compile for hours.
_KINDS_OF_LAYERS = 4


class Shape(NamedTuple):
    """Sequences and tokens of each that a compiled forward pass takes."""

    batch: int
    length: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.length}"


class Buckets:
    """The compiled shapes, and how a batch of any shape is cut and padded to them."""

    def __init__(self, shapes: Sequence[str]) -> None:
        """`shapes`: at least one, `BxT` each, as `target.compile_shapes`."""
        sizes = map(parse_pair, shapes)
        # By length, then by batch: the first that holds a batch is the smallest.
        self.shapes = sorted(
            {Shape(batch, length) for batch, length in sizes}, key=lambda shape: (shape.length, shape.batch)
        )

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that fits."""
        return self.shapes[-1].length

    def pieces(self, batch: int, length: int) -> Iterator[tuple[slice, Shape]]:
        """Sequences of the batch that run together, and the shape that they are padded to.

        Raises `InvalidRequest` if a sequence is longer than the longest shape.
        """
        fitting = min((shape.length for shape in self.shapes if shape.length >= length), default=None)
        if fitting is None:
            raise InvalidRequest(
                f"input_ids must be at most {self.longest} tokens long (target.compile_shapes), got {length}"
            )
        candidates = [shape for shape in self.shapes if shape.length == fitting]
        start = 0
        while start < batch:
            shape = next((shape for shape in candidates if shape.batch >= batch - start), candidates[-1])
            yield slice(start, min(start + shape.batch, batch)), shape
            start += shape.batch


class CompiledForward:
    """The base model with a compiled `forward` in every decoder layer."""

    def __init__(
        self, attention: ChatAttention, layers: nn.ModuleList, buckets: Buckets, *, packed: bool, mode: str
    ) -> None:
        """`attention`: of the base model; `packed`: whether rows may hold several chats; `mode`: as of `torch.compile`."""
        self._attention, self._layers, self._buckets, self._packed = attention, layers, buckets, packed
        self._mode = mode
        self._forwards = [
            torch.compile(layer.forward, dynamic=False, fullgraph=True, backend=_BACKEND, mode=mode)
            for layer in layers
        ]

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence that it takes."""
        return self._buckets.longest

    @property
    def form(self) -> str:
        """What was compiled, for `ModelInfo.form`."""
        return f"compiled ({self._mode}) for {' '.join(map(str, self._buckets.shapes))}"

    @torch.inference_mode()
    def compile(self, device: torch.device) -> None:
        """Runs every form once, which compiles it, and says how far it is.

        Raises `UnsupportedTarget` if the layers cannot be compiled whole or come in more kinds than can be waited for.
        """
        started = time.monotonic()
        kind = type(self._layers[0]).__name__
        forms = [
            (shape, packed)
            for shape in self._buckets.shapes
            for packed in ((False, True) if self._packed else (False,))
        ]
        limit = len(forms) * _KINDS_OF_LAYERS
        limits = {
            "recompile_limit": limit,
            "accumulated_recompile_limit": limit,
            "fail_on_recompile_limit_hit": True,
        }
        for number, (shape, packed) in enumerate(forms, start=1):
            logger.info(
                "compiling %s for shape %d of %d, %s%s",
                kind,
                number,
                len(forms),
                shape,
                " packed" if packed else "",
            )
            ids_BT = torch.zeros(shape, dtype=torch.int64, device=device)
            try:
                with torch._dynamo.config.patch(limits), self._in_place():
                    # Zeros as positions: every token is a chat of its own.
                    self._attention.run(
                        ids_BT, torch.zeros(shape, dtype=torch.int64) if packed else None, compiled=True
                    )
            except (TorchDynamoException, FailOnRecompileLimitHit) as error:
                raise UnsupportedTarget(
                    f"{kind} must compile whole and alike in all layers, or target.compile_shapes be empty: {error}"
                ) from error
        logger.info("compiled %d shapes in %.1f s", len(forms), time.monotonic() - started)

    def run(self, input_ids: Tensor, positions_BT: Tensor | None, aux: AuxStates) -> Tensor:
        """Last hidden states [B, T, H] of [B, T] ids, padded on the right; `positions_BT` as of `ChatAttention.run`.

        Raises `InvalidRequest` for what no compiled form takes, `TargetFailed` where one would be compiled again.
        """
        batch, length = input_ids.shape
        pieces = []
        with self._compiled_only():
            for rows, shape in self._buckets.pieces(batch, length):
                aux.rows = rows
                positions = self._positions(positions_BT, rows, shape)
                last_hidden_BTH = self._attention.run(
                    _padded(input_ids[rows], shape), positions, compiled=True
                )
                pieces.append(last_hidden_BTH[: rows.stop - rows.start, :length])
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces)

    def _positions(self, positions_BT: Tensor | None, rows: slice, shape: Shape) -> Tensor | None:
        if positions_BT is None:
            return None
        positions_BT = positions_BT[rows]
        if not (self._packed or are_plain(positions_BT)):
            raise InvalidRequest(
                "segment_ids must be absent where target.compile_packed is false, got packed chats"
            )
        batch, length = positions_BT.shape
        # Padding on the right is one more chat, a plain row remains one.
        index_L = torch.arange(shape.length - length) + (length if are_plain(positions_BT) else 0)
        padded_BT = torch.cat((positions_BT, index_L.expand(batch, -1)), dim=1)
        return torch.cat((padded_BT, torch.arange(shape.length).expand(shape.batch - batch, -1)))

    @contextmanager
    def _compiled_only(self) -> Iterator[None]:
        try:
            with torch._dynamo.config.patch(error_on_recompile=True), self._in_place():
                yield
        except RecompileError as error:
            raise TargetFailed(
                f"the compiled target met a form that was not compiled at its start: {error}"
            ) from error

    @contextmanager
    def _in_place(self) -> Iterator[None]:
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

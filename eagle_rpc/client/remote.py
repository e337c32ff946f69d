"""The target as a trainer uses it when it runs in other processes."""

import itertools
import logging
import time
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from eagle_rpc.client.replica import PendingSupervision, Replica
from eagle_rpc.client.routing import Router
from eagle_rpc.errors import EagleRpcError, TargetMismatch
from eagle_rpc.supervision import (
    DraftHead,
    Eagle3TargetBatch,
    ModelInfo,
    SessionSpec,
    TargetExpectation,
    TokenBatch,
    VocabMapping,
    decode_supervision,
)

logger = logging.getLogger(__name__)


class RemoteEagle3TargetModel:
    """Satisfies `Eagle3TargetBackend` with one or more target servers over RPC.

    Args:
        workers: RPC names of the targets.
        trainer: this worker's name; `index` its number among the trainers, which spreads their first requests.
        encoding, rows: how supervision travels and which rows carry it.
        prefetch: requests under way at a time while streaming (> 0).
        expected: what the draft requires of the target.
        device: where decoded batches go.
        request_timeout: seconds a request may take, queue included.
    """

    def __init__(
        self,
        workers: Sequence[str],
        *,
        trainer: str,
        index: int,
        job: str,
        encoding: str,
        rows: str,
        prefetch: int,
        expected: TargetExpectation,
        device: torch.device,
        request_timeout: float,
    ) -> None:
        self._replicas = [Replica(worker, request_timeout=request_timeout) for worker in workers]
        self._router = Router(self._replicas, offset=index)
        self._trainer = trainer
        self._job = job
        self._encoding = encoding
        self._rows = rows
        self._prefetch = prefetch
        self._expected = expected
        self._device = device
        self._head: DraftHead | None = None
        self._request_numbers = itertools.count()
        self._seconds_waited = 0.0
        self._info = self._check_replicas()

    def _check_replicas(self) -> ModelInfo:
        """Raises `TargetMismatch` for a foreign target, or for replicas that do not hold the same model."""
        infos = {replica.name: replica.model_info() for replica in self._replicas}
        for info in infos.values():
            self._expected.check(info)
        (first_name, first), *others = infos.items()
        for name, info in others:
            if replace(info, incarnation=first.incarnation) != first:
                raise TargetMismatch(f"{name} must serve the same model as {first_name} ({first}), it has {info}")
        return first

    def model_info(self) -> ModelInfo:
        return self._info

    def input_embeddings(self) -> Tensor:
        return self._replicas[0].input_embeddings()

    def open_session(self, mapping: VocabMapping) -> None:
        """Registers the mapping at every replica; `hidden` needs the head's draft rows as well."""
        spec = SessionSpec(
            selected_token_ids=mapping.selected_token_ids,
            encoding=self._encoding,
            rows=self._rows,
            expected=self._expected,
            job=self._job,
            trainer=self._trainer,
        )
        for replica in self._replicas:
            replica.open_session(spec)
        self._head = None
        if self._encoding == "hidden":
            self.output_embeddings()

    def output_embeddings(self) -> DraftHead:
        """The head's draft rows, on the trainer's device; fetched once a session."""
        if self._head is None:
            self._head = self._replicas[0].output_embeddings().to(self._device)
        return self._head

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> Eagle3TargetBatch:
        tokens = TokenBatch(input_ids=input_ids, attention_mask=attention_mask, loss_mask=loss_mask, segment_ids=segment_ids)
        return self._receive(tokens, self._send(tokens))

    def stream(self, batches: Iterable[TokenBatch]) -> Iterator[Eagle3TargetBatch]:
        """Yields in order; keeps `prefetch` requests under way. Closing the iterator gives up those that are."""
        source = iter(batches)
        under_way: deque[tuple[TokenBatch, PendingSupervision]] = deque()
        try:
            while True:
                while len(under_way) < self._prefetch and (tokens := next(source, None)) is not None:
                    under_way.append((tokens, self._send(tokens)))
                if not under_way:
                    return
                yield self._receive(*under_way.popleft())
        finally:
            for _, pending in under_way:
                pending.abandon()

    def _send(self, tokens: TokenBatch) -> PendingSupervision:
        request_id = f"{self._trainer}-{next(self._request_numbers)}"
        return self._router.choose().generate(request_id, tokens)

    def _receive(self, tokens: TokenBatch, pending: PendingSupervision) -> Eagle3TargetBatch:
        started = time.monotonic()
        encoded = pending.result()
        self._seconds_waited += time.monotonic() - started
        return decode_supervision(
            encoded.to(self._device), tokens.to(self._device), self._head if self._encoding == "hidden" else None
        )

    @property
    def seconds_waited(self) -> float:
        return self._seconds_waited

    def close(self) -> None:
        """Ends the sessions at all replicas; raises nothing, since what went wrong before matters more."""
        for replica in self._replicas:
            try:
                replica.disconnect()
            except EagleRpcError as error:
                logger.warning("the session at %s was not ended: %s", replica.name, error)

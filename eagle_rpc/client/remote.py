"""The target as a trainer uses it when it runs in other processes."""

import threading
import time
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.client.dispatch import Dispatcher
from eagle_rpc.client.fleet import Fleet
from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.client.ticket import Ticket
from eagle_rpc.rpc import Membership
from eagle_rpc.supervision import (
    DraftHead,
    Eagle3TargetBatch,
    ModelInfo,
    SessionSpec,
    TargetExpectation,
    TokenBatch,
    VocabMapping,
    decode_supervision,
    to_device,
)


class RemoteEagle3TargetModel:
    """Satisfies `Eagle3TargetBackend` with the target servers that `membership` knows, over RPC.

    Targets may come, go and return meanwhile: batches arrive in order, each once, with the same bits from whichever target.
    """

    def __init__(
        self,
        membership: Membership,
        *,
        settings: ClientSettings,
        expected: TargetExpectation,
        device: torch.device,
        stop: threading.Event,
    ) -> None:
        """`expected`: what the draft requires of the target; `device`: where decoded batches go; `stop`: once set, waiting ends.

        Raises `TargetMismatch` for a foreign target or replicas that differ, `TargetUnavailable` if there is none in time.
        """
        self._settings = settings
        self._expected = expected
        self._device = device
        self._head: DraftHead | None = None
        self._seconds_waited = 0.0
        self._fleet = Fleet(membership, expected, settings, stop)
        self._dispatcher = Dispatcher(self._fleet, settings, stop)
        try:
            self._info = self._fleet.connect()
        except BaseException:
            self.close()
            raise

    def model_info(self) -> ModelInfo:
        return self._info

    def input_embeddings(self) -> Tensor:
        return self._fleet.ask(lambda replica: replica.input_embeddings(), "its input embeddings")

    def open_session(self, mapping: VocabMapping) -> None:
        """Registers the mapping at every target; `hidden` needs the head's draft rows as well."""
        spec = SessionSpec(
            selected_token_ids=mapping.selected_token_ids,
            encoding=self._settings.encoding,
            rows=self._settings.rows,
            expected=self._expected,
            job=self._settings.job,
            trainer=self._settings.trainer,
        )
        self._fleet.open_sessions(spec)
        self._head = None
        if self._settings.encoding == "hidden":
            self.output_embeddings()

    def output_embeddings(self) -> DraftHead:
        """The head's draft rows, on the trainer's device; fetched once a session."""
        if self._head is None:
            head = self._fleet.ask(lambda replica: replica.output_embeddings(), "the draft rows of its head")
            self._head = head.to(self._device)
        return self._head

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> Eagle3TargetBatch:
        tokens = TokenBatch(
            input_ids=input_ids, attention_mask=attention_mask, loss_mask=loss_mask, segment_ids=segment_ids
        )
        return self._receive(self._dispatcher.submit(tokens))

    def stream(self, batches: Iterable[TokenBatch]) -> Iterator[Eagle3TargetBatch]:
        """Yields in order; keeps `prefetch` requests under way. Closing the iterator gives up those that are."""
        source = iter(batches)
        under_way: deque[Ticket] = deque()
        try:
            while True:
                while len(under_way) < self._settings.prefetch and (tokens := next(source, None)) is not None:
                    under_way.append(self._dispatcher.submit(tokens))
                if not under_way:
                    return
                yield self._receive(under_way.popleft())
        finally:
            self._dispatcher.abandon(list(under_way))

    def _receive(self, ticket: Ticket) -> Eagle3TargetBatch:
        started = time.monotonic()
        encoded = self._dispatcher.wait(ticket)
        self._seconds_waited += time.monotonic() - started
        encoded = encoded.map_tensors(lambda tensor: to_device(tensor, self._device))
        return decode_supervision(
            encoded, ticket.tokens, self._head if self._settings.encoding == "hidden" else None
        )

    @property
    def seconds_waited(self) -> float:
        return self._seconds_waited

    def status(self) -> dict[str, Any]:
        """What this trainer thinks of its targets, as JSON takes it."""
        targets = [
            {
                "name": replica.name,
                "incarnation": replica.info.incarnation,
                "state": replica.state,
                "outstanding": replica.num_outstanding,
                "seconds_per_request": replica.seconds_per_request,
            }
            for replica in self._fleet.replicas()
        ]
        return {"failovers": self._dispatcher.num_failovers, "targets": targets}

    def close(self) -> None:
        """Ends the sessions at all targets; raises nothing, since what went wrong before matters more."""
        self._dispatcher.close()
        self._fleet.close()

"""The target in other processes, as a trainer uses it."""

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import astuple, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.client.dispatcher import Dispatcher, PendingRequest
from eagle_rpc.client.fleet import Fleet
from eagle_rpc.client.host_copies import HostCopies
from eagle_rpc.client.settings import ClientSettings
from eagle_rpc.errors import EagleRpcError, PayloadRefused
from eagle_rpc.rpc import Membership
from eagle_rpc.supervision import (
    ENCODINGS,
    DraftHead,
    Eagle3TargetBatch,
    EncodedSupervision,
    ModelInfo,
    RequestTimes,
    RequestTotals,
    ServiceTimes,
    SessionSpec,
    TargetExpectation,
    TokenBatch,
    VocabMapping,
    decode_supervision,
    times_of,
    to_device,
    waits_of,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class DecodedRequest:
    """A request whose batch the trainer has."""

    id: str
    target: str  # that answered it
    submitted: float  # by time.monotonic
    times: RequestTimes
    num_bytes: int  # of the reply


class RemoteTargets:
    """All target servers of `membership`. They may come, go and return."""

    def __init__(
        self,
        membership: Membership,
        *,
        settings: ClientSettings,
        expected: TargetExpectation,
        stop: threading.Event,
    ) -> None:
        """Waits for a target. `stop`: once set, waiting ends.

        Raises `TargetMismatch` for a target that differs from `expected` or from the others,
        `TargetUnavailable` after the reconnect deadline.
        """
        self._settings, self._expected, self._stop = settings, expected, stop
        self._fleet = Fleet(membership, expected, settings, stop)
        self._dispatcher = Dispatcher(self._fleet, settings, stop)
        try:
            self._info = self._fleet.connect()
        except BaseException:
            # Also after Ctrl-C during the wait: the threads must end.
            self.close()
            raise

    def model_info(self) -> ModelInfo:
        """The identity and limits that all targets share."""
        return self._info

    def status(self) -> dict[str, Any]:
        """The targets as this trainer sees them, in types that JSON has."""
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

    def reports(self) -> dict[str, dict[str, Any]]:
        """What each target that answers now says about itself, by its name."""
        found = dict[str, dict[str, Any]]()
        for replica in self._fleet.replicas():
            if replica.silent:
                continue
            with contextlib.suppress(EagleRpcError):
                found[replica.name] = replica.status()
        return found

    def close(self) -> None:
        """Ends the sessions at all targets. Raises nothing, so that an earlier error is not hidden."""
        self._dispatcher.close()
        self._fleet.close()


class RemoteEagle3TargetModel(RemoteTargets):
    """An `Eagle3TargetBackend` over RPC: batches in order, each once, the same bits from every target."""

    def __init__(
        self,
        membership: Membership,
        *,
        settings: ClientSettings,
        expected: TargetExpectation,
        device: torch.device,
        stop: threading.Event,
    ) -> None:
        """As `RemoteTargets`. `device`: of decoded batches."""
        self._device = device
        self._copies = HostCopies(settings.shared_dir, patience=settings.patience, stop=stop)
        self._head: DraftHead | None = None
        self._mapping_digest = ""
        self._totals = RequestTotals()
        self.when_decoded: Callable[[DecodedRequest], None] | None = None
        """Gets each request of supervision after its batch was decoded, on the caller's thread."""
        super().__init__(membership, settings=settings, expected=expected, stop=stop)

    def input_embeddings(self) -> Tensor:
        """The token embedding [V, H] on the CPU, the start of the draft's; shared with other trainers of the host."""
        what = "its input embeddings"

        def fetch() -> dict[str, Tensor]:
            return {"weight": self._fleet.ask(lambda replica: replica.input_embeddings(), what)}

        return self._copies.take("the target's embedding", ["embedding", *self._identity], fetch)["weight"]

    def open_session(self, mapping: VocabMapping) -> None:
        """Opens a session at every target, and fetches the head's draft rows if the encoding needs them."""
        settings = self._settings.session
        self._fleet.open_sessions(SessionSpec.of(settings, mapping.selected_token_ids, self._expected))
        self._head, self._mapping_digest = None, mapping.digest
        if ENCODINGS[settings.encoding].needs_head:
            self.output_embeddings()

    def output_embeddings(self) -> DraftHead:
        """The head's draft rows on the trainer's device, taken once a session."""
        if self._head is None:
            what = "the draft rows of its head"

            def fetch() -> dict[str, Tensor]:
                return self._fleet.ask(lambda replica: replica.output_embeddings(), what).to_tensors()

            identity = ["head", self._mapping_digest, *self._identity]
            rows = self._copies.take("the target's head rows", identity, fetch)
            self._head = DraftHead.of_tensors(rows).to(self._device)
        return self._head

    def release_host_copies(self) -> None:
        """Once all trainers of the host have embedding and head rows: a trainer on a GPU gives up the host's copy.

        On the CPU the copy stays in use until `close`.
        """
        if self._device.type != "cpu":
            self._copies.release()

    @property
    def _identity(self) -> tuple[object, ...]:
        """Equal for targets with the same weights."""
        return astuple(replace(self._info, incarnation=""))

    def generate_batch(
        self, input_ids: Tensor, attention_mask: Tensor, loss_mask: Tensor, segment_ids: Tensor | None = None
    ) -> Eagle3TargetBatch:
        """Supervision of one batch of [B, T] tensors; raises `InvalidRequest` for a bad one."""
        tokens = TokenBatch(
            input_ids=input_ids, attention_mask=attention_mask, loss_mask=loss_mask, segment_ids=segment_ids
        )
        return self._receive(self._dispatcher.submit(tokens))

    def stream(self, batches: Iterable[TokenBatch]) -> Iterator[Eagle3TargetBatch]:
        """Yields in order, with `prefetch` requests under way. Closing the iterator abandons those."""
        source = iter(batches)
        under_way: deque[PendingRequest] = deque()
        try:
            while True:
                while len(under_way) < self._settings.prefetch and (tokens := next(source, None)) is not None:
                    under_way.append(self._dispatcher.submit(tokens))
                if not under_way:
                    return
                yield self._receive(under_way.popleft())
        finally:
            self._dispatcher.abandon(list(under_way))

    def _receive(self, request: PendingRequest) -> Eagle3TargetBatch:
        started = time.monotonic()
        encoded = self._dispatcher.wait(request)
        waited = time.monotonic() - started
        assert isinstance(request.content, TokenBatch) and isinstance(encoded, EncodedSupervision)
        if not isinstance(encoded.times, ServiceTimes):
            raise PayloadRefused(f"the reply to request {request.id} must have its times, got none")
        encoded.times.check()
        decoding = time.monotonic()
        on_device = encoded.map_tensors(lambda tensor: to_device(tensor, self._device))
        batch = decode_supervision(on_device, request.content, self._head)
        self._note(request, encoded, waited=waited, decode=time.monotonic() - decoding)
        return batch

    def _note(
        self, request: PendingRequest, encoded: EncodedSupervision, *, waited: float, decode: float
    ) -> None:
        trip = request.trip
        assert trip is not None and encoded.times is not None, "the request is answered"
        times = times_of(
            encoded.times,
            client=trip.sent - request.submitted,
            round_trip=trip.received - trip.sent,
            decode=decode,
        )
        self._totals = self._totals.plus(RequestTotals(1, times, waits_of(waited, times)))
        if self.when_decoded is not None:
            self.when_decoded(
                DecodedRequest(
                    id=request.id,
                    target=trip.target,
                    submitted=request.submitted,
                    times=times,
                    num_bytes=encoded.num_bytes,
                )
            )

    def close(self) -> None:
        """As `RemoteTargets.close`; gives up the host's copies as well."""
        super().close()
        self._copies.release()

    @property
    def totals(self) -> RequestTotals:
        """Where the time of all requests went since the start, and what the caller waited for."""
        return self._totals

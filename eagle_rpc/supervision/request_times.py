"""Where the time of a request went. Each side measures durations by its own clock, as clocks of hosts differ."""

import math
from dataclasses import dataclass
from typing import NamedTuple

from eagle_rpc.errors import PayloadRefused


@dataclass(frozen=True, kw_only=True, slots=True)
class ServiceTimes:
    """Seconds of a request at its target; they travel with the reply."""

    queue: float  # from its arrival until a device was free for it
    forward: float  # the layers, and the head on the rows that may be supervised
    encode: float  # the choice of rows, and copies to the host where the reply goes through it

    @property
    def total(self) -> float:
        """Seconds from the arrival of the request to the made reply."""
        return self.queue + self.forward + self.encode

    def check(self) -> None:
        """Raises `PayloadRefused` unless all are seconds: a peer may have written them."""
        for name in ("queue", "forward", "encode"):
            value = getattr(self, name)
            if type(value) is not float or not 0 <= value < math.inf:
                raise PayloadRefused(
                    f"{name} of a reply's times must be seconds from 0 on, got {value!r:.80}"
                )


class RequestTimes(NamedTuple):
    """Seconds of a request, or of several, from the trainer's wish to the decoded batch."""

    client: float = 0.0  # until a target had room for it, earlier tries included
    queue: float = 0.0
    forward: float = 0.0
    encode: float = 0.0
    wire: float = 0.0  # the way to the target and back
    decode: float = 0.0  # on a GPU without its own work, which goes on meanwhile


class Waits(NamedTuple):
    """Seconds that a trainer stood still, by what its request was doing then."""

    queue: float = 0.0  # the target, or every target, had other work
    compute: float = 0.0
    transfer: float = 0.0


def times_of(service: ServiceTimes, *, client: float, round_trip: float, decode: float) -> RequestTimes:
    """The times of one request; `round_trip`: seconds from sending it to the arrival of its reply."""
    return RequestTimes(
        client=client,
        queue=service.queue,
        forward=service.forward,
        encode=service.encode,
        wire=max(0.0, round_trip - service.total),
        decode=decode,
    )


def waits_of(seconds: float, times: RequestTimes) -> Waits:
    """What a request did in the last `seconds` before its reply was there.

    A request has a few KB, so all of `wire` counts as the way back.
    """
    transfer = min(seconds, times.wire)
    compute = min(seconds - transfer, times.forward + times.encode)
    return Waits(queue=seconds - transfer - compute, compute=compute, transfer=transfer)


class RequestTotals(NamedTuple):
    """Sums over requests. A new value replaces the old one, so other threads may read it."""

    requests: int = 0
    times: RequestTimes = RequestTimes()
    waits: Waits = Waits()

    @property
    def seconds_waited(self) -> float:
        """Seconds that the trainer stood still."""
        return sum(self.waits)

    def plus(self, other: "RequestTotals", sign: int = 1) -> "RequestTotals":
        """Both together."""
        times, waits = (
            [a + sign * b for a, b in zip(mine, its, strict=True)]
            for mine, its in ((self.times, other.times), (self.waits, other.waits))
        )
        return RequestTotals(self.requests + sign * other.requests, RequestTimes(*times), Waits(*waits))

    def minus(self, earlier: "RequestTotals") -> "RequestTotals":
        """What has come since `earlier`."""
        return self.plus(earlier, sign=-1)

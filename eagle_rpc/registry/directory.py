"""Who is there: the registry's rules, without sockets."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from eagle_rpc.errors import InvalidRequest, NameTaken
from eagle_rpc.registry.ids import IdFile
from eagle_rpc.registry.record import Record, encoded_list, encoded_record, encoded_sighting, outlined

logger = logging.getLogger(__name__)

# All records together, so that a listing fits into one reply.
MAX_LISTING_BYTES = 24 * 2**20
# A silent worker stays in the listing this many times to live, for people to see.
_REMEMBERED = 10


@dataclass(slots=True)
class _Entry:
    """What a worker announced last, as JSON too: written once for all who ask."""

    record: Record
    complete: bytes
    outline: bytes  # the record as its peers need it
    last_beat: float


class Directory:
    """Records by role, job and name. One living worker may have a place; one that is silent for `ttl` seconds is dead.

    A worker that was taken for dead keeps its place if nobody took it since. After a restart nothing is known, so for
    the first `ttl` seconds only workers that had their id before are let in: they may merely not have beaten yet.
    """

    def __init__(self, ids: IdFile, *, ttl: float, clock: Callable[[], float] = time.monotonic) -> None:
        self._ids = ids
        self._ttl = ttl
        self._clock = clock
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str, str], _Entry] = {}
        self._last_id_before = ids.last()
        # Nobody can be there yet if nobody ever got an id.
        self._newcomers_from = clock() + (ttl if self._last_id_before else 0.0)

    def new_id(self) -> int:
        """Raises `ConfigError` when all are used, `WaitTimeout` if another registry keeps the file locked."""
        return self._ids.next()

    def announce(self, record: Record) -> None:
        """Registers a worker or renews it. Raises `NameTaken` while another one holds its place."""
        complete, outline = encoded_record(record), encoded_record(outlined(record))
        with self._lock:
            now = self._clock()
            self._forget(now)
            held = self._entries.get(record.place)
            total = sum(len(entry.complete) for entry in self._entries.values() if entry is not held) + len(
                complete
            )
            if total > MAX_LISTING_BYTES:
                raise InvalidRequest(
                    f"all records together must have at most {MAX_LISTING_BYTES} bytes, {record.name} makes it {total}"
                )
            if held is None or held.record.incarnation != record.incarnation:
                self._check_admission(record, held, now)
            self._entries[record.place] = _Entry(record, complete, outline, now)

    def withdraw(self, incarnation: str) -> None:
        """Frees what this incarnation holds; nothing if it holds nothing."""
        with self._lock:
            for place, entry in list(self._entries.items()):
                if entry.record.incarnation == incarnation:
                    del self._entries[place]
                    logger.info("%s has left", entry.record)

    def excuse(self, seconds: float) -> None:
        """This process stood still for `seconds`, in which it could hear nobody: they count for nothing."""
        with self._lock:
            logger.warning("stood still for %.1f s", seconds)
            self._newcomers_from += seconds
            for entry in self._entries.values():
                entry.last_beat = min(entry.last_beat + seconds, self._clock())

    def sightings(self) -> bytes:
        """A JSON list of the living and, for a while, the silent with all that they tell; targets first, then by job and name."""
        with self._lock:
            now = self._clock()
            self._forget(now)
            return encoded_list(
                encoded_sighting(
                    entry.complete, seconds_silent=now - entry.last_beat, living=self._lives(entry, now)
                )
                for _, entry in sorted(self._entries.items())
            )

    def living(self) -> bytes:
        """A JSON list of the living as their peers need them, in the same order."""
        with self._lock:
            now = self._clock()
            return encoded_list(
                entry.outline for _, entry in sorted(self._entries.items()) if self._lives(entry, now)
            )

    def _lives(self, entry: _Entry, now: float) -> bool:
        return now - entry.last_beat < self._ttl

    def _check_admission(self, record: Record, held: _Entry | None, now: float) -> None:
        if held is not None and self._lives(held, now):
            raise NameTaken(
                f"{record.name} must be the name of one living {record.role}: {held.record} has it, "
                f"heard of {now - held.last_beat:.1f} s ago, dead after {self._ttl:g} s"
            )
        if record.id > self._last_id_before and now < self._newcomers_from:
            raise NameTaken(
                f"{record.name} may belong to a living {record.role} that a restarted registry has not heard of yet: "
                f"free in {self._newcomers_from - now:.1f} s"
            )
        if held is None:
            logger.info("%s has joined", record)
        else:
            logger.info(
                "%s has taken the place of %s, silent for %.1f s", record, held.record, now - held.last_beat
            )

    def _forget(self, now: float) -> None:
        for place, entry in list(self._entries.items()):
            if now - entry.last_beat >= _REMEMBERED * self._ttl:
                del self._entries[place]
                logger.info("%s is forgotten, silent for %.1f s", entry.record, now - entry.last_beat)

"""The rules of the registry, without sockets: who is let in, who lives, who is forgotten."""

import hashlib
import logging
import threading
import time
from collections.abc import Collection
from dataclasses import dataclass

from eagle_rpc.errors import InvalidRequest, NameTaken
from eagle_rpc.process.waiting import Clock
from eagle_rpc.registry.ids import IdFile
from eagle_rpc.registry.record import Record, Sighting, encoded_record, outlined

logger = logging.getLogger(__name__)

# All records together, so that a listing fits into one reply.
MAX_LISTING_BYTES = 24 * 2**20
# A silent worker stays in the listing for this many times to live.
_REMEMBERED = 10
# A running process looks at its clock more often than this.
_LONGEST_PAUSE = 1.5


class RunningClock:
    """Seconds in which this process ran; a pause, in which it could hear no worker, is left out.

    A pause shows in two looks more than `_LONGEST_PAUSE` seconds apart, so the server looks several times a
    second.
    """

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._last = clock()
        self._paused = 0.0

    def __call__(self) -> float:
        with self._lock:
            now = self._clock()
            pause, self._last = now - self._last, now
            if pause > _LONGEST_PAUSE:
                logger.warning("the registry stood still for %.1f s", pause)
                self._paused += pause
            return now - self._paused


@dataclass(slots=True)
class _Entry:
    """The last announcement of a worker."""

    record: Record
    size: int  # bytes of the record as JSON
    outline: bytes  # JSON for its peers, encoded once for all that ask
    last_beat: float


class Directory:
    """Records by role, run and name, one living worker each. A worker silent for `ttl` seconds is dead.

    A worker taken for dead keeps its place until another one takes it. A restarted registry knows nobody: for
    `ttl` seconds it lets in only workers with an id from before, since the others could take the name of a
    living worker that has not beaten yet.
    """

    def __init__(self, ids: IdFile, *, ttl: float, clock: Clock | None = None) -> None:
        """`clock` None: a `RunningClock`."""
        self.clock = clock or RunningClock()
        self.ids = ids
        self._ttl = ttl
        self._lock = threading.Lock()
        self._entries: dict[tuple[str, str, str], _Entry] = {}
        self._draining: set[str] = set()  # incarnations that are asked to leave
        # The answer of `living`, encoded once for all that ask until it changes.
        self._listing, self._digest, self._listed_until = b"", "", 0.0
        self._last_id_before = ids.last()
        # Without an id no worker can be there yet.
        self._newcomers_from = self.clock() + (ttl if self._last_id_before else 0.0)

    def announce(self, record: Record) -> bool:
        """Registers or renews a worker; whether it is asked to drain and leave.

        Raises `NameTaken`, or `InvalidRequest` for too large records.
        """
        size, outline = len(encoded_record(record)), encoded_record(outlined(record))
        with self._lock:
            now = self.clock()
            self._forget_silent(now)
            held = self._entries.get(record.place)
            total = size + sum(entry.size for entry in self._entries.values() if entry is not held)
            if total > MAX_LISTING_BYTES:
                rule = f"all records together must have at most {MAX_LISTING_BYTES} bytes"
                raise InvalidRequest(f"{rule}, {record.name} makes it {total}")
            if held is None or held.record.incarnation != record.incarnation:
                self._check_admission(record, held, now)
            if held is None or held.outline != outline or not self._lives(held, now):
                self._listed_until = 0.0
            self._entries[record.place] = _Entry(record, size, outline, now)
            return record.incarnation in self._draining

    def drain(self, incarnations: Collection[str]) -> None:
        """Asks these workers to drain and leave, with the answer to their next announcement.

        Raises `InvalidRequest` if one of them is a trainer. Those that are not here have left.
        """
        with self._lock:
            here = {entry.record.incarnation: entry.record for entry in self._entries.values()}
            known = [here[one] for one in incarnations if one in here]
            for record in known:
                if record.role == "trainer":
                    raise InvalidRequest(f"only targets and stages are drained, {record.name} is a trainer")
            for record in known:
                if record.incarnation not in self._draining:
                    logger.info("%s is asked to drain", record)
            self._draining = (self._draining & here.keys()) | {record.incarnation for record in known}

    def withdraw(self, incarnation: str) -> None:
        """Removes the record of this incarnation, if there is one."""
        with self._lock:
            for place, entry in list(self._entries.items()):
                if entry.record.incarnation == incarnation:
                    del self._entries[place]
                    self._listed_until = 0.0
                    logger.info("%s has left", entry.record)

    def sightings(self) -> list[Sighting]:
        """All living and, for a while, silent workers; targets first, then by run and name."""
        with self._lock:
            now = self.clock()
            self._forget_silent(now)
            return [
                Sighting(record=one.record, seconds_silent=now - one.last_beat, living=self._lives(one, now))
                for one in self._sorted()
            ]

    def living(self, known: str = "") -> bytes:
        """JSON of the living workers: `digest`, and `records`, their outlines in the order of `sightings`.

        `records` is null if `known` is the digest: who asks every second mostly knows the answer.
        """
        with self._lock:
            now = self.clock()
            if now >= self._listed_until:
                living = [one for one in self._sorted() if self._lives(one, now)]
                self._listing = b"[%b]" % b",".join(one.outline for one in living)
                self._digest = hashlib.sha256(self._listing).hexdigest()
                # Until then nobody can die.
                self._listed_until = min((one.last_beat for one in living), default=now) + self._ttl
            records = b"null" if known == self._digest else self._listing
            return b'{"digest":"%b","records":%b}' % (self._digest.encode(), records)

    def _sorted(self) -> list[_Entry]:
        return sorted(self._entries.values(), key=lambda one: one.record.place)

    def _lives(self, entry: _Entry, now: float) -> bool:
        return now - entry.last_beat < self._ttl

    def _check_admission(self, record: Record, held: _Entry | None, now: float) -> None:
        """Raises `NameTaken` if a living worker has, or may have, the place of `record`."""
        if held is not None and self._lives(held, now):
            rule = f"{record.name} must be the name of one living {record.role}"
            heard = f"heard of {now - held.last_beat:.1f} s ago, dead after {self._ttl:g} s"
            raise NameTaken(f"{rule}: {held.record} has it, {heard}")
        if record.id > self._last_id_before and now < self._newcomers_from:
            holder = f"a living {record.role} that a restarted registry has not heard of yet"
            wait = self._newcomers_from - now
            raise NameTaken(f"{record.name} may belong to {holder}: free in {wait:.1f} s")
        if held is None:
            logger.info("%s has joined", record)
        else:
            silent = now - held.last_beat
            logger.info("%s has taken the place of %s, silent for %.1f s", record, held.record, silent)

    def _forget_silent(self, now: float) -> None:
        for place, entry in list(self._entries.items()):
            if now - entry.last_beat >= _REMEMBERED * self._ttl:
                del self._entries[place]
                logger.info("%s is forgotten, silent for %.1f s", entry.record, now - entry.last_beat)

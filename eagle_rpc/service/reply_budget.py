"""The memory that replies take: promised when a request is accepted, held until RPC has let go of the tensors.

RPC copies no tensor: a reply's storages live until they are on the wire, for a stopped receiver for as long as it stands
still. Nobody is told when they go, so they are looked at through weak references.
"""

import dataclasses
import threading
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from eagle_rpc.errors import InvalidRequest, TargetBusy

# Seconds between two looks at replies that are being sent.
_LOOK_INTERVAL = 0.01


@dataclass(eq=False, slots=True)
class ReplyBytes:
    """The bytes of one reply; as many as it may take until it is made, then as many as it takes."""

    session: str
    job: str
    num_bytes: int
    storages: list[StorageWeakRef] | None = None  # None until it is made


class ReplyBudget:
    """Bytes of replies that were promised, or made and not yet sent, within a bound for each session and one for all."""

    def __init__(self, *, max_bytes: int, max_bytes_per_session: int) -> None:
        self._max_bytes = max_bytes
        self._max_bytes_per_session = max_bytes_per_session
        self._lock = threading.Lock()
        self._made: list[ReplyBytes] = []
        self._total = 0
        self._of_session: Counter[str] = Counter()
        self._of_job: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Bytes promised or not yet sent, over all sessions, closed ones included."""
        with self._lock:
            self._let_go_of_sent()
            return self._total

    def held_of(self, session: str) -> int:
        """The same of one session."""
        with self._lock:
            return self._of_session[session]

    def promise(self, num_bytes: int, *, job: str, session: str, num_jobs: int) -> ReplyBytes:
        """Takes `num_bytes` for a reply that will be made; `fulfil` or `release` must follow.

        Raises `InvalidRequest` for more than could ever be had; `TargetBusy` where the bound of the session, of all, or among
        `num_jobs` the job's equal share, which a job that holds nothing may exceed, leaves less at the moment.
        """
        for name, bound in (
            ("max_reply_bytes_per_session", self._max_bytes_per_session),
            ("max_reply_bytes", self._max_bytes),
        ):
            if num_bytes > bound:
                raise InvalidRequest(
                    f"the reply would need {num_bytes} bytes, target.{name} is {bound}; send fewer tokens at a time"
                )
        promised = ReplyBytes(session, job, num_bytes)
        with self._lock:
            if self._lack(promised, num_jobs) is not None:
                self._let_go_of_sent()
            lack = self._lack(promised, num_jobs)
            if lack is not None:
                raise TargetBusy(lack)
            self._count(promised, num_bytes)
        return promised

    def _lack(self, wanted: ReplyBytes, num_jobs: int) -> str | None:
        """Which bound leaves too little, or None."""
        of_session, of_job, share = (
            self._of_session[wanted.session],
            self._of_job[wanted.job],
            self._max_bytes // num_jobs,
        )
        if of_session + wanted.num_bytes > self._max_bytes_per_session:
            whose, held, bound = (
                "the session's",
                of_session,
                f"target.max_reply_bytes_per_session is {self._max_bytes_per_session}",
            )
        elif self._total + wanted.num_bytes > self._max_bytes:
            whose, held, bound = "all", self._total, f"target.max_reply_bytes is {self._max_bytes}"
        elif of_job and of_job + wanted.num_bytes > share:
            whose, held, bound = (
                "the job's",
                of_job,
                f"its share of target.max_reply_bytes among {num_jobs} jobs is {share}",
            )
        else:
            return None
        return f"{whose} unsent replies take {held} bytes, this one would take {wanted.num_bytes}, {bound}"

    def fulfil(self, promised: ReplyBytes, value: Any) -> None:
        """The reply is made: from now on it counts for the memory of the tensors in the dataclass `value`, while they live."""
        storages = {
            storage._cdata: storage for storage in (tensor.untyped_storage() for tensor in _tensors_of(value))
        }
        num_bytes = sum(storage.nbytes() for storage in storages.values())
        with self._lock:
            self._count(promised, num_bytes - promised.num_bytes)
            promised.num_bytes = num_bytes
            promised.storages = [StorageWeakRef(storage) for storage in storages.values()]
            self._made.append(promised)

    def release(self, promised: ReplyBytes) -> None:
        """The reply will not be made."""
        with self._lock:
            self._count(promised, -promised.num_bytes)

    def wait_sent(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds until nothing is held; whether that came about."""
        until = time.monotonic() + timeout
        while self.held:
            if time.monotonic() >= until:
                return False
            time.sleep(_LOOK_INTERVAL)
        return True

    def _let_go_of_sent(self) -> None:
        waiting = []
        for made in self._made:
            if all(storage.expired() for storage in made.storages or ()):
                self._count(made, -made.num_bytes)
            else:
                waiting.append(made)
        self._made = waiting

    def _count(self, reply: ReplyBytes, num_bytes: int) -> None:
        self._total += num_bytes
        for counter, key in ((self._of_session, reply.session), (self._of_job, reply.job)):
            counter[key] += num_bytes
            if counter[key] == 0:
                del counter[key]


def _tensors_of(value: Any) -> Iterable[Tensor]:
    members = (getattr(value, field.name) for field in dataclasses.fields(value))
    return [member for member in members if isinstance(member, Tensor)]

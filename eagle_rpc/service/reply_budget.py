"""The memory of replies: promised when a request is accepted, held until RPC has dropped the tensors.

RPC copies no tensor. A reply's storages live until they are on the wire; a receiver that stands still keeps
them alive. Nothing tells when a storage is freed, so weak references are looked at.
"""

import dataclasses
import threading
import time
from collections import Counter
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import InvalidRequest, TargetBusy
from eagle_rpc.process.waiting import BoundedWait
from eagle_rpc.service.fairness import Demand

# Seconds between two looks at replies that are being sent.
_LOOK_INTERVAL = 0.01


@dataclass(eq=False, slots=True)
class ReplyBytes:
    """The bytes of one reply: an upper bound until it is made, then its true size."""

    session: str
    run: str
    num_bytes: int
    storages: list[StorageWeakRef] | None = None  # None until it is made


class ReplyBudget:
    """Bytes of replies that were promised, or made and not yet sent; bounded for each session and in all."""

    def __init__(self, config: TargetConfig, demand: Demand) -> None:
        self._max_bytes = config.max_reply_bytes
        self._max_bytes_per_session = config.max_reply_bytes_per_session
        self._demand = demand
        self._lock = threading.Lock()
        self._made: list[ReplyBytes] = []
        self._total = 0
        self._of_session: Counter[str] = Counter()
        self._of_run: Counter[str] = Counter()

    @property
    def held(self) -> int:
        """Bytes promised or not yet sent, over all sessions, closed ones included."""
        with self._lock:
            self._release_sent()
            return self._total

    def held_of(self, session: str) -> int:
        """The same of one session."""
        with self._lock:
            return self._of_session[session]

    def quota(self, run: str) -> int | None:
        """Bytes that the run may hold at most; None: it has no quota of its own."""
        share = self._demand.quotas.of(run).reply_share
        return None if share is None else int(share * self._max_bytes)

    def promise(self, num_bytes: int, *, run: str, session: str) -> ReplyBytes:
        """Reserves `num_bytes` for a reply; `fulfil` or `release` must follow.

        Raises `InvalidRequest` if a bound is smaller than `num_bytes`, and `TargetBusy` if too little is free
        of the session's bound, of the bound of all, of the run's quota, or of its equal share, which a run that
        holds nothing may exceed.
        """
        quota = self.quota(run)
        for name, bound in (
            ("max_reply_bytes_per_session", self._max_bytes_per_session),
            ("max_reply_bytes", self._max_bytes),
            ("quotas", self._max_bytes if quota is None else quota),
        ):
            if num_bytes > bound:
                need = f"the reply would need {num_bytes} bytes, target.{name} is {bound}"
                raise InvalidRequest(f"{need}; send fewer tokens at a time")
        promised, num_runs = ReplyBytes(session, run, num_bytes), self._demand.note(run)
        with self._lock:
            if self._over_quota(promised) or self._lack(promised, num_runs):
                self._release_sent()
            if rule := self._over_quota(promised):
                raise self._demand.quotas.refusal(run, rule)
            if lack := self._lack(promised, num_runs):
                raise TargetBusy(lack)
            self._count(promised, num_bytes)
        return promised

    def _over_quota(self, wanted: ReplyBytes) -> str:
        """The rule that the run would break; empty if it breaks none."""
        quota, held = self.quota(wanted.run), self._of_run[wanted.run]
        if quota is None or held + wanted.num_bytes <= quota:
            return ""
        found = f"holds {held} and would need {wanted.num_bytes} more"
        return f"hold at most {quota} bytes of unsent replies, {found}"

    def _lack(self, wanted: ReplyBytes, num_runs: int) -> str:
        """The message for the bound that leaves too little; empty if there is room."""
        of_session, of_run = self._of_session[wanted.session], self._of_run[wanted.run]
        share = self._max_bytes // num_runs
        if of_session + wanted.num_bytes > self._max_bytes_per_session:
            bound = f"target.max_reply_bytes_per_session is {self._max_bytes_per_session}"
            whose, held = "the session's", of_session
        elif self._total + wanted.num_bytes > self._max_bytes:
            bound = f"target.max_reply_bytes is {self._max_bytes}"
            whose, held = "all", self._total
        elif of_run and of_run + wanted.num_bytes > share:
            bound = f"its share of target.max_reply_bytes among {num_runs} runs is {share}"
            whose, held = "the run's", of_run
        else:
            return ""
        return f"{whose} unsent replies take {held} bytes, this one would take {wanted.num_bytes}, {bound}"

    def fulfil(self, promised: ReplyBytes, value: Any) -> None:
        """Counts, from now on, the memory of the tensors in the dataclass `value`, while they live."""
        fields = (getattr(value, field.name) for field in dataclasses.fields(value))
        used = (field.untyped_storage() for field in fields if isinstance(field, Tensor))
        storages = {storage._cdata: storage for storage in used}
        num_bytes = sum(storage.nbytes() for storage in storages.values())
        with self._lock:
            self._count(promised, num_bytes - promised.num_bytes)
            promised.num_bytes = num_bytes
            promised.storages = [StorageWeakRef(storage) for storage in storages.values()]
            self._made.append(promised)

    def release(self, promised: ReplyBytes) -> None:
        """Ends a promise whose reply will not be made."""
        with self._lock:
            self._count(promised, -promised.num_bytes)

    def wait_sent(self, timeout: float) -> bool:
        """Waits up to `timeout` seconds until nothing is held; whether nothing is."""
        wait = BoundedWait("replies to be sent", timeout)
        while self.held:
            if wait.over:
                return False
            wait.say()
            time.sleep(_LOOK_INTERVAL)
        return True

    def _release_sent(self) -> None:
        waiting = []
        for made in self._made:
            if all(storage.expired() for storage in made.storages or ()):
                self._count(made, -made.num_bytes)
            else:
                waiting.append(made)
        self._made = waiting

    def _count(self, reply: ReplyBytes, num_bytes: int) -> None:
        self._total += num_bytes
        for counter, key in ((self._of_session, reply.session), (self._of_run, reply.run)):
            counter[key] += num_bytes
            if counter[key] == 0:
                del counter[key]

"""A stage behind the first one of a target: runs its layers on what the stage before hands it.

Plain logic without transport, as `TargetModelServer`. Everything crosses in host memory.
"""

import logging
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from eagle_rpc.config.schema import TargetConfig
from eagle_rpc.errors import (
    EagleRpcError,
    RequestExpired,
    StaleIncarnation,
    TargetBusy,
    TargetDraining,
    TargetFailed,
)
from eagle_rpc.process.waiting import Clock
from eagle_rpc.rpc import Link, ServiceCall
from eagle_rpc.service.arguments import check_type
from eagle_rpc.service.fairness import set_outcome
from eagle_rpc.service.forward_pass import outcome_of
from eagle_rpc.service.stage_pass import StageForwardPass
from eagle_rpc.supervision import (
    DraftHead,
    StageBeat,
    StageInfo,
    StagePass,
    StageShare,
    StageTarget,
)

logger = logging.getLogger(__name__)

# Passes that wait at a time; the first stage has far fewer under way.
_MOST_WAITING = 64
# Seconds between two looks at passes whose hidden states do not come.
_LOOK_INTERVAL = 0.5
_STOP_TIMEOUT = 30.0


@dataclass(eq=False, slots=True)
class _Waiting:
    """A pass of which the request, the hidden states or both have arrived."""

    deadline: float
    request: StagePass | None = None
    incoming: list[Tensor] | None = None
    abandoned: bool = False  # a stage before has failed in it
    answer: Future[StageShare] = field(default_factory=Future)

    @property
    def is_ready(self) -> bool:
        return self.request is not None and (self.incoming is not None or self.abandoned)


class StageServer:
    """One stage. It belongs to the chain that a first stage joined it to last; passes of others are refused."""

    device = torch.device("cpu")
    """Of its answers."""

    def __init__(
        self,
        target: StageTarget,
        config: TargetConfig,
        *,
        incarnation: str,
        connect_next: Callable[[str], Link] | None,
        pass_seconds: float,
        clock: Clock = time.monotonic,
    ) -> None:
        """`connect_next`: a link to the next stage, of the given incarnation; null for the last stage.

        `pass_seconds`: how long hidden states wait for their request and a request for its hidden states.
        """
        self._target, self._clock = target, clock
        self._pass = StageForwardPass(target, config)
        self._incarnation, self._connect_next = incarnation, connect_next
        self._pass_seconds = pass_seconds
        self._info = target.stage_info()
        self._changed = threading.Condition()
        self._chain = ""
        self._next: Link | None = None
        self._waiting: dict[int, _Waiting] = {}
        self._urgent: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._running = False
        self._stopping = False
        self._last_beat = clock()
        self.draining = False
        """Set by the process that serves: the first stage is told, and sends no further requests."""
        self.num_passes = 0
        self._thread = threading.Thread(target=self._serve, name="stage", daemon=True)
        self._thread.start()

    # --- for the first stage

    def stage_info(self) -> StageInfo:
        """What this stage is."""
        return self._info

    def join_chain(self, chain: str, incarnations: list[str]) -> Future[None]:
        """Belongs to `chain` from now on, and connects to the next stage. `incarnations`: of stages 1, 2, ...

        The future raises as `Membership.connect`.
        """
        check_type("chain", chain, str)
        check_type("incarnations", incarnations, list)
        return self._submit(lambda: self._join(chain, incarnations))

    def beat(self) -> StageBeat:
        """Tells the first stage that this one lives."""
        self._last_beat = self._clock()
        return StageBeat(incarnation=self._incarnation, chain=self._chain, draining=self.draining)

    def begin(self, request: StagePass) -> Future[StageShare]:
        """What this stage adds to the reply, once the hidden states are there.

        Raises `StaleIncarnation` for another chain; from the future also `RequestExpired`, `TargetOutOfMemory`,
        `TargetFailed`, and `TargetDraining` if the next stage cannot be reached.
        """
        check_type("request", request, StagePass)
        with self._changed:
            one = self._expected(request.chain, request.number)
            one.request, one.deadline = request, self._clock() + request.seconds_left
            self._changed.notify_all()
        return one.answer

    def draft_head(self, selected_token_ids: Tensor) -> DraftHead:
        """As `Eagle3Target.draft_head`, on the CPU."""
        return self._target.draft_head(selected_token_ids).to(self.device)

    def probe_head(self, selected_token_ids: Tensor) -> Future[None]:
        """As `Eagle3Target.probe_head`."""
        return self._submit(lambda: self._target.probe_head(selected_token_ids))

    # --- for the stage before

    def take(self, chain: str, number: int, incoming: list[Tensor] | None) -> None:
        """The hidden states of a pass, one tensor for each piece of its batch; null: a stage before has failed."""
        check_type("chain", chain, str)
        check_type("number", number, int)
        with self._changed:
            one = self._expected(chain, number)
            one.incoming, one.abandoned = incoming, incoming is None
            self._changed.notify_all()

    # --- for the process that serves

    @property
    def seconds_unattended(self) -> float:
        """Since a first stage was last heard of."""
        return self._clock() - self._last_beat

    @property
    def is_idle(self) -> bool:
        """Whether no pass runs or waits."""
        with self._changed:
            return not (self._running or self._waiting)

    def status(self) -> dict[str, Any]:
        """For the registry, in types that JSON has."""
        with self._changed:
            figures = {"queued": len(self._waiting), "running": int(self._running), "passes": self.num_passes}
        return {"draining": self.draining, "chain": self._chain[:8], **figures}

    def close(self) -> bool:
        """Ends the thread, and waiting passes with `TargetDraining`; whether it ended within 30 s."""
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        self._thread.join(_STOP_TIMEOUT)
        self._drop(lambda one: True, TargetDraining("this stage has stopped"))
        return not self._thread.is_alive()

    # --- the thread

    def _submit(self, run: Callable[[], Any]) -> Future[Any]:
        answer: Future[Any] = Future()
        with self._changed:
            self._urgent.append((run, answer))
            self._changed.notify_all()
        return answer

    def _expected(self, chain: str, number: int) -> _Waiting:
        if chain != self._chain:
            own = self._chain[:8] or "none"
            raise StaleIncarnation(f"the pass is of chain {chain[:8]}, this stage belongs to {own}")
        if number not in self._waiting:
            if len(self._waiting) >= _MOST_WAITING:
                raise TargetBusy(f"at most {_MOST_WAITING} passes must wait at a stage")
            self._waiting[number] = _Waiting(self._clock() + self._pass_seconds)
        return self._waiting[number]

    def _serve(self) -> None:
        while True:
            with self._changed:
                while not (self._stopping or self._urgent or self._first_ready() is not None):
                    self._changed.wait(_LOOK_INTERVAL)
                    self._expire()
                if self._stopping:
                    return
                urgent = self._urgent.popleft() if self._urgent else None
                number = None if urgent else self._first_ready()
                one = None if number is None else self._waiting.pop(number)
                self._running = one is not None
            if urgent:
                set_outcome(urgent[1], outcome_of(urgent[0]))
            if one is not None:
                self._run(one)
            with self._changed:
                self._running = False

    def _first_ready(self) -> int | None:
        return min((number for number, one in self._waiting.items() if one.is_ready), default=None)

    def _expire(self) -> None:
        now = self._clock()
        for number in [number for number, one in self._waiting.items() if one.deadline <= now]:
            late = RequestExpired("the hidden states of the stage before did not come in time")
            self._waiting.pop(number).answer.set_exception(late)

    def _drop(self, unwanted: Callable[[_Waiting], bool], reason: EagleRpcError) -> None:
        with self._changed:
            dropped = {number: one for number, one in self._waiting.items() if unwanted(one)}
            for number in dropped:
                del self._waiting[number]
        for one in dropped.values():
            one.answer.set_exception(reason)

    def _join(self, chain: str, incarnations: list[str]) -> None:
        with self._changed:
            self._chain = ""
        self._drop(lambda one: True, TargetDraining("this stage joins another chain"))
        if self._connect_next is not None:
            self._next = None
            self._next = self._connect_next(incarnations[self._info.number])
        with self._changed:
            self._chain, self._last_beat = chain, self._clock()
        logger.info("stage %d of %d belongs to chain %s", self._info.number, self._info.count, chain[:8])

    def _run(self, one: _Waiting) -> None:
        request = one.request
        assert request is not None
        if one.abandoned:
            made: Any = TargetFailed("a stage before this one has failed in this pass")
        else:
            made = outcome_of(lambda: self._pass.run(request, one.incoming))
        one.incoming = None
        share, handed_on = (None, None) if isinstance(made, EagleRpcError) else made
        if self._next is None:
            set_outcome(one.answer, made if share is None else share)
        else:
            call = self._next.call(
                "take",
                request.chain,
                request.number,
                handed_on,
                what="hidden states",
                timeout=request.seconds_left,
            )
            call.when_done(lambda: _answer(one.answer, call, made if share is None else share))
        self.num_passes += 1


def _answer(answer: Future[StageShare], handed_on: ServiceCall, outcome: StageShare | EagleRpcError) -> None:
    """Answers once the next stage has the hidden states, so that a broken way to it shows at once."""
    try:
        handed_on.result()
    except EagleRpcError as error:
        if not isinstance(outcome, EagleRpcError):
            outcome = TargetDraining(f"the next stage cannot be reached: {error}")
    set_outcome(answer, outcome)

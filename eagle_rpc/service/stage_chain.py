"""The first stage's way to the others of its target: connections, heartbeats, loss and return."""

import logging
import secrets
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from eagle_rpc.config.schema import RpcConfig
from eagle_rpc.errors import ConnectionLost, EagleRpcError, TargetDraining, TargetMismatch, WaitTimeout
from eagle_rpc.process.waiting import BoundedWait
from eagle_rpc.rpc import Link, Membership, ServiceCall
from eagle_rpc.supervision import StageBeat, StageInfo, StagePass, combined_fingerprint

logger = logging.getLogger(__name__)

_PAUSE = 0.2  # seconds between two tries to reach all stages


@dataclass(frozen=True, slots=True)
class _Peer:
    """A stage behind the first one."""

    name: str
    incarnation: str
    link: Link
    info: StageInfo


class StageChain:
    """All stages of one target but the first. A target without one of them takes no requests.

    A thread sends heartbeats. If membership is elastic, it also looks for a lost stage's return; then all stages
    join a new chain, and passes of the old one are refused everywhere.
    """

    def __init__(self, name: str, own: StageInfo, membership: Membership, config: RpcConfig) -> None:
        """`name`: of the target. Nothing is connected before `form`."""
        self._name, self._own, self._membership, self._config = name, own, membership, config
        self._silence = config.heartbeat_interval * config.heartbeat_misses
        self._lock = threading.Lock()
        self._peers: Sequence[_Peer] = ()
        self._chain = ""
        self._weights: list[str] | None = None  # fingerprint of each stage's own, as first seen
        self.infos: Sequence[StageInfo] = (own,)
        """Of all stages in order."""
        self.lost = "its stages have not been connected yet"
        """Why the target is incomplete; empty while it is whole."""
        self.when_lost: Callable[[str], None] = lambda reason: None
        self.when_whole: Callable[[], None] = lambda: None
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="stages", daemon=True)

    @property
    def count(self) -> int:
        """Stages, with the first one."""
        return self._own.count

    def form(self, stop: threading.Event) -> None:
        """Connects all stages, waiting for them `rpc.model_timeout` seconds at most.

        Raises `WaitTimeout` with what is missing, also once `stop` is set; `TargetMismatch` for stages of another
        model.
        """
        wait = BoundedWait(f"all {self.count} stages of {self._name}", self._config.model_timeout)
        while not stop.is_set():
            try:
                self._form()
                self._thread.start()
                return
            except TargetMismatch:
                raise
            except EagleRpcError as error:
                if wait.over:
                    raise wait.timeout(error) from None
                wait.say(error)
            stop.wait(_PAUSE)
        raise WaitTimeout(f"stopped before all stages of {self._name} were there")

    def begin(self, request: Callable[[str, bool], StagePass]) -> list[ServiceCall]:
        """Sends `request(chain, is_last)` to each stage; the calls answer with their shares. Raises as `check`."""
        with self._lock:
            self.check()
            peers, chain = self._peers, self._chain
        calls = []
        for peer in peers:
            sent = request(chain, peer is peers[-1])
            what = f"pass {sent.number}"
            calls.append(peer.link.call("begin", sent, what=what, timeout=sent.seconds_left))
        return calls

    def hand_on(self, chain: str, number: int, hidden: list[Tensor] | None) -> ServiceCall:
        """Sends hidden states to the second stage; null: the pass has failed."""
        timeout = self._config.request_timeout
        with self._lock:
            self.check()
            link = self._peers[0].link
        return link.call("take", chain, number, hidden, what="hidden states", timeout=timeout)

    def ask_last(self, method: str, selected_token_ids: Tensor) -> object:
        """A method of the last stage. Raises its error, and `TargetDraining` if it is lost."""
        with self._lock:
            self.check()
            link = self._peers[-1].link
        call = link.call(method, selected_token_ids.cpu(), what=method, timeout=self._config.request_timeout)
        return self.result_of(call)

    def result_of(self, call: ServiceCall) -> object:
        """The answer of a stage. Raises its error; `TargetDraining` if a stage is lost, this one or another."""
        try:
            return call.result(unless=lambda: bool(self.lost))
        except (ConnectionLost, WaitTimeout, TargetDraining) as error:
            self.lose(str(error))
            self.check()
            raise

    def check(self) -> None:
        """Raises `TargetDraining`, after which trainers ask another target, while the target is incomplete."""
        if self.lost:
            raise TargetDraining(f"{self._name} is incomplete: {self.lost}")

    def lose(self, reason: str) -> None:
        """Takes the target out until all stages are there again."""
        with self._lock:
            if self.lost:
                return
            self.lost = reason
        logger.warning("%s is incomplete and takes no requests: %s", self._name, reason)
        self.when_lost(reason)

    def close(self) -> None:
        """Ends the thread and gives the connections up."""
        self._closing.set()
        if self._thread.is_alive():
            self._thread.join(2 * self._silence)
        for peer in self._peers:
            self._membership.leave(peer.link, lost=False)
        self._peers = ()

    # --- the thread

    def _watch(self) -> None:
        why = ""
        while not self._closing.wait(self._config.heartbeat_interval):
            if not self.lost:
                self._beat()
            elif self._membership.elastic:
                try:
                    self._form()
                except EagleRpcError as error:
                    if str(error) != why:
                        logger.info("%s waits for its stages: %s", self._name, error)
                    why = str(error)
                else:
                    logger.info("%s is whole again", self._name)
                    self.when_whole()

    def _beat(self) -> None:
        peers = self._peers
        beats = [peer.link.control("beat", timeout=self._silence) for peer in peers]
        for peer, call in zip(peers, beats, strict=True):
            try:
                beat: StageBeat = call.result()
            except EagleRpcError as error:
                return self.lose(str(error))
            if (beat.incarnation, beat.chain) != (peer.incarnation, self._chain):
                return self.lose(f"{peer.name} has joined another chain")
            if beat.draining:
                return self.lose(f"{peer.name} is shutting down")

    def _form(self) -> None:
        """Connects every stage and lets all join a new chain. Raises the error of the first that fails."""
        for peer in self._peers:
            self._membership.leave(peer.link, lost=False)
        self._peers = ()
        addresses = {one.name: one for one in self._membership.stages(self._name)}
        names = [f"{self._name}.{number}" for number in range(1, self.count)]
        if missing := [name for name in names if name not in addresses]:
            raise ConnectionLost(f"{', '.join(missing)} does not serve yet")
        peers = []
        for name in names:
            link = self._membership.connect(addresses[name])
            try:
                info = link.call("stage_info", what="stage_info", timeout=self._config.start_timeout).result()
            except EagleRpcError as error:
                self._membership.leave(link, lost=isinstance(error, (ConnectionLost, WaitTimeout)))
                raise
            peers.append(_Peer(name, addresses[name].incarnation, link, info))
        self._check(peers)
        chain, incarnations = secrets.token_hex(16), [peer.incarnation for peer in peers]
        # From the last one on: each connects to the one behind it.
        for peer in reversed(peers):
            timeout = self._config.start_timeout
            peer.link.control("join_chain", chain, incarnations, timeout=timeout).result()
        with self._lock:
            self._peers, self._chain, self.lost = peers, chain, ""
            self.infos = (self._own, *(peer.info for peer in peers))
        logger.info("%s has its stages %s, chain %s", self._name, ", ".join(names), chain[:8])

    def _check(self, peers: Sequence[_Peer]) -> None:
        """Raises `TargetMismatch` for a stage of another form, or of other weights than at first."""
        own = self._own
        for number, peer in enumerate(peers, start=1):
            found = (peer.info.number, peer.info.count, peer.info.attention)
            if found != (number, own.count, own.attention):
                rule = f"{peer.name} must be stage {number} of {own.count} with {own.attention}"
                raise TargetMismatch(f"{rule}, it is stage {found[0]} of {found[1]} with {found[2]}")
        weights = [combined_fingerprint([peer.info.weights]) for peer in peers]
        if self._weights is not None and weights != self._weights:
            raise TargetMismatch(f"a stage of {self._name} must return with the weights that it had")
        self._weights = weights

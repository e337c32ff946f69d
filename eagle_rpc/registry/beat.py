"""A worker's presence in the registry: its first announcement, and the beat that renews it."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from eagle_rpc.errors import ConnectionLost, EagleRpcError, NameTaken, WaitTimeout
from eagle_rpc.process.waiting import BoundedWait
from eagle_rpc.registry.client import RegistryClient
from eagle_rpc.registry.record import Record, encoded_record

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_RETRY_SECONDS = 0.1


def take_id(client: RegistryClient, patience: float, stop: threading.Event) -> int:
    """A worker id that was never used; waits for the registry.

    Raises `ConnectionLost` or `WaitTimeout` after `patience` seconds without the registry or once `stop` is
    set, `ConfigError` if all ids are used.
    """
    return _retry(client.new_id, BoundedWait("the registry", patience), stop)


def register(client: RegistryClient, record: Record, patience: float, stop: threading.Event) -> None:
    """Announces a worker for the first time; waits while another worker has its name.

    Raises `NameTaken`, `ConnectionLost` or `WaitTimeout` after `patience` seconds or once `stop` is set.
    """
    _retry(lambda: client.announce(record), BoundedWait(f"the name {record.name}", patience), stop)


def _retry(call: Callable[[], Answer], wait: BoundedWait, stop: threading.Event) -> Answer:
    """Calls until it succeeds; raises the last error when the wait is over or `stop` is set."""
    while True:
        try:
            return call()
        except (NameTaken, ConnectionLost, WaitTimeout) as error:
            if wait.over or stop.is_set():
                raise
            wait.say(error)
        stop.wait(_RETRY_SECONDS)


@dataclass(kw_only=True, slots=True)
class Beat:
    """Keeps `record` in the registry while a `with` body runs, renewed every `interval` with `status()`.

    Entering registers it, as `register` does with `patience` and `stop`; leaving withdraws it. An outage of
    the registry is logged once when it begins and once when it ends. If another process takes the name over,
    `when_superseded` is called once, from the beat's thread, and the beat ends. If the registry is asked to take
    this worker out, `when_drained` is called once, and the beat goes on.
    """

    client: RegistryClient
    record: Record  # as last announced
    status: Callable[[], dict[str, Any]]
    interval: float  # seconds
    patience: float  # seconds
    stop: threading.Event
    when_superseded: Callable[[], None]
    when_drained: Callable[[], None]
    _superseded: bool = field(default=False, init=False)
    _status_failed: bool = field(default=False, init=False)
    _closing: threading.Event = field(default_factory=threading.Event, init=False)
    _thread: threading.Thread = field(init=False)

    def __enter__(self) -> "Beat":
        register(self.client, self._renewed(), self.patience, self.stop)
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the beat and withdraws the record within two of the client's time limits; raises nothing."""
        self._closing.set()
        self._thread.join(self.client.timeout)
        if self._superseded:
            return
        try:
            self.client.withdraw(self.record.incarnation)
        except EagleRpcError as error:
            logger.warning("%s stays in the registry for its time to live: %s", self.record.name, error)

    def _run(self) -> None:
        reached, drained = True, False
        while not self._closing.wait(self.interval):
            try:
                asked_to_drain = self.client.announce(self._renewed())
            except NameTaken as error:
                self._superseded = True
                logger.error("%s", error)
                self.when_superseded()
                return
            except EagleRpcError as error:
                if reached:
                    logger.warning("%s is not announced for now: %s", self.record.name, error)
                reached = False
            else:
                if not reached:
                    logger.info("%s is announced again", self.record.name)
                reached = True
                if asked_to_drain and not drained:
                    drained = True
                    logger.info("%s is asked to drain (job=drain)", self.record.name)
                    self.when_drained()

    def _renewed(self) -> Record:
        """The record with a new status, or with the last one if there is no new one."""
        try:
            renewed = replace(self.record, status=self.status())
            encoded_record(renewed)
        except Exception as error:  # noqa: BLE001 - a worker whose status fails in any way still lives
            if not self._status_failed:
                kind = type(error).__name__
                logger.warning("%s announces an old status: %s: %s", self.record.name, kind, error)
            self._status_failed = True
        else:
            self.record = renewed
            self._status_failed = False
        return self.record

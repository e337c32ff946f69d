"""A worker's presence in the registry: its first announcement, and the beat that renews it."""

import logging
import threading
from collections.abc import Callable
from dataclasses import replace
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

    Raises `ConnectionLost` or `WaitTimeout` after `patience` seconds without the registry or once `stop` is set,
    `ConfigError` if all ids are used.
    """
    return _retry(client.new_id, (ConnectionLost, WaitTimeout), BoundedWait("the registry", patience), stop)


def register(client: RegistryClient, record: Record, patience: float, stop: threading.Event) -> None:
    """Announces a worker for the first time; waits while another worker has its name.

    Raises `NameTaken`, `ConnectionLost` or `WaitTimeout` after `patience` seconds or once `stop` is set.
    """
    wait = BoundedWait(f"the name {record.name}", patience)
    _retry(lambda: client.announce(record), (NameTaken, ConnectionLost, WaitTimeout), wait, stop)


def _retry(
    call: Callable[[], Answer],
    passing: tuple[type[EagleRpcError], ...],
    wait: BoundedWait,
    stop: threading.Event,
) -> Answer:
    """Calls until it succeeds; raises the last `passing` error when the wait is over or `stop` is set."""
    while True:
        try:
            return call()
        except passing as error:
            if wait.over or stop.is_set():
                raise
            wait.say(error)
        stop.wait(_RETRY_SECONDS)


class Beat:
    """Keeps `record` in the registry while the body of a `with` runs, renewed every `interval` seconds with `status()`.

    Entering registers it and raises the errors of `register`; leaving withdraws it. An outage of the registry is logged
    once when it begins and once when it ends. If another process takes the name over, `when_superseded` is called once,
    from the beat's thread, and the beat ends.
    """

    def __init__(
        self,
        client: RegistryClient,
        record: Record,
        *,
        status: Callable[[], dict[str, Any]],
        interval: float,
        patience: float,
        stop: threading.Event,
        when_superseded: Callable[[], None],
    ) -> None:
        self._client = client
        self._record = record
        self._status = status
        self._interval = interval
        self._patience = patience
        self._stop = stop
        self._when_superseded = when_superseded
        self._superseded = False
        self._status_failed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)

    def __enter__(self) -> "Beat":
        register(self._client, self._renewed(), self._patience, self._stop)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the beat and withdraws the record; takes at most two of the client's time limits and raises nothing."""
        self._closing.set()
        self._thread.join(self._client.timeout)
        if self._superseded:
            return
        try:
            self._client.withdraw(self._record.incarnation)
        except EagleRpcError as error:
            logger.warning(
                "%s stays in the registry until its time to live is over: %s", self._record.name, error
            )

    def _run(self) -> None:
        reached = True
        while not self._closing.wait(self._interval):
            try:
                self._client.announce(self._renewed())
            except NameTaken as error:
                self._superseded = True
                logger.error("%s", error)
                self._when_superseded()
                return
            except EagleRpcError as error:
                if reached:
                    logger.warning("%s is not announced for now: %s", self._record.name, error)
                reached = False
            else:
                if not reached:
                    logger.info("%s is announced again", self._record.name)
                reached = True

    def _renewed(self) -> Record:
        """The record with a new status, or with the last one if there is no new one."""
        try:
            renewed = replace(self._record, status=self._status())
            encoded_record(renewed)
        except Exception as error:  # noqa: BLE001 - a worker whose status fails in any way still lives
            if not self._status_failed:
                kind = type(error).__name__
                logger.warning("%s announces an old status: %s: %s", self._record.name, kind, error)
            self._status_failed = True
        else:
            self._record = renewed
            self._status_failed = False
        return self._record

"""A worker's presence in the registry: how it comes in, and the beat that keeps it there."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any, TypeVar

from eagle_rpc.errors import ConnectionLost, EagleRpcError, NameTaken, WaitTimeout
from eagle_rpc.registry.client import RegistryClient
from eagle_rpc.registry.record import Record, encoded_record

logger = logging.getLogger(__name__)

Answer = TypeVar("Answer")

_RETRY_SECONDS = 0.1
_LINE_SECONDS = 5.0


def take_id(client: RegistryClient, patience: float, stop: threading.Event) -> int:
    """A worker id that no worker ever had, once the registry answers.

    Raises its `ConnectionLost` or `WaitTimeout` after `patience` seconds without it, or once `stop` is set; `ConfigError` when
    all ids are used.
    """
    return _patiently(client.new_id, (ConnectionLost, WaitTimeout), patience, stop, "the registry")


def register(client: RegistryClient, record: Record, patience: float, stop: threading.Event) -> None:
    """Announces a worker for the first time, and waits for its name if somebody has it still.

    Raises `NameTaken`, `ConnectionLost` or `WaitTimeout` after `patience` seconds, or once `stop` is set.
    """
    passing = (NameTaken, ConnectionLost, WaitTimeout)
    _patiently(lambda: client.announce(record), passing, patience, stop, f"the name {record.name}")


def _patiently(
    call: Callable[[], Answer],
    passing: tuple[type[EagleRpcError], ...],
    patience: float,
    stop: threading.Event,
    what: str,
) -> Answer:
    """Calls until it succeeds; the last passing error is raised after `patience` seconds, or once `stop` is set."""
    started = time.monotonic()
    next_line = started
    while True:
        try:
            return call()
        except passing as error:
            now = time.monotonic()
            if now - started >= patience or stop.is_set():
                raise
            if now >= next_line:
                next_line = now + _LINE_SECONDS
                logger.info("waiting for %s, %.0f of %.0f s: %s", what, now - started, patience, error)
        stop.wait(_RETRY_SECONDS)


class Beat:
    """Keeps `record` in the registry while the body of a `with` runs: announced every `interval` seconds with a fresh status.

    Entering registers it and raises what `register` raises; leaving withdraws it. An outage of the registry costs two lines
    in the log. If another process has taken the name meanwhile, `when_superseded` is called once, from the beat's thread.
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
        self._lost = False
        self._undescribed = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="beat", daemon=True)

    def __enter__(self) -> "Beat":
        register(self._client, self._described(), self._patience, self._stop)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Ends the beat and withdraws the record; takes two of the client's time limits at most, raises nothing."""
        self._closing.set()
        self._thread.join(self._client.timeout)
        if self._superseded:
            return
        try:
            self._client.withdraw(self._record.incarnation)
        except EagleRpcError as error:
            logger.warning("%s stays in the registry until it counts as silent: %s", self._record.name, error)

    def _run(self) -> None:
        while not self._closing.wait(self._interval):
            try:
                self._client.announce(self._described())
            except NameTaken as error:
                self._superseded = True
                logger.error("%s", error)
                self._when_superseded()
                return
            except EagleRpcError as error:
                if not self._lost:
                    logger.warning("%s is not announced for now: %s", self._record.name, error)
                self._lost = True
            else:
                if self._lost:
                    logger.info("%s is announced again", self._record.name)
                self._lost = False

    def _described(self) -> Record:
        """The record with a fresh status; with the last good one if there is none."""
        try:
            described = replace(self._record, status=self._status())
            encoded_record(described)
        except Exception as error:  # noqa: BLE001 - a status asks torch too, and a worker that fails to describe itself still lives
            if not self._undescribed:
                logger.warning(
                    "%s announces an old status: %s: %s", self._record.name, type(error).__name__, error
                )
            self._undescribed = True
        else:
            self._record = described
            self._undescribed = False
        return self._record

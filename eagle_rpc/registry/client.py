"""The worker's side of the registry."""

import contextlib
import socket
from collections.abc import Sequence
from typing import Any

from eagle_rpc.config.texts import parse_address
from eagle_rpc.errors import (
    AccessRefused,
    ConfigError,
    ConnectionLost,
    InvalidRequest,
    NameTaken,
    WaitTimeout,
)
from eagle_rpc.process import host_address
from eagle_rpc.registry.record import (
    Record,
    Sighting,
    from_json,
    record_from_json,
    record_to_json,
    sighting_from_json,
    to_json,
)
from eagle_rpc.registry.wire import MAX_REQUEST_BYTES, Conversation

# Shorter than the silence after which a worker is dead, with the default intervals.
REQUEST_TIMEOUT = 2.0

_REFUSALS = {
    one.__name__: one for one in (AccessRefused, ConfigError, InvalidRequest, NameTaken, WaitTimeout)
}


class RegistryClient:
    """Asks the registry, from any thread: each call has a connection of its own.

    A call takes at most `timeout` seconds beside the look-up of a host name. It raises `ConnectionLost` if
    the registry cannot be reached, `WaitTimeout` if it does not answer in time, `AccessRefused` if it has
    another token or is not a registry, and the error with which the registry refuses the request.
    """

    def __init__(self, address: str, token: bytes, timeout: float = REQUEST_TIMEOUT) -> None:
        self._host, self._port = parse_address(address)
        self._token = token
        self.timeout = timeout
        self._living: tuple[str, list[Record]] = "", []  # the last answer, and its digest

    def __str__(self) -> str:
        return f"the registry at {self._host}:{self._port}"

    def _which(self) -> str:
        """The address behind a name, which can differ between hosts."""
        with contextlib.suppress(OSError):
            address = host_address(self._host)
            return "" if address == self._host else f", which is {address} here,"
        return ""

    def new_id(self) -> int:
        """A worker id that was never used. Raises `ConfigError` if all are used."""
        return self._ask("new_id")

    def announce(self, record: Record) -> bool:
        """Registers this worker or renews it; whether it is asked to drain and leave.

        Raises `NameTaken` while another living worker has its name.
        """
        return bool(self._ask("announce", record=record_to_json(record)))

    def drain(self, incarnations: Sequence[str]) -> None:
        """Asks targets and stages to drain and leave. A registry that restarts forgets it: ask again until they have.

        Raises `InvalidRequest` if one of them is a trainer.
        """
        self._ask("drain", incarnations=list(incarnations))

    def withdraw(self, incarnation: str) -> None:
        """Frees the name at once instead of after the time to live."""
        self._ask("withdraw", incarnation=incarnation)

    def records(self) -> list[Sighting]:
        """All living and, for a while, silent workers with their whole status: for people."""
        return [sighting_from_json(one) for one in self._ask("records")]

    def living(self) -> list[Record]:
        """The living workers, for their peers: of a status it has only `draining`."""
        digest, known = self._living
        match self._ask("living", known=digest):
            case {"digest": str(digest), "records": list(records)}:
                known = [record_from_json(one) for one in records]
                self._living = digest, known
        return known

    def _ask(self, operation: str, **arguments: Any) -> Any:
        request = to_json({"operation": operation, **arguments})
        if len(request) > MAX_REQUEST_BYTES:
            found = f"{operation} has {len(request)}"
            raise InvalidRequest(f"a request must have at most {MAX_REQUEST_BYTES} bytes, {found}")
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as connection:
            connection.settimeout(self.timeout)
            conversation = Conversation(connection, peer=str(self), token=self._token, seconds=self.timeout)
            try:
                connection.connect((self._host, self._port))
            except TimeoutError:
                rule = f"did not accept a connection within {self.timeout:g} s"
                raise WaitTimeout(f"{self}{self._which()} {rule}") from None
            except OSError as error:
                raise ConnectionLost(
                    f"{self}{self._which()} cannot be reached: {error.strerror or error}"
                ) from None
            answer = from_json(conversation.ask(request))
        match answer:
            case {"value": value}:
                return value
            case {"error": str(name), "message": str(message)}:
                raise _REFUSALS.get(name, InvalidRequest)(message)
        raise InvalidRequest(f"{self} must answer with a value or an error, got {answer!r:.80}")

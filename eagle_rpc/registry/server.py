"""The socket of the registry: a bounded number of connections, each with one authenticated request."""

import contextlib
import functools
import logging
import socketserver
import threading
import time
from typing import Any

from eagle_rpc.errors import (
    AccessRefused,
    ConfigError,
    ConnectionLost,
    EagleRpcError,
    InvalidRequest,
    WaitTimeout,
)
from eagle_rpc.registry.client import REQUEST_TIMEOUT
from eagle_rpc.registry.directory import Directory
from eagle_rpc.registry.record import from_json, record_from_json, sighting_to_json, to_json
from eagle_rpc.registry.wire import Conversation

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 128
# For a request, and for its reply: as long as a client waits.
MESSAGE_SECONDS = REQUEST_TIMEOUT
# A new connection waits this long for one of the others to end.
_PLACE_SECONDS = 1.0
# Between two rounds of accepting; the directory's clock needs a look in each.
_POLL_SECONDS = 0.25
_REFUSAL_LINE_SECONDS = 5.0


class RegistryServer(socketserver.ThreadingTCPServer):
    """Serves `directory` at exactly `address`, with one thread per connection, until it is closed.

    No message of a peer ends it, and a peer that says nothing loses its connection after `message_seconds`.
    Raises `ConfigError` if it cannot listen at `address`.
    """

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    # All workers of a service may start at once.
    request_queue_size = 1024

    def __init__(
        self,
        address: tuple[str, int],
        token: bytes,
        directory: Directory,
        *,
        message_seconds: float = MESSAGE_SECONDS,
    ) -> None:
        self._token = token
        self._directory = directory
        self._message_seconds = message_seconds
        self._places = threading.BoundedSemaphore(MAX_CONNECTIONS)
        self._refused = 0
        self._next_refusal_line = 0.0
        try:
            super().__init__(address, socketserver.BaseRequestHandler)
        except OSError as error:
            found = f"{address[0]}:{address[1]} ({error.strerror or error})"
            raise ConfigError(f"rpc.registry must be a free address of this host, got {found}") from None
        serve = functools.partial(self.serve_forever, _POLL_SECONDS)
        self._thread = threading.Thread(target=serve, name="registry", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """`host:port` where it listens."""
        host, port = self.socket.getsockname()
        return f"{host}:{port}"

    def close(self) -> None:
        """Closes the socket. Requests under way still get their answers within their time limit."""
        self.shutdown()
        self.server_close()
        self._thread.join()

    def __exit__(self, *_: object) -> None:
        self.close()

    def service_actions(self) -> None:
        """Called by socketserver after each round of accepting."""
        self._directory.clock()

    def process_request(self, request: Any, client_address: Any) -> None:
        # Before the first request after a pause is answered.
        self._directory.clock()
        if self._places.acquire(timeout=_PLACE_SECONDS):
            super().process_request(request, client_address)
        else:
            self._log_refusal(ConnectionLost(f"all {MAX_CONNECTIONS} connections are busy"))
            self.close_request(request)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Runs in the thread of the connection."""
        host, port = client_address
        peer, seconds = f"{host}:{port}", self._message_seconds
        conversation = Conversation(request, peer=peer, token=self._token, seconds=seconds)
        try:
            conversation.reply(self._answer(conversation.receive_request()))
        except AccessRefused as error:
            self._log_refusal(error)
            # Its HMAC shows a worker with another token the reason.
            with contextlib.suppress(ConnectionLost, WaitTimeout):
                conversation.reply(_failure(error))
        except (ConnectionLost, InvalidRequest, WaitTimeout) as error:
            self._log_refusal(error)

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._places.release()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Called by socketserver inside its `except`; its own version prints."""
        logger.exception("a connection of %s:%d failed", *client_address[:2])

    def _answer(self, request: bytes) -> bytes:
        try:
            return b'{"value":%b}' % self._value_of(from_json(request))
        except EagleRpcError as error:
            return _failure(error)

    def _value_of(self, request: Any) -> bytes:
        """Runs the operation; its value is JSON."""
        match request:
            case {"operation": "new_id"}:
                return to_json(self._directory.ids.next())
            case {"operation": "announce", "record": record}:
                return to_json(self._directory.announce(record_from_json(record)))
            case {"operation": "drain", "incarnations": [*incarnations]}:
                self._directory.drain([one for one in incarnations if isinstance(one, str)])
                return b"null"
            case {"operation": "withdraw", "incarnation": str(incarnation)}:
                self._directory.withdraw(incarnation)
                return b"null"
            case {"operation": "records"}:
                return to_json([sighting_to_json(one) for one in self._directory.sightings()])
            case {"operation": "living", "known": str(known)}:
                return self._directory.living(known)
        operations = "new_id, announce, withdraw, drain, records or living"
        raise InvalidRequest(f"a request must be {operations} with its argument, got {request!r:.80}")

    def _log_refusal(self, error: EagleRpcError) -> None:
        """One line every few seconds, however many connections are refused."""
        self._refused += 1
        now = time.monotonic()
        if now >= self._next_refusal_line:
            self._next_refusal_line = now + _REFUSAL_LINE_SECONDS
            line = "connections refused since the last such line: %d, the latest because %s"
            logger.warning(line, self._refused, error)
            self._refused = 0


def _failure(error: EagleRpcError) -> bytes:
    return to_json({"error": type(error).__name__, "message": str(error)})

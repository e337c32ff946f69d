"""The registry's socket: bounded connections, each with one authenticated request."""

import contextlib
import logging
import socket
import socketserver
import threading
import time
from typing import Any

from eagle_rpc.errors import AccessRefused, ConfigError, ConnectionLost, EagleRpcError, InvalidRequest, WaitTimeout
from eagle_rpc.registry.directory import Directory
from eagle_rpc.registry.record import from_json, record_from_json, record_to_json, to_json
from eagle_rpc.registry.wire import Conversation

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
# Seconds that a whole request may take, and that a connection which makes room may take to end.
REQUEST_SECONDS = 5.0
_EVICTION_SECONDS = 1.0
_POLL_SECONDS = 0.25
# The accepting thread never takes this long for one round unless the whole process stands still.
_STALL_SECONDS = 1.5
_REFUSAL_LINE_SECONDS = 5.0


class RegistryServer:
    """Serves `directory` on exactly `address` from threads of its own, until it is closed.

    Nothing that a peer sends ends it. Raises `ConfigError` if it cannot listen there.
    """

    def __init__(
        self, address: tuple[str, int], token: bytes, directory: Directory, *, request_seconds: float = REQUEST_SECONDS
    ) -> None:
        try:
            self._listener = _Listener(address, token, directory, request_seconds)
        except OSError as error:
            raise ConfigError(
                f"rpc.registry must be a free address of this host, got {address[0]}:{address[1]} ({error.strerror or error})"
            ) from None
        self._thread = threading.Thread(target=self._listener.serve_forever, args=(_POLL_SECONDS,), name="registry", daemon=True)
        self._thread.start()

    @property
    def address(self) -> str:
        """`host:port` that it listens on."""
        host, port = self._listener.server_address[:2]
        return f"{host}:{port}"

    def close(self) -> None:
        """Ends the socket and every open connection."""
        self._listener.shutdown()
        self._listener.server_close()
        self._thread.join()

    def __enter__(self) -> "RegistryServer":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Listener(socketserver.ThreadingTCPServer):
    """When all places are taken, the connection that has been open longest makes room: an honest one takes milliseconds."""

    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    request_queue_size = 128

    def __init__(self, address: tuple[str, int], token: bytes, directory: Directory, request_seconds: float) -> None:
        self._token = token
        self._directory = directory
        self._request_seconds = request_seconds
        self._refusals = _Refusals()
        self._open: dict[socket.socket, None] = {}  # oldest first
        self._left = threading.Condition()
        self._last_round = time.monotonic()
        super().__init__(address, socketserver.BaseRequestHandler)

    def service_actions(self) -> None:
        """Called after every round of accepting. A process that was stopped must not take its own silence for the workers'."""
        now = time.monotonic()
        stalled, self._last_round = now - self._last_round, now
        if stalled > _STALL_SECONDS:
            self._directory.excuse(stalled)

    def process_request(self, request: Any, client_address: Any) -> None:
        # Before what has waited in the socket is answered.
        self.service_actions()
        with self._left:
            if len(self._open) >= MAX_CONNECTIONS:
                _abort(next(iter(self._open)))
                self._left.wait_for(lambda: len(self._open) < MAX_CONNECTIONS, _EVICTION_SECONDS)
            full = len(self._open) >= MAX_CONNECTIONS
            if not full:
                self._open[request] = None
        if full:
            self._refusals.note(ConnectionLost(f"all {MAX_CONNECTIONS} connections are busy"))
            self.shutdown_request(request)
            return
        super().process_request(request, client_address)

    def finish_request(self, request: Any, client_address: Any) -> None:
        peer = f"{client_address[0]}:{client_address[1]}"
        conversation = Conversation(request, peer=peer, token=self._token, seconds=self._request_seconds)
        try:
            self._converse(conversation)
        except (AccessRefused, ConnectionLost, InvalidRequest, WaitTimeout) as error:
            self._refusals.note(error)

    def _converse(self, conversation: Conversation) -> None:
        conversation.greet()
        try:
            request = conversation.receive_request()
        except AccessRefused as error:
            # The reply bears our token's mark, by which a peer with another one sees what is wrong.
            conversation.reply(_failure(error))
            raise
        conversation.reply(self._answer(request))

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        with self._left:
            self._open.pop(request, None)
            self._left.notify()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """socketserver calls it inside its `except`; its own version prints."""
        logger.exception("a connection of %s:%d failed", *client_address[:2])

    def server_close(self) -> None:
        super().server_close()
        with self._left:
            for connection in self._open:
                _abort(connection)

    def _answer(self, request: bytes) -> bytes:
        try:
            return to_json({"value": self._perform(from_json(request))})
        except EagleRpcError as error:
            return _failure(error)

    def _perform(self, request: Any) -> Any:
        match request:
            case {"operation": "new_id"}:
                return self._directory.new_id()
            case {"operation": "announce", "record": record}:
                return self._directory.announce(record_from_json(record))
            case {"operation": "withdraw", "incarnation": str(incarnation)}:
                return self._directory.withdraw(incarnation)
            case {"operation": "records"}:
                return [
                    {"record": record_to_json(one.record), "seconds_silent": one.seconds_silent, "living": one.living}
                    for one in self._directory.sightings()
                ]
        raise InvalidRequest(f"a request must be new_id, announce, withdraw or records with its argument, got {request!r:.80}")


def _failure(error: EagleRpcError) -> bytes:
    return to_json({"error": type(error).__name__, "message": str(error)})


def _abort(connection: socket.socket) -> None:
    """Wakes the thread that waits on it, which then closes it."""
    # The peer may have been faster.
    with contextlib.suppress(OSError):
        connection.shutdown(socket.SHUT_RDWR)


class _Refusals:
    """Tells of refused connections in one line every few seconds, however many there are."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._count = 0
        self._next_line = time.monotonic()

    def note(self, error: EagleRpcError) -> None:
        with self._lock:
            self._count += 1
            now = time.monotonic()
            if now < self._next_line:
                return
            count, self._count = self._count, 0
            self._next_line = now + _REFUSAL_LINE_SECONDS
        logger.warning("connections refused since the last such line: %d, the latest because %s", count, error)

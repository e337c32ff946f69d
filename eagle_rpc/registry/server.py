"""The registry's socket: bounded connections, each with one authenticated request."""

import contextlib
import logging
import math
import socket
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
from eagle_rpc.registry.directory import Directory
from eagle_rpc.registry.record import from_json, record_from_json, to_json
from eagle_rpc.registry.wire import Conversation

logger = logging.getLogger(__name__)

MAX_CONNECTIONS = 64
# Seconds that a whole request may take.
REQUEST_SECONDS = 5.0
# Seconds that a newcomer waits for a place at most, and in which even a slow worker has shown that it knows the token.
_PLACE_SECONDS = 1.0
_STRANGER_SECONDS = 0.5
_POLL_SECONDS = 0.25
# The accepting thread never takes this long for one round unless the whole process stands still.
_STALL_SECONDS = 1.5
_REFUSAL_LINE_SECONDS = 5.0


class RegistryServer:
    """Serves `directory` on exactly `address` from threads of its own, until it is closed.

    Nothing that a peer sends ends it. Raises `ConfigError` if it cannot listen there.
    """

    def __init__(
        self,
        address: tuple[str, int],
        token: bytes,
        directory: Directory,
        *,
        request_seconds: float = REQUEST_SECONDS,
    ) -> None:
        try:
            self._listener = _Listener(address, token, directory, request_seconds)
        except OSError as error:
            raise ConfigError(
                f"rpc.registry must be a free address of this host, got {address[0]}:{address[1]} ({error.strerror or error})"
            ) from None
        self._thread = threading.Thread(
            target=self._listener.serve_forever, args=(_POLL_SECONDS,), name="registry", daemon=True
        )
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
    allow_reuse_address = True
    daemon_threads = True
    block_on_close = False
    # Of a service's size: its workers may all start at once.
    request_queue_size = 1024

    def __init__(
        self, address: tuple[str, int], token: bytes, directory: Directory, request_seconds: float
    ) -> None:
        self._token = token
        self._directory = directory
        self._request_seconds = request_seconds
        self._refusals = _Refusals()
        self._places = _Places()
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
        if self._places.take(request):
            super().process_request(request, client_address)
        else:
            self._refusals.note(ConnectionLost(f"all {MAX_CONNECTIONS} connections are busy"))
            self.shutdown_request(request)

    def finish_request(self, request: Any, client_address: Any) -> None:
        peer = f"{client_address[0]}:{client_address[1]}"
        conversation = Conversation(request, peer=peer, token=self._token, seconds=self._request_seconds)
        try:
            self._converse(conversation, request)
        except (AccessRefused, ConnectionLost, InvalidRequest, WaitTimeout) as error:
            self._refusals.note(error)

    def _converse(self, conversation: Conversation, connection: socket.socket) -> None:
        conversation.greet()
        try:
            request = conversation.receive_request()
        except AccessRefused as error:
            # The reply bears our token's mark, by which a peer with another one sees what is wrong.
            conversation.reply(_failure(error))
            raise
        self._places.trust(connection)
        conversation.reply(self._answer(request))

    def shutdown_request(self, request: Any) -> None:
        super().shutdown_request(request)
        self._places.leave(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """socketserver calls it inside its `except`; its own version prints."""
        logger.exception("a connection of %s:%d failed", *client_address[:2])

    def server_close(self) -> None:
        super().server_close()
        self._places.abort_all()

    def _answer(self, request: bytes) -> bytes:
        try:
            return b'{"value":%b}' % self._perform(from_json(request))
        except EagleRpcError as error:
            return _failure(error)

    def _perform(self, request: Any) -> bytes:
        """The value, as JSON."""
        match request:
            case {"operation": "new_id"}:
                return to_json(self._directory.new_id())
            case {"operation": "announce", "record": record}:
                return to_json(self._directory.announce(record_from_json(record)))
            case {"operation": "withdraw", "incarnation": str(incarnation)}:
                return to_json(self._directory.withdraw(incarnation))
            case {"operation": "records"}:
                return self._directory.sightings()
            case {"operation": "living"}:
                return self._directory.living()
        operations = "new_id, announce, withdraw, records or living"
        raise InvalidRequest(f"a request must be {operations} with its argument, got {request!r:.80}")


def _failure(error: EagleRpcError) -> bytes:
    return to_json({"error": type(error).__name__, "message": str(error)})


class _Places:
    """Where the open connections sit: a bounded number.

    Who has shown the token keeps its place, however long the disk takes for its answer. When all places are taken, the stranger
    that has been there longest makes room, once that is longer than a worker needs to show the token.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._open: set[socket.socket] = set()
        self._strangers: dict[socket.socket, float] = {}  # since when they are there, oldest first

    def take(self, connection: socket.socket) -> bool:
        """Waits for a place; whether it got one."""
        deadline = time.monotonic() + _PLACE_SECONDS
        with self._changed:
            while not self._changed.wait_for(
                self._has_room, min(deadline, self._next_eviction()) - time.monotonic()
            ):
                now = time.monotonic()
                if now >= deadline:
                    return False
                if now >= self._next_eviction():
                    self._evict()
                    self._changed.wait_for(self._has_room, deadline - now)
            self._open.add(connection)
            self._strangers[connection] = time.monotonic()
        return True

    def _has_room(self) -> bool:
        return len(self._open) < MAX_CONNECTIONS

    def _evict(self) -> None:
        """Has the oldest stranger's thread end it, which takes a moment."""
        oldest = next(iter(self._strangers))
        del self._strangers[oldest]
        _abort(oldest)

    def _next_eviction(self) -> float:
        return next(iter(self._strangers.values()), math.inf) + _STRANGER_SECONDS

    def trust(self, connection: socket.socket) -> None:
        """It has shown the token."""
        with self._changed:
            self._strangers.pop(connection, None)

    def leave(self, connection: socket.socket) -> None:
        """Nothing if it had no place."""
        with self._changed:
            self._open.discard(connection)
            self._strangers.pop(connection, None)
            self._changed.notify()

    def abort_all(self) -> None:
        with self._changed:
            for connection in self._open:
                _abort(connection)


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
        logger.warning(
            "connections refused since the last such line: %d, the latest because %s", count, error
        )

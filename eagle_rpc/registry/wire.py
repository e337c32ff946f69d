"""One conversation between a worker and the registry: a request and its reply over one connection.

    registry  greeting, nonce
    worker    nonce, request
    registry  reply

Request and reply are frames: length of the body (4 bytes, big-endian), HMAC-SHA256, body (JSON). The key of
the HMAC is HMAC-SHA256(token, both nonces): the token never travels, and a recorded frame is refused in any
other conversation. Nothing is parsed before its HMAC is checked. Nothing is encrypted.
"""

import contextlib
import hmac
import secrets
import socket
import struct
import time
from collections.abc import Iterator

from eagle_rpc.errors import AccessRefused, ConnectionLost, InvalidRequest, WaitTimeout
from eagle_rpc.registry.record import MAX_RECORD_BYTES

# A request is a record and the name of an operation; a reply may list all records.
MAX_REQUEST_BYTES = MAX_RECORD_BYTES + 2**10
MAX_REPLY_BYTES = 32 * 2**20

_GREETING = b"eagle_rpc registry 3\n"
_NONCE_BYTES = 32
_HEADER = struct.Struct(">I32s")
_CHUNK_BYTES = 64 * 2**10


class Conversation:
    """One side of a conversation. Each message has `seconds` to pass.

    Every method raises `ConnectionLost` if `peer` has gone, and `WaitTimeout` if it is too slow.
    """

    def __init__(self, connection: socket.socket, *, peer: str, token: bytes, seconds: float) -> None:
        self._connection = connection
        self._peer = peer
        self._token = token
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._key = b""

    def receive_request(self) -> bytes:
        """The registry's side: greets and reads the request.

        Raises `AccessRefused` if the peer does not know the token, `InvalidRequest` if the request is too
        long.
        """
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._write(_GREETING + nonce)
        self._derive_key(nonce, self._read(_NONCE_BYTES))
        return self._read_frame(b"request", MAX_REQUEST_BYTES)

    def reply(self, body: bytes) -> None:
        """The registry's side: ends the conversation."""
        self._deadline = time.monotonic() + self._seconds
        self._write(self._frame(b"reply", body))

    def ask(self, request: bytes) -> bytes:
        """The worker's side, within `seconds`. Raises `AccessRefused` if the peer has another token."""
        greeting = self._read(len(_GREETING) + _NONCE_BYTES)
        if not greeting.startswith(_GREETING):
            rule = f"{self._peer} must be a registry of this version"
            raise AccessRefused(f"{rule}, it greets with {greeting!r:.40}")
        nonce = secrets.token_bytes(_NONCE_BYTES)
        self._derive_key(greeting[len(_GREETING) :], nonce)
        self._write(nonce + self._frame(b"request", request))
        return self._read_frame(b"reply", MAX_REPLY_BYTES)

    def _derive_key(self, registry_nonce: bytes, worker_nonce: bytes) -> None:
        self._key = hmac.digest(self._token, registry_nonce + worker_nonce, "sha256")

    def _frame(self, kind: bytes, body: bytes) -> bytes:
        return _HEADER.pack(len(body), hmac.digest(self._key, kind + body, "sha256")) + body

    def _read_frame(self, kind: bytes, limit: int) -> bytes:
        length, mac = _HEADER.unpack(self._read(_HEADER.size))
        if length > limit:
            rule = f"a {kind.decode()} must have at most {limit} bytes"
            raise InvalidRequest(f"{rule}, {self._peer} announces {length}")
        body = self._read(length)
        if not hmac.compare_digest(mac, hmac.digest(self._key, kind + body, "sha256")):
            raise AccessRefused(f"{self._peer} must have the same token as this process (rpc.token_file)")
        return body

    def _write(self, data: bytes) -> None:
        with self._bounded():
            self._connection.sendall(data)

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            with self._bounded():
                chunk = self._connection.recv(min(_CHUNK_BYTES, size - len(data)))
            if not chunk:
                raise ConnectionLost(f"{self._peer} has closed the connection in the middle of a message")
            data += chunk
        return bytes(data)

    @contextlib.contextmanager
    def _bounded(self) -> Iterator[None]:
        """Gives one operation of the socket the time that is left, and its failures their types."""
        try:
            left = self._deadline - time.monotonic()
            if left <= 0:
                raise TimeoutError
            self._connection.settimeout(left)
            yield
        except TimeoutError:
            raise WaitTimeout(f"{self._peer} did not finish its message within {self._seconds:g} s") from None
        except OSError as error:
            raise ConnectionLost(f"{self._peer} has closed the connection: {error}") from None

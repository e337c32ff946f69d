"""One conversation between a worker and the registry: a request and its reply over one connection, within one time limit.

    registry  greeting, its nonce
    worker    its nonce, request
    registry  reply

Either message is its length (4 bytes, big-endian), its HMAC-SHA256 and its JSON. The key is made of the token and both
nonces, so the token never travels, and neither message is worth anything in another conversation. Nothing is parsed before
its HMAC has been checked. Nothing is encrypted.
"""

import hashlib
import hmac
import secrets
import socket
import struct
import time

from eagle_rpc.errors import AccessRefused, ConnectionLost, InvalidRequest, WaitTimeout
from eagle_rpc.registry.record import MAX_RECORD_BYTES

# A request is a record and the name of an operation; a reply may list all records.
MAX_REQUEST_BYTES = MAX_RECORD_BYTES + 2**10
MAX_REPLY_BYTES = 32 * 2**20

_GREETING = b"eagle_rpc registry 1\n"
_NONCE_BYTES = 32
_MAC_BYTES = hashlib.sha256().digest_size
_LENGTH = struct.Struct(">I")
_CHUNK_BYTES = 64 * 2**10


class Conversation:
    """One side of it. All its waits together are bounded by `seconds`.

    Every method raises `ConnectionLost` when `peer` has gone, `WaitTimeout` when it was too slow.
    """

    def __init__(self, connection: socket.socket, *, peer: str, token: bytes, seconds: float) -> None:
        self._connection = connection
        self._peer = peer
        self._token = token
        self._seconds = seconds
        self._deadline = time.monotonic() + seconds
        self._key = b""

    def greet(self) -> None:
        """The registry's side begins. Raises nothing for a peer without the token: `receive_request` does."""
        own = secrets.token_bytes(_NONCE_BYTES)
        self._write(_GREETING + own)
        self._key = self._derive(own, self._read(_NONCE_BYTES))

    def receive_request(self) -> bytes:
        """Raises `AccessRefused` if the peer does not know the token, `InvalidRequest` if the message is too long."""
        return self._receive(b"request", MAX_REQUEST_BYTES)

    def reply(self, body: bytes) -> None:
        self._write(self._frame(b"reply", body))

    def ask(self, request: bytes) -> bytes:
        """The worker's side, all of it. Raises `AccessRefused` if the peer is no registry or has another token."""
        greeting = self._read(len(_GREETING) + _NONCE_BYTES)
        if not greeting.startswith(_GREETING):
            raise AccessRefused(
                f"{self._peer} must be a registry of this version, it greets with {greeting!r:.40}"
            )
        own = secrets.token_bytes(_NONCE_BYTES)
        self._key = self._derive(greeting[len(_GREETING) :], own)
        self._write(own + self._frame(b"request", request))
        return self._receive(b"reply", MAX_REPLY_BYTES)

    def _derive(self, registrys: bytes, workers: bytes) -> bytes:
        return hmac.digest(self._token, registrys + workers, hashlib.sha256)

    def _frame(self, kind: bytes, body: bytes) -> bytes:
        return _LENGTH.pack(len(body)) + hmac.digest(self._key, kind + body, hashlib.sha256) + body

    def _receive(self, kind: bytes, limit: int) -> bytes:
        (length,) = _LENGTH.unpack(self._read(_LENGTH.size))
        if length > limit:
            raise InvalidRequest(
                f"a {kind.decode()} must have at most {limit} bytes, {self._peer} announces {length}"
            )
        mac = self._read(_MAC_BYTES)
        body = self._read(length)
        if not hmac.compare_digest(mac, hmac.digest(self._key, kind + body, hashlib.sha256)):
            raise AccessRefused(f"{self._peer} must have the same token as this process (rpc.token_file)")
        return body

    def _write(self, data: bytes) -> None:
        try:
            self._connection.settimeout(self._left())
            self._connection.sendall(data)
        except TimeoutError:
            raise self._too_slow() from None
        except OSError as error:
            raise ConnectionLost(f"{self._peer} has closed the connection: {error}") from None

    def _read(self, size: int) -> bytes:
        data = bytearray()
        while len(data) < size:
            try:
                self._connection.settimeout(self._left())
                chunk = self._connection.recv(min(_CHUNK_BYTES, size - len(data)))
            except TimeoutError:
                raise self._too_slow() from None
            except OSError as error:
                raise ConnectionLost(f"{self._peer} has closed the connection: {error}") from None
            if not chunk:
                raise ConnectionLost(f"{self._peer} has closed the connection in the middle of a message")
            data += chunk
        return bytes(data)

    def _left(self) -> float:
        left = self._deadline - time.monotonic()
        if left <= 0:
            raise self._too_slow()
        return left

    def _too_slow(self) -> WaitTimeout:
        return WaitTimeout(f"{self._peer} did not finish its message within {self._seconds:g} s")

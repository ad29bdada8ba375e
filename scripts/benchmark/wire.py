"""The client's side of the wire: raw sockets, as little work as possible for each byte.

The server must be the bottleneck, so nothing here is a general WebSocket client: frames are
masked with zeros (so that masking them changes nothing) and read only where they must be.
"""

from __future__ import annotations

import resource
import secrets
import select
import socket
import struct
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from functools import partial

from chatserver.store.keyring import Keyring

BATCH = 100
"""Handshakes under way at once, twice."""
SWEEP_SECONDS = 0.01
SLICE = 50
"""Receivers read before publishers are looked after again: some 100 µs."""
TEXT, CLOSE, PING, PONG = 1, 8, 9, 10
ACK, MESSAGE, WELCOME = b'{"type":"ack"', b'{"type":"message"', b'{"type":"welcome"'
ERROR = b'{"type":"error"'
TRIES = 5
BUSY_SECONDS = 1.0
_LINGER_NOT = struct.pack("ii", 1, 0)


repeated: list[bytes] = []
"""What was answered ``unavailable``, once for each time; the benchmark tells."""


class Busy(Exception):
    """The server could not do it just now; it may be repeated."""


def upgrade(token: str | None, path: str = "/v1/ws", *, compressed: bool = False) -> bytes:
    """The request of a handshake, with a token or without; ``compressed`` offers compression."""
    credentials = "" if token is None else f"Authorization: Bearer {token}\r\n"
    offer = "Sec-WebSocket-Extensions: permessage-deflate\r\n" if compressed else ""
    return (
        f"GET {path} HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\nSec-WebSocket-Version: 13\r\n"
        f"{credentials}{offer}\r\n"
    ).encode()


def client_frame(payload: bytes, opcode: int = TEXT) -> bytes:
    head = bytes([0x80 | opcode])
    size = len(payload)
    if size < 126:
        return head + bytes([0x80 | size]) + b"\0\0\0\0" + payload
    return head + b"\xfe" + size.to_bytes(2, "big") + b"\0\0\0\0" + payload


def server_frame(payload: bytes) -> bytes:
    """As a server sends it: not masked. Of 126 to 65,535 bytes."""
    return b"\x81\x7e" + len(payload).to_bytes(2, "big") + payload


def take_frames(buffer: bytearray) -> Iterator[tuple[int, bytes, int]]:
    """Cut whole frames off the buffer: opcode, payload (inflated), size on the wire."""
    at = 0
    while len(buffer) - at >= 2:
        size, start = buffer[at + 1], at + 2
        if size == 126:
            size, start = int.from_bytes(buffer[at + 2 : at + 4], "big"), at + 4
        elif size == 127:
            size, start = int.from_bytes(buffer[at + 2 : at + 10], "big"), at + 10
        if len(buffer) < start + size:
            break
        payload = bytes(buffer[start : start + size])
        if buffer[at] & 0x40:
            payload = zlib.decompressobj(-15).decompress(payload + b"\0\0\xff\xff")
        yield buffer[at] & 15, payload, start + size - at
        at = start + size
    del buffer[:at]


def connect(port: int, index: int = 0) -> socket.socket:
    """A connected socket, from one of four loopback addresses: one has too few ports."""
    client = socket.socket()
    client.setsockopt(socket.SOL_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
    # Reset at the end: no ports that linger into the next run.
    client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _LINGER_NOT)
    client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    client.settimeout(30.0)
    client.bind((f"127.0.0.{2 + index % 4}", 0))
    client.connect(("127.0.0.1", port))
    return client


class Mint:
    """Makes tokens, each with its own session."""

    def __init__(self, secret: str) -> None:
        self._keyring = Keyring(secret.encode())

    def token(self, user: str) -> str:
        return self._keyring.issue(
            user=user,
            session=secrets.token_hex(8),
            roles=["member"],
            issued_at=int(time.time()),
            token_id=secrets.token_hex(8),
        )


def enter(
    port: int,
    tokens: Sequence[str],
    room_of: Callable[[int], str | None],
    *,
    compressed: bool = False,
) -> list[socket.socket]:
    """Open a socket for each token and join it to its room, some at a time.

    Returns when the last one has its ack. The server always has work: the next batch is on its
    way while answers to the one before are read.
    """

    def knock(index: int) -> socket.socket:
        client = connect(port, index)
        client.sendall(upgrade(tokens[index], compressed=compressed))
        return client

    opened: list[socket.socket] = []
    waiting: list[socket.socket] = []
    for start in range(0, len(tokens) + BATCH, BATCH):
        batch = [knock(index) for index in range(start, min(start + BATCH, len(tokens)))]
        welcome = [
            _welcomed(client, partial(knock, index))
            for index, client in enumerate(waiting, len(opened))
        ]
        _join_all(welcome, len(opened), room_of)
        opened += welcome
        waiting = batch
    return opened


def _welcomed(client: socket.socket, again: Callable[[], socket.socket]) -> socket.socket:
    """The socket that is let in: one that the server is too busy for knocks again."""
    for _ in range(TRIES):
        try:
            await_frame(client, WELCOME, await_upgrade(client))
        except Busy:
            repeated.append(b"a handshake")
            client.close()
            time.sleep(BUSY_SECONDS)
            client = again()
        else:
            return client
    raise RuntimeError(f"a handshake was refused {TRIES} times")


def _join_all(
    clients: Sequence[socket.socket], first: int, room_of: Callable[[int], str | None]
) -> None:
    joining = []
    for index, client in enumerate(clients, first):
        room = room_of(index)
        if room is not None:
            command = b'{"type":"join","id":1,"room":"%b"}' % room.encode()
            client.sendall(client_frame(command))
            joining.append((client, command))
    for client, command in joining:
        _await_ack(client, command)


def acknowledged(client: socket.socket, command: bytes) -> None:
    """Send a command and wait for its ack; one that the server was too busy for is repeated, as
    any client would."""
    client.sendall(client_frame(command))
    _await_ack(client, command)


def note_refusal(payload: bytes) -> None:
    """Raises RuntimeError for an error that repeating cannot help."""
    if b'"code":"unavailable"' not in payload:
        raise RuntimeError(f"a command was refused: {payload!r}")
    repeated.append(payload)


def _await_ack(client: socket.socket, command: bytes) -> None:
    for _ in range(TRIES):
        try:
            await_frame(client, ACK, bytearray())
        except Busy:
            client.sendall(client_frame(command))
        else:
            return
    raise RuntimeError(f"refused {TRIES} times: {command!r}")


def await_upgrade(client: socket.socket) -> bytearray:
    """Read the answer to a handshake; what follows it is returned.

    Raises Busy for 503, RuntimeError for any other refusal.
    """
    buffer = bytearray()
    while b"\r\n\r\n" not in buffer:
        data = client.recv(65536)
        if not data:
            break
        buffer += data
    head, _, rest = buffer.partition(b"\r\n\r\n")
    if head.startswith(b"HTTP/1.1 503"):
        raise Busy
    if not head.startswith(b"HTTP/1.1 101"):
        raise RuntimeError(f"a handshake was refused: {bytes(buffer)!r}")
    return rest


def await_frame(client: socket.socket, start: bytes, buffer: bytearray) -> None:
    """Read frames up to one that begins so. Nothing may follow it yet.

    Raises Busy for an error ``unavailable``, which is noted, RuntimeError for any other.
    """
    while True:
        for _, payload, _ in take_frames(buffer):
            if payload.startswith(start):
                return
            if payload.startswith(ERROR):
                note_refusal(payload)
                raise Busy
        data = client.recv(65536)
        if not data:
            raise RuntimeError(f"closed while waiting for {start!r}")
        buffer += data


class Sink:
    """Sockets that only receive: what there is is read and its bytes counted.

    They are read every ``SWEEP_SECONDS``, not whenever something arrives. So the receivers take a
    small part of the client's core, and none of the server's: on loopback it is the sender that
    wakes a waiting receiver, which over a network it never does.

    ``publishers`` have right of way: each is called back as soon as its socket is readable, and
    reads it itself.
    """

    def __init__(
        self, receivers: Sequence[socket.socket], publishers: dict[int, Callable[[], None]]
    ) -> None:
        self._receivers = select.epoll()
        self._publishers = select.epoll()
        self._called = publishers
        self._buffer = bytearray(1 << 20)
        self._receive = {client.fileno(): client.recv_into for client in receivers}
        self.counts = dict.fromkeys(self._receive, 0)
        """Bytes received, by descriptor."""
        self._sweep_at = 0.0
        for client in receivers:
            client.setblocking(False)
            self._receivers.register(client, select.EPOLLIN)
        for fd in publishers:
            self._publishers.register(fd, select.EPOLLIN)

    def poll(self) -> None:
        """Wait for a publisher, at most until the next sweep; sweep when it is time."""
        self.call(max(0.0, self._sweep_at - time.perf_counter()))
        if time.perf_counter() >= self._sweep_at:
            self.sweep()
            self._sweep_at = time.perf_counter() + SWEEP_SECONDS

    def call(self, timeout: float) -> None:
        """Serve the publishers that can be read; wait so many seconds for the first."""
        for fd, _ in self._publishers.poll(timeout, len(self._called)):
            self._called[fd]()

    def sweep(self) -> None:
        """Read every receiver that has something, publishers in between."""
        receive, buffer, counts = self._receive, self._buffer, self.counts
        for _ in range(0, len(receive), SLICE):
            ready = self._receivers.poll(0, SLICE)
            for fd, _ in ready:
                got = receive[fd](buffer)
                if not got:
                    raise RuntimeError("the server closed a receiver's connection")
                counts[fd] += got
            self.call(0)
            if len(ready) < SLICE:
                break

    def total(self) -> int:
        return sum(self.counts.values())


def descriptors_left() -> int:
    """How many sockets this process, and a server under the same limit, can have."""
    return resource.getrlimit(resource.RLIMIT_NOFILE)[1] - 500

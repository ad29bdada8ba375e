"""One WebSocket to the server: bytes in and out, around websockets' Sans-I/O ClientProtocol.

The handshake, everything that is sent and every frame that is not whole text go through it; for
what comes thick and fast there is ``wire.Reader``.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import time
from typing import NamedTuple, Protocol, cast

import orjson
from websockets.client import ClientProtocol
from websockets.frames import Frame, Opcode
from websockets.http11 import Response
from websockets.typing import Subprotocol
from websockets.uri import WebSocketURI

from .wire import Events, Reader, Text

FRAME_BYTES = 2**20
"""The largest frame a server may send."""
CLOSE_SECONDS = 5.0
STOPPED_BUFFER, USUAL_BUFFER = 4096, 1 << 18
"""Receive buffers of who does not read, and of who reads again: in less than a segment of loopback
the kernel would wait 200 ms for each window."""

# At DEBUG websockets logs every header, and with them the tokens.
_log = logging.getLogger("load.transport")
_log.setLevel(logging.WARNING)


class Refusal(NamedTuple):
    """Why a handshake did not succeed."""

    reason: str
    """Such as ``429_rate_limited`` or ``timeout``."""
    retry_after: float | None = None
    """Seconds, as the server said."""
    final: bool = False
    """The same would be refused again."""


class Owner(Protocol):
    """Who is told what comes; ``now`` is in nanoseconds of the monotonic clock."""

    index: int
    opening: Connection | None
    """During the handshake, and until the owner takes it."""

    def receive_events(self, events: Events, now: int) -> None: ...
    def receive_text(self, payload: bytes, now: int) -> None: ...
    def closed(self, code: int, now: int) -> None:
        """Once, and only after the handshake. 1006 stands for no close frame."""


class Probe:
    """The owner of a connection of which only the handshake matters."""

    def __init__(self, index: int) -> None:
        self.index = index
        self.opening: Connection | None = None

    def receive_events(self, events: Events, now: int) -> None:
        pass

    def receive_text(self, payload: bytes, now: int) -> None:
        pass

    def closed(self, code: int, now: int) -> None:
        pass


class Connection(asyncio.Protocol):
    """``opened`` resolves with None after the handshake, or with the reason why not."""

    __slots__ = (
        "_closed",
        "_fragments",
        "_owner",
        "_reader",
        "_rest",
        "_sans_io",
        "_transport",
        "opened",
    )

    def __init__(self, owner: Owner, uri: WebSocketURI, token: str, reader: Reader) -> None:
        self._owner = owner
        self._reader = reader
        self._rest = b""
        self._fragments = b""
        self._closed = False
        self._sans_io = ClientProtocol(
            uri, subprotocols=[Subprotocol("chat.v1")], max_size=FRAME_BYTES, logger=_log
        )
        request = self._sans_io.connect()
        request.headers["Authorization"] = f"Bearer {token}"
        self._sans_io.send_request(request)
        self.opened: asyncio.Future[Refusal | None] = asyncio.get_running_loop().create_future()

    # Of the transport.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._owner.opening = self
        self._flush()

    def data_received(self, data: bytes) -> None:
        now = time.monotonic_ns()
        if not self.opened.done():
            data = self._shake_hands(data)
        if self._closed or not data:
            return
        if self._rest:
            data = self._rest + data
        items, used = self._reader.read(data)
        self._rest = data[used:]
        for item in items:
            if self._closed:
                return
            if isinstance(item, Events):
                self._owner.receive_events(item, now)
            elif isinstance(item, Text):
                self._owner.receive_text(item.payload, now)
            else:
                self._receive_other(item.raw, now)

    def eof_received(self) -> None:
        if not self.opened.done():
            # The body of a refusal may reach to the end.
            self._sans_io.receive_eof()
            self._refused()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self._closed = True
            self.opened.set_result(Refusal("hung_up"))
        self._close(1006, time.monotonic_ns())

    def _shake_hands(self, data: bytes) -> bytes:
        """Returns what follows the server's answer."""
        data, self._rest = self._rest + data, b""
        head, blank, rest = data.partition(b"\r\n\r\n")
        if not blank:
            self._rest = data
        elif head.startswith(b"HTTP/1.1 101 "):
            self._sans_io.receive_data(head + blank)
            if self._sans_io.handshake_exc is None:
                self._sans_io.events_received()
                self.opened.set_result(None)
                return rest
            self._refused()
        else:
            self._sans_io.receive_data(data)
            if self._sans_io.handshake_exc is not None:
                self._refused()
            # Else the rest of the body is still to come.
        return b""

    def _refused(self) -> None:
        responses = [
            event for event in self._sans_io.events_received() if isinstance(event, Response)
        ]
        self.opened.set_result(refusal_of(responses[0]) if responses else Refusal("no_http"))
        self._closed = True
        self._transport.abort()

    def _receive_other(self, raw: bytes, now: int) -> None:
        sans_io = self._sans_io
        sans_io.receive_data(raw)
        self._flush()
        for frame in sans_io.events_received():
            # This server sends no text in fragments, but what stands before it may.
            if isinstance(frame, Frame) and frame.opcode in (Opcode.TEXT, Opcode.CONT):
                self._fragments += frame.data
                if frame.fin:
                    text, self._fragments = self._fragments, b""
                    self._owner.receive_text(text, now)
        close = sans_io.close_rcvd
        if close is not None or sans_io.parser_exc is not None:
            # It is for the server to end the connection (RFC 6455 section 7.1.1).
            asyncio.get_running_loop().call_later(CLOSE_SECONDS, self._transport.abort)
            self._close(1006 if close is None else close.code, now)

    def _close(self, code: int, now: int) -> None:
        if not self._closed:
            self._closed = True
            self._owner.closed(code, now)

    def _flush(self) -> None:
        for data in self._sans_io.data_to_send():
            if data:
                self._transport.write(data)

    # Of the owner.

    def send(self, command: dict[str, object]) -> None:
        self._sans_io.send_text(orjson.dumps(command))
        self._flush()

    def leave(self) -> None:
        """Say goodbye; the server closes. The owner is not told."""
        if not self._closed:
            self._closed = True
            self._sans_io.send_close(1000)
            self._flush()

    def cut(self) -> None:
        """Vanish, as a client does whose network is gone. The owner is not told."""
        self._closed = True
        self._transport.abort()

    def stop_reading(self) -> None:
        self._transport.pause_reading()
        self._receive_buffer(STOPPED_BUFFER)

    def read_on(self) -> None:
        self._receive_buffer(USUAL_BUFFER)
        if not self._transport.is_closing():
            self._transport.resume_reading()

    def _receive_buffer(self, size: int) -> None:
        sock = self._transport.get_extra_info("socket")
        if sock is not None and not self._transport.is_closing():
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def refusal_of(response: Response) -> Refusal:
    try:
        code = f"_{orjson.loads(response.body or b'')['error']['code']}"
    except (ValueError, LookupError, TypeError):
        code = ""
    after = response.headers.get("Retry-After", "")
    return Refusal(
        f"{response.status_code}{code}",
        float(after) if after.isdigit() else None,
        final=400 <= response.status_code < 500 and response.status_code != 429,
    )

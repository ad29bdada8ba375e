"""One client's transport: bytes in and out, flow control, closing.

An asyncio.BufferedProtocol around websockets' Sans-I/O ServerProtocol. It knows nothing of rooms
and tokens: a request goes to the listener, a text message to the hub, and both tell it what to
send.

What goes out bypasses ServerProtocol: a server's frames are not masked, so one frame's bytes
serve every receiver, and many frames go out in one write.
"""

from __future__ import annotations

import asyncio
import socket
import time
from collections.abc import Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING, NamedTuple, Protocol, cast

from websockets.exceptions import (
    HeaderLineTooLong,
    InvalidHandshake,
    RequestLineTooLong,
    TooManyHeaders,
)
from websockets.extensions import ServerExtensionFactory
from websockets.extensions.permessage_deflate import PerMessageDeflate
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request, Response
from websockets.protocol import State as WebSocketState
from websockets.server import ServerProtocol

from chatserver.core import errors, frames
from chatserver.core.errors import Disconnect
from chatserver.metrics import ABNORMAL, GOODBYES, OTHER, measured
from chatserver.net.http import refuse

if TYPE_CHECKING:
    from chatserver.core.protocol import ChatProtocol
    from chatserver.net.members import Member

WRITE_HIGH = 32_768
"""Above this the connection is lagging; uvloop's own default is 64 KiB, under TLS 512 KiB."""
_TCP_NOTSENT_LOWAT = 25  # linux/tcp.h; Python names it from 3.12 on
NOTSENT_LOWAT = 16_384
"""Without it the kernel takes megabytes for a reader that has stopped before anyone notices."""
WRITE_ABORT = 1_048_576
"""Replies and pongs that nobody reads: beyond this there is nobody."""
MAX_FRAGMENTS = 4096
READ_BYTES = 16_384
"""Read from one connection before the others have their turn: 2,700 of the smallest frames."""
CLOSE_SECONDS = 2.0
"""How long the peer has to answer a close frame."""

# One for all connections: what is read is taken over before the next read.
_READ_BUFFER = memoryview(bytearray(READ_BYTES))

PING = Frame(Opcode.PING, b"").serialize(mask=False)


def prepare(listening: socket.socket) -> None:
    """Set what the sockets accepted from it inherit: that costs none of them a system call."""
    listening.setsockopt(socket.IPPROTO_TCP, _TCP_NOTSENT_LOWAT, NOTSENT_LOWAT)


def farewell(why: Disconnect, after: int | None = None) -> bytes:
    """Bye and close frame, the same for everyone who must go for this reason."""
    close = Frame(Opcode.CLOSE, Close(why.code, why.reason).serialize())
    return text_frame(frames.bye(why, after)) + close.serialize(mask=False)


def text_frame(payload: bytes) -> bytes:
    """A whole text message as a server sends it (RFC 6455 section 5.2), for any receiver."""
    size = len(payload)
    if size < 126:
        return b"\x81%c" % size + payload
    if size < 65_536:
        return b"\x81\x7e" + size.to_bytes(2, "big") + payload
    return b"\x81\x7f" + size.to_bytes(8, "big") + payload


class Phase(Enum):
    HANDSHAKE = auto()
    OPEN = auto()
    CLOSING = auto()
    """Our close frame is out, or the peer's is in: nothing is delivered or accepted any more."""
    LOST = auto()


class Accepted(NamedTuple):
    """What answers a handshake's request: ``Sec-WebSocket-Accept``, ``-Extensions``."""

    key: str
    extensions: str | None


class Owner(Protocol):
    """Who is told what happens on a connection; the listener, on the hub's behalf."""

    def connected(self, connection: Connection) -> None: ...
    def requested(self, connection: Connection, request: Request) -> None: ...
    def received(self, connection: Connection, message: bytes) -> None: ...
    def violated(self, connection: Connection, why: Disconnect) -> None: ...
    def stalled(self, connection: Connection) -> None: ...
    def drained(self, connection: Connection) -> None: ...
    def holding(self, connection: Connection) -> None: ...
    def ended(self, connection: Connection) -> None: ...
    def lost(self, connection: Connection) -> None: ...


class _Silent:
    """websockets' logger: a peer that goes away is not worth a line, let alone a traceback."""

    @staticmethod
    def isEnabledFor(level: int) -> bool:  # noqa: N802 (logging's name)
        return False

    @staticmethod
    def _ignore(*args: object, **kwargs: object) -> None: ...

    debug = info = warning = error = exception = critical = log = _ignore


_SILENT = _Silent()


class Connection(asyncio.BufferedProtocol):
    """``chat`` is set once the handshake has succeeded; ``since`` in milliseconds.

    ``window_bits`` is the window of what may be sent to it compressed; 0: nothing may.
    """

    __slots__ = (
        "__weakref__",
        "_early",
        "_fragments",
        "_head_only",
        "_held",
        "_owner",
        "_severed",
        "_text",
        "_timer",
        "_websocket",
        "address",
        "chat",
        "congested",
        "due_at",
        "expires_at",
        "id",
        "lagging_since",
        "memberships",
        "openings",
        "peer",
        "phase",
        "pinged_at",
        "received_at",
        "revoked",
        "since",
        "transport",
        "window_bits",
        "writing_paused",
    )

    transport: asyncio.Transport
    chat: ChatProtocol

    def __init__(
        self, owner: Owner, frame_bytes: int, extensions: Sequence[ServerExtensionFactory] = ()
    ) -> None:
        self._owner = owner
        self._websocket = ServerProtocol(
            max_size=frame_bytes,
            extensions=extensions,
            logger=_SILENT,  # type: ignore[arg-type]
        )
        self._early: Sequence[object] | None = None
        self._fragments: list[bytes] | None = None
        self._head_only = False
        self._held = b""
        self._severed = False
        self._text = True
        self._timer: asyncio.TimerHandle | None = None
        self.phase = Phase.HANDSHAKE
        self.id = ""
        self.peer = ""
        self.address = ""
        self.since = 0
        self.window_bits = 0
        self.memberships: dict[str, Member] = {}
        self.openings: set[str] | None = None
        self.expires_at = 0.0
        self.received_at = 0.0
        self.due_at = 0.0
        self.pinged_at = 0.0
        self.revoked = False
        self.writing_paused = False
        self.congested = False
        self.lagging_since: float | None = None

    @property
    def ending(self) -> str:
        """The close code to count it under, when websockets has ended it.

        Codes that mean something here are the server's: from a peer they say nothing.
        """
        received, sent = self._websocket.close_rcvd, self._websocket.close_sent
        if received is not None:
            return str(received.code) if received.code in GOODBYES else OTHER
        return ABNORMAL if sent is None else str(sent.code)

    def __repr__(self) -> str:
        return f"<Connection {self.id or 'new'} {self.phase.name}>"

    # asyncio.BufferedProtocol.

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)
        self.transport.set_write_buffer_limits(high=WRITE_HIGH)
        peer = transport.get_extra_info("peername")
        self.peer = peer[0] if peer else ""
        self._owner.connected(self)

    def get_buffer(self, sizehint: int) -> memoryview:
        return _READ_BUFFER

    def buffer_updated(self, nbytes: int) -> None:
        # The loop's own clock stands still within a millisecond; who was silent longest is finer.
        self.received_at = time.monotonic()
        measured.received_bytes += nbytes
        self._receive_data(_READ_BUFFER[:nbytes])
        if nbytes == READ_BYTES and self._readable():
            self.transport.pause_reading()
            asyncio.get_running_loop().call_soon(self._read_on)

    def _receive_data(self, data: memoryview) -> None:
        if self._severed:
            return
        websocket = self._websocket
        try:
            websocket.receive_data(data)  # type: ignore[arg-type]  # bytes-like is what it needs
        except EOFError:
            return  # bytes after the end of the stream
        events = websocket.events_received()
        if self.phase is Phase.HANDSHAKE:
            self._receive_handshake(events)
            return
        if websocket.state is WebSocketState.OPEN:
            self._relay()  # pongs, before what the same bytes bring about
        for event in events:
            if self.phase is not Phase.OPEN:
                break
            self._receive(cast(Frame, event))
        # After the messages: what answers them must not follow websockets' close frame.
        self._relay()
        if self.phase is Phase.OPEN and websocket.state is not WebSocketState.OPEN:
            self._end()

    def eof_received(self) -> bool:
        self._websocket.receive_eof()
        if self.phase is Phase.HANDSHAKE:
            # The answer to its request may come before the transport says that it is closed.
            self.phase = Phase.CLOSING
        return False  # the transport closes

    def connection_lost(self, exc: Exception | None) -> None:
        self.phase = Phase.LOST
        self.cancel_deadline()
        # The parser is a generator that refers to its protocol: a cycle, which only a full
        # collection would free, and those are rare (app.py).
        self._websocket.parser.close()
        self._owner.lost(self)

    def pause_writing(self) -> None:
        self.writing_paused = True
        if self.phase is Phase.OPEN:
            # Who does not read is not read from: replies and pongs stay bounded, too.
            self.transport.pause_reading()
            self._owner.stalled(self)

    def resume_writing(self) -> None:
        self.writing_paused = False
        if self.phase is Phase.OPEN:
            self._read_on()
            self._owner.drained(self)

    def _readable(self) -> bool:
        return self.phase is Phase.OPEN and not self.writing_paused and not self.congested

    def _read_on(self) -> None:
        if self._readable() and not self.transport.is_closing():
            self.transport.resume_reading()

    # The handshake.

    def set_deadline(self, seconds: float) -> None:
        """Abort unless ``cancel_deadline`` comes first."""
        self.cancel_deadline()
        self._timer = asyncio.get_running_loop().call_later(seconds, self.abort)

    def cancel_deadline(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def hold(self) -> None:
        """Read nothing until the answer: who asked may end its side before it."""
        if not self.transport.is_closing():
            self.transport.pause_reading()

    def accept(self, request: Request) -> Accepted | None:
        """What the request gets (RFC 6455 section 4.2.2); None: it asks in vain."""
        try:
            key, extensions, _ = self._websocket.process_request(request)
        except InvalidHandshake:
            return None
        for extension in self._websocket.extensions:
            assert isinstance(extension, PerMessageDeflate)
            self.window_bits = extension.local_max_window_bits
        return Accepted(key, extensions)

    def open(self, request: Request, data: bytes) -> None:
        """Send the 101, and whole frames behind it: from here on there are messages."""
        # websockets' parser keeps the request: 2.9 KB a socket, and the token among it.
        del request.method, request.path, request.protocol, request.headers
        self._websocket.state = WebSocketState.OPEN
        self.phase = Phase.OPEN
        self.write(data)
        self.flush()  # A farewell in the same turn would take the place of what is still held.
        self._relay()  # pongs before their time

    def begin(self) -> None:
        """Receive: first what came along with the request, a message before its time."""
        early, self._early = self._early, None
        for event in early or ():
            if self.phase is Phase.OPEN:
                self._receive(cast(Frame, event))
        self._read_on()

    def respond(self, response: Response) -> None:
        """Send an answer that ends the connection."""
        if self._head_only:
            response.body = b""  # RFC 9110 section 9.3.2
        if not self.transport.is_closing():
            self.transport.resume_reading()  # its end must be noticed
        self._websocket.data_to_send()  # pongs before their time
        self._websocket.send_response(response)
        self._end()

    def _receive_handshake(self, events: Sequence[object]) -> None:
        if self._websocket.eof_sent and self._websocket.handshake_exc is None:
            # Frames came along with the request, and were none: another request, most likely.
            self._refuse_malformed(ValueError("frames before their time"))
        elif self._early is not None:
            # The request takes a moment to be answered: read nothing more until then.
            self._early = [*self._early, *events]
            self.transport.pause_reading()
        elif events and isinstance(events[0], Request):
            self._early = events[1:]
            self._head_only = events[0].method == "HEAD"
            self._owner.requested(self, events[0])
        elif self._websocket.handshake_exc is not None:
            self._refuse_malformed(self._websocket.handshake_exc)

    def _refuse_malformed(self, error: Exception) -> None:
        """websockets ends what is not HTTP in silence, and long lines in plain text."""
        self._websocket.data_to_send()
        match error:
            case RequestLineTooLong():
                refusal = errors.URI_TOO_LONG
            case HeaderLineTooLong() | TooManyHeaders():
                refusal = errors.HEADERS_TOO_LARGE
            case _:
                refusal = errors.BAD_REQUEST
        measured.handshakes.count(refusal.code)
        self._write(refuse(refusal).serialize())
        self._half_close()
        self._end()

    # Messages.

    def _receive(self, frame: Frame) -> None:
        match frame.opcode:
            case Opcode.TEXT | Opcode.BINARY if frame.fin:
                self._deliver(frame.opcode is Opcode.TEXT, bytes(frame.data))
            case Opcode.TEXT | Opcode.BINARY:
                self._text = frame.opcode is Opcode.TEXT
                self._fragments = [bytes(frame.data)]
            case Opcode.CONT:
                self._receive_fragment(frame)
            case Opcode.CLOSE:
                self._end()
            case _:
                pass  # a pong is known by its arrival, a ping is answered already

    def _receive_fragment(self, frame: Frame) -> None:
        assert self._fragments is not None  # websockets has refused a stray one
        self._fragments.append(bytes(frame.data))
        if len(self._fragments) > MAX_FRAGMENTS:
            self._websocket.fail(errors.MESSAGE_TOO_BIG.code, "too many fragments")
            self._end()
        elif frame.fin:
            message, self._fragments = b"".join(self._fragments), None
            self._deliver(self._text, message)

    def _deliver(self, text: bool, message: bytes) -> None:
        if text:
            self._owner.received(self, message)
        else:
            self._owner.violated(self, errors.BAD_FRAME)

    # Sending and closing.

    def send(self, payload: bytes) -> None:
        """One frame's JSON."""
        if self.phase is Phase.OPEN:
            self.write(text_frame(payload))

    def write(self, data: bytes) -> None:
        """Whole WebSocket frames, which leave at the end of the loop's turn. Only while OPEN.

        The kernel's send is what costs, and one turn may bring several replies and an event.
        """
        if not self._held:
            self._owner.holding(self)
        self._held += data
        if len(self._held) > WRITE_HIGH:
            self.flush()

    def write_now(self, data: bytes) -> None:
        """As ``write``, at the end of a turn; the caller counts these bytes."""
        if self._held:
            measured.sent_bytes += len(self._held)
            data, self._held = self._held + data, b""
        self.transport.write(data)

    def flush(self) -> None:
        """Write what is held."""
        held, self._held = self._held, b""
        if held:
            measured.sent_bytes += len(held)
            self.transport.write(held)
            if self.writing_paused and self.transport.get_write_buffer_size() > WRITE_ABORT:
                self.abort()

    def hold_reading(self, congested: bool) -> None:
        """Stop reading while too many commands are under way; go on afterwards."""
        if congested != self.congested and self.phase is Phase.OPEN:
            self.congested = congested
            if congested:
                self.transport.pause_reading()
            else:
                self._read_on()

    def close(self, why: Disconnect, after: int | None) -> None:
        """Say bye and close; the peer has two seconds to do the same."""
        if self.phase is not Phase.OPEN:
            return
        self.deafen()
        if self.transport.is_closing():
            return
        # By itself, for websockets may have ended it already: over what came behind the offence,
        # in one segment with it.
        if self._websocket.state is WebSocketState.OPEN:
            self._websocket.send_close(why.code, why.reason)
        self._websocket.data_to_send()
        self._held += farewell(why, after)
        self.flush()
        if self._websocket.eof_sent:
            self._half_close()
        # The peer's close frame is awaited; with unread bytes the kernel would answer them with
        # a reset that overtakes our close frame.
        self.transport.resume_reading()
        self.set_deadline(CLOSE_SECONDS)

    def deafen(self) -> None:
        """From this moment on nothing is accepted from the peer nor delivered to it."""
        self.phase = Phase.CLOSING
        self.serve_until(0.0)

    def serve_until(self, moment: float) -> None:
        """Deliver until then: when its token expires."""
        self.expires_at = moment
        for member in self.memberships.values():
            member.room.part()

    def sever(self, farewell: bytes) -> None:
        """Send the farewell and the end of the stream at once; the owner aborts what is left.

        A polite close would leave a peer that ignores it seconds in which to go on.
        """
        if self.transport.is_closing() or self._severed:
            return
        if self.transport.get_write_buffer_size():
            # What waits there must not reach it, and nothing can overtake it.
            self.transport.abort()
            return
        self._severed = True
        self._held = b""
        self._write(farewell)
        if self.transport.can_write_eof():
            self._write_eof()

    def abort(self) -> None:
        self.transport.abort()

    def _write(self, data: bytes) -> None:
        """The last that it gets."""
        measured.sent_bytes += len(data)
        self.transport.write(data)

    def _relay(self) -> None:
        """Send what websockets has to say by itself: the 101, pongs, a close frame."""
        writes = self._websocket.data_to_send()
        if not writes:
            return
        end = writes[-1] == b""
        data = b"".join(writes)
        if data:
            self.write(data)
        if end:
            self.flush()
            self._half_close()

    def _end(self) -> None:
        """websockets has ended it: a response, an echoed close frame, or an error's."""
        self.deafen()
        self._owner.ended(self)
        self._relay()
        self.flush()
        self.set_deadline(CLOSE_SECONDS)
        if self._websocket.close_rcvd is not None:
            self.transport.close()

    def _half_close(self) -> None:
        if self.transport.is_closing():
            return
        if self._websocket.close_rcvd is not None or not self.transport.can_write_eof():
            self.transport.close()
            return
        self._write_eof()

    def _write_eof(self) -> None:
        try:
            self.transport.write_eof()
        except (OSError, RuntimeError):  # uvloop: the socket may be gone already
            self.transport.abort()

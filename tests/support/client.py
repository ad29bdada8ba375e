"""Thin clients that decide nothing: one over the websockets library, one over a bare socket."""

from __future__ import annotations

import asyncio
import json
import socket
from collections.abc import Callable
from typing import Any, Self
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed
from websockets.frames import Frame as WebSocketFrame
from websockets.frames import Opcode
from websockets.typing import Subprotocol

from tests.support.worker import PATIENCE

Frame = dict[str, Any]
Predicate = Callable[[Frame], object]


class Client:
    """A WebSocket whose frames can be asked for out of turn; ``seen`` keeps them as they came."""

    def __init__(self, socket: ClientConnection) -> None:
        self.socket = socket
        self.seen: list[Frame] = []
        self._unasked: list[Frame] = []
        self.welcome: Frame = {}
        self._ids = 0

    @classmethod
    async def connect(
        cls,
        url: str,
        token: str | None = None,
        *,
        subprotocol: bool = False,
        welcome: bool = True,
        headers: dict[str, str] | None = None,
        **options: Any,
    ) -> Self:
        """With ``subprotocol`` the token goes where a browser puts it, else in a header."""
        headers = dict(headers or {})
        if token is not None and subprotocol:
            options["subprotocols"] = [Subprotocol("chat.v1"), Subprotocol(f"bearer.{token}")]
        elif token is not None:
            headers["Authorization"] = f"Bearer {token}"
        options = {"compression": None, "ping_interval": None, "max_size": None} | options
        client = cls(
            await connect(
                url,
                additional_headers=headers,
                open_timeout=PATIENCE,
                close_timeout=PATIENCE,
                proxy=None,
                **options,
            )
        )
        if welcome:
            client.welcome = await client.receive()
            assert client.welcome["type"] == "welcome"
        return client

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.drop()

    async def drop(self) -> None:
        """Vanish. A close frame would wait behind all that has not been read."""
        self.socket.transport.abort()
        await self.socket.wait_closed()

    async def close(self) -> None:
        """Leave politely; everything must have been read."""
        await self.socket.close()

    # Sending.

    async def send(self, frame: Frame | str | bytes) -> None:
        """An object as JSON; text and bytes as they are."""
        await self.socket.send(json.dumps(frame) if isinstance(frame, dict) else frame)

    async def ask(self, type: str, **fields: Any) -> Frame:
        """Send a command and return its ack or error, whatever else comes before."""
        id = await self.command(type, **fields)
        return await self.expect(lambda frame: frame.get("id") == id)

    async def command(self, type: str, **fields: Any) -> Any:
        """Send a command without waiting; returns the id it got."""
        if "id" not in fields:
            self._ids += 1
            fields["id"] = self._ids
        await self.send({"type": type, **fields})
        return fields["id"]

    async def join(self, room: str, **fields: Any) -> Frame:
        ack = await self.ask("join", room=room, **fields)
        assert ack["type"] == "ack", ack
        return ack

    async def publish(self, room: str, body: Any = None, **fields: Any) -> Frame:
        ack = await self.ask("send", room=room, body=body, **fields)
        assert ack["type"] == "ack", ack
        return ack

    async def ping(self) -> Frame:
        """A round trip: what was on its way to here has come when it returns."""
        return await self.ask("ping")

    # Receiving.

    async def receive_text(self, within: float = 0) -> str:
        async with asyncio.timeout(within or PATIENCE):
            text = await self.socket.recv()
        assert isinstance(text, str)
        return text

    async def _take(self, within: float = 0) -> Frame:
        frame: Frame = json.loads(await self.receive_text(within))
        self.seen.append(frame)
        return frame

    async def receive(self, within: float = 0) -> Frame:
        """The next frame that was not asked for before."""
        return self._unasked.pop(0) if self._unasked else await self._take(within)

    def forget(self) -> None:
        """Nobody will ask for what has come so far."""
        self._unasked.clear()

    async def expect(self, wanted: Predicate | str, within: float = 0) -> Frame:
        """The first frame that matches; a str is a type. Others stay, to be asked for later."""
        matches = (lambda frame: frame["type"] == wanted) if isinstance(wanted, str) else wanted
        for place, frame in enumerate(self._unasked):
            if matches(frame):
                return self._unasked.pop(place)
        async with asyncio.timeout(within or PATIENCE):
            while not matches(frame := await self._take()):
                self._unasked.append(frame)
        return frame

    async def messages(self, count: int, room: str | None = None) -> list[Frame]:
        """The next so many ``message`` events."""
        return [
            await self.expect(
                lambda f: f["type"] == "message" and (room is None or f["room"] == room)
            )
            for _ in range(count)
        ]

    async def until_closed(self, within: float = 0) -> tuple[list[Frame], int]:
        """Every frame not asked for until the server closes, and the close code."""
        frames, self._unasked = self._unasked, []
        try:
            async with asyncio.timeout(within or PATIENCE):
                while True:
                    frames.append(await self._take())
        except ConnectionClosed as closed:
            return frames, 1006 if closed.rcvd is None else closed.rcvd.code

    def seen_in(self, room: str) -> list[Frame]:
        """Messages and skips of a room so far."""
        return [f for f in self.seen if f["type"] in ("message", "skip") and f["room"] == room]


# --- bare sockets --------------------------------------------------------------------------


class Answer:
    """An HTTP response, taken apart no further than needed."""

    def __init__(self, raw: bytes) -> None:
        self.raw = raw
        head, _, self.body = raw.partition(b"\r\n\r\n")
        status, *lines = head.decode("latin-1").split("\r\n")
        self.status = int(status.split(" ")[1]) if status else 0
        """0: the server just hung up."""
        self.headers = [
            (name.strip().lower(), value.strip())
            for name, _, value in (line.partition(":") for line in lines)
        ]

    def __repr__(self) -> str:
        return f"<Answer {self.raw!r}>"

    def header(self, name: str) -> str | None:
        values = [value for key, value in self.headers if key == name.lower()]
        assert len(values) <= 1, self.headers
        return values[0] if values else None

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str:
        return str(self.json["error"]["code"])


class Raw:
    """A TCP connection on which anything may be said."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer

    @classmethod
    async def connect(cls, url: str, *, receive_buffer: int | None = None) -> Self:
        parts = urlsplit(url)
        sock = socket.socket()
        sock.setblocking(False)
        if receive_buffer is not None:
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(sock, (parts.hostname, parts.port))
        except OSError:
            sock.close()
            raise
        # A small limit: what is not asked for stays in the kernel, and the peer notices.
        return cls(*await asyncio.open_connection(sock=sock, limit=2**16))

    @classmethod
    async def upgraded(
        cls, url: str, token: str, *, headers: dict[str, str] | None = None, **options: Any
    ) -> Self:
        """Past the handshake and the welcome."""
        raw = await cls.connect(url, **options)
        headers = upgrade_headers() | {"Authorization": f"Bearer {token}"} | (headers or {})
        raw.write(request(url, headers=headers))
        answer = await raw.head()
        assert answer.status == 101, answer
        assert (await raw.frame())[0] == Opcode.TEXT
        return raw

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        self._writer.transport.abort()
        await asyncio.gather(self._writer.wait_closed(), return_exceptions=True)

    def write(self, data: bytes) -> None:
        self._writer.write(data)

    def write_eof(self) -> None:
        self._writer.write_eof()

    async def drain(self) -> None:
        await self._writer.drain()

    def unsent(self) -> int:
        """Bytes that the kernel has not taken: the peer does not read."""
        return self._writer.transport.get_write_buffer_size()

    def closed(self) -> bool:
        """The connection was found to be lost."""
        return self._writer.transport.is_closing()

    def text(self, frame: Frame | str) -> None:
        payload = frame if isinstance(frame, str) else json.dumps(frame)
        self.write(masked(Opcode.TEXT, payload.encode()))

    async def head(self) -> Answer:
        async with asyncio.timeout(PATIENCE):
            return Answer(await self._reader.readuntil(b"\r\n\r\n"))

    async def read_to_end(self, within: float = 0) -> bytes:
        """Everything until the peer ends it, politely or not."""
        data = b""
        async with asyncio.timeout(within or PATIENCE):
            try:
                while chunk := await self._reader.read(65536):
                    data += chunk
            except ConnectionError:
                pass
        return data

    async def answer(self, within: float = 0) -> Answer:
        return Answer(await self.read_to_end(within))

    async def frame(self, *, pings: bool = False) -> tuple[int, bytes]:
        """One frame from the server: its opcode and payload. Its pings only if they are wanted."""
        async with asyncio.timeout(PATIENCE):
            while True:
                first, second = await self._reader.readexactly(2)
                assert first & 0x80, "the server fragments nothing"
                assert not second & 0x80, "a server masks nothing"
                size = second & 0x7F
                if size > 125:
                    size = int.from_bytes(await self._reader.readexactly(2 if size == 126 else 8))
                opcode, payload = first & 0x0F, await self._reader.readexactly(size)
                if pings or opcode != Opcode.PING:
                    return opcode, payload

    async def json(self) -> Frame:
        """The next text frame, decoded."""
        while (frame := await self.frame())[0] != Opcode.TEXT:
            assert frame[0] == Opcode.PONG, frame
        decoded: Frame = json.loads(frame[1])
        return decoded

    async def until_closed(self) -> tuple[list[Frame], int]:
        """Every text frame until the close frame, and its code; 1006 when none came."""
        frames: list[Frame] = []
        try:
            while True:
                opcode, payload = await self.frame()
                if opcode == Opcode.CLOSE:
                    return frames, int.from_bytes(payload[:2])
                if opcode == Opcode.TEXT:
                    frames.append(json.loads(payload))
        except (asyncio.IncompleteReadError, ConnectionError):
            return frames, 1006


def masked(opcode: int, payload: bytes = b"", *, fin: bool = True, rsv: int = 0) -> bytes:
    """A client's frame."""
    frame = WebSocketFrame(Opcode(opcode), payload, fin=fin).serialize(mask=True)
    return bytes([frame[0] | rsv << 4]) + frame[1:]


def upgrade_headers() -> dict[str, str]:
    return {
        "Connection": "Upgrade",
        "Upgrade": "websocket",
        "Sec-WebSocket-Key": "dGhlIHNhbXBsZSBub25jZQ==",
        "Sec-WebSocket-Version": "13",
    }


def request(
    url: str,
    path: str | None = None,
    *,
    method: str = "GET",
    headers: dict[str, str] | None = None,
    more: list[tuple[str, str]] | None = None,
) -> bytes:
    """A request's bytes. ``more`` may repeat a header."""
    parts = urlsplit(url)
    fields = list(({"Host": parts.netloc} | (headers or {})).items()) + (more or [])
    lines = [f"{method} {parts.path if path is None else path} HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in fields]
    return "".join(f"{line}\r\n" for line in [*lines, ""]).encode("latin-1")


async def http(url: str, path: str | None = None, **options: Any) -> Answer:
    """One request and its answer."""
    return await exchange(url, request(url, path, **options))


async def exchange(url: str, data: bytes, within: float = 0) -> Answer:
    """Any bytes, and what the server says to them until it hangs up."""
    async with await Raw.connect(url) as raw:
        raw.write(data)
        return await raw.answer(within)


async def refused(url: str, token: str | None = None, **options: Any) -> Answer:
    """A handshake with this token, which must not succeed."""
    headers = upgrade_headers() | options.pop("headers", {})
    if token is not None:
        headers["Authorization"] = f"Bearer {token}"
    answer = await http(url, headers=headers, **options)
    assert answer.status != 101, answer
    return answer

"""One connection, from a URL and a token to its end, or the reason why there is none.

The border to websockets: none of its exceptions goes further than here.
"""

from __future__ import annotations

import asyncio
import functools
import json
import logging
import os
import re
import ssl
from typing import Self
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as websockets_connect
from websockets.asyncio.connection import broadcast
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.http11 import Response
from websockets.typing import Subprotocol
from websockets.uri import parse_uri

from .errors import DisconnectedError, RefusedError
from .events import Bye, FrameError, Welcome, parse, read

# The largest frame a server may send.
FRAME_BYTES = 2**20
CLOSE_SECONDS = 3.0
TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")
LOOPBACK = ("localhost", "127.0.0.1", "::1")

# At DEBUG websockets logs every header and frame, and with them the tokens. A level of its own
# keeps it from inheriting an application's DEBUG.
_transport_log = logging.getLogger("chatserver.client.transport")
_transport_log.setLevel(logging.INFO)


class _Socket(ClientConnection):
    """Remembers when it last heard anything: a pong, or a piece of a long frame, counts too."""

    heard_at = 0.0

    def data_received(self, data: bytes) -> None:
        self.heard_at = self.loop.time()
        super().data_received(data)

    def forget_handshake(self) -> None:
        """Its headers are a sixth of what a client takes, and hold the token."""
        for message in (self.request, self.response):
            if message is not None:
                message.headers.clear()


class _Dial(websockets_connect):
    """A token goes where it was sent, and nowhere else."""

    def process_redirect(self, exc: Exception) -> Exception | str:
        return exc


class Link:
    """An open connection that has been welcomed, made by `open`.

    `write` never waits: who writes must bound what is unanswered. Everything else raises
    `DisconnectedError` once the connection is lost.
    """

    __slots__ = ("_socket", "_why", "bye", "welcome")

    def __init__(self, socket: _Socket, welcome: Welcome) -> None:
        self.welcome = welcome
        self.bye: Bye | None = None
        """What the server said before its end, once it has."""
        self._socket = socket
        self._why: DisconnectedError | None = None

    @classmethod
    async def open(cls, url: str, token: str, tls: ssl.SSLContext | None, deadline: float) -> Self:
        """Connect and read the welcome, all in ``deadline`` seconds.

        Raises `RefusedError` when the server says no, `DisconnectedError` when it cannot be
        reached, and ValueError for a token that can be none.
        """
        dial = _dial(url, token, tls)
        try:
            async with asyncio.timeout(deadline):
                socket = await dial
                assert isinstance(socket, _Socket)
                socket.forget_handshake()
                return cls(socket, await _receive_welcome(socket))
        except InvalidStatus as exc:
            raise _refused(exc.response) from None
        except ConnectionClosed as exc:
            raise _disconnected(exc, None) from exc
        except FrameError as exc:
            raise DisconnectedError(1002, str(exc)) from exc
        except TimeoutError as exc:
            raise DisconnectedError(1006, f"no answer in {deadline:g} s") from exc
        except OSError as exc:
            raise DisconnectedError(1006, f"cannot connect: {_reason(exc)}") from exc
        except WebSocketException as exc:
            raise DisconnectedError(1006, f"cannot connect: {exc}") from exc

    @property
    def heard_at(self) -> float:
        """When the last byte came, by the loop's clock."""
        return self._socket.heard_at

    @property
    def port(self) -> int:
        """This end's."""
        name: tuple[str, int] | None = self._socket.transport.get_extra_info("sockname")
        return name[1] if name else 0

    def write(self, text: bytes) -> None:
        """Send a text frame; does nothing when the connection is going already."""
        broadcast([self._socket], text, text=True)

    async def receive(self) -> str | bytes:
        try:
            return await self._socket.recv()
        except ConnectionClosed as exc:
            raise self._why or _disconnected(exc, self.bye) from exc

    def abort(self, why: DisconnectedError) -> None:
        """End it without a word: whoever receives is told ``why``."""
        self._why = why
        self._socket.transport.abort()

    async def close(self, code: int = 1000) -> None:
        """Say goodbye, and wait a little for the server's."""
        await self._socket.close(code)


def check_url(url: str) -> None:
    """Raise ValueError for what is no WebSocket URL."""
    try:
        parse_uri(url)
    except InvalidURI as exc:
        raise ValueError(f"not a WebSocket URL: {exc.msg}") from None


def check_token(token: object) -> None:
    """Raise ValueError for what is no token: it must fit into a header."""
    if not isinstance(token, str):
        raise ValueError(f"a token is a string, not {type(token).__name__}")
    if not TOKEN.fullmatch(token):
        raise ValueError("a token has characters that no token has")


@functools.cache
def default_tls() -> ssl.SSLContext:
    """One for all connections: the certificates of the world are large."""
    return ssl.create_default_context()


def _reason(exc: OSError) -> str:
    """asyncio's own message names the addresses that were tried, and not always what was wrong."""
    known = exc.errno is not None and exc.errno > 0 and not isinstance(exc, ssl.SSLError)
    return os.strerror(exc.errno or 0) if known else str(exc)


def _dial(url: str, token: str, tls: ssl.SSLContext | None) -> _Dial:
    check_token(token)
    parts = urlsplit(url)
    return _Dial(
        url,
        additional_headers={"Authorization": f"Bearer {token}"},
        subprotocols=[Subprotocol("chat.v1")],
        # A deflate context for each connection would cost more memory than all the rest.
        compression=None,
        max_size=FRAME_BYTES,
        open_timeout=None,
        close_timeout=CLOSE_SECONDS,
        # Pulse keeps watch, without a task for each connection.
        ping_interval=None,
        ssl=(tls or default_tls()) if parts.scheme == "wss" else None,
        # A proxy set for the outside world knows nothing of this host's own servers.
        proxy=None if parts.hostname in LOOPBACK else True,
        logger=_transport_log,
        create_connection=_Socket,
    )


async def _receive_welcome(socket: ClientConnection) -> Welcome:
    try:
        frame = parse(await socket.recv())
        if frame.get("type") == "bye":
            bye = read(frame, Bye)
            raise DisconnectedError(bye.code, bye.reason, bye.after)
        if frame.get("type") != "welcome":
            raise FrameError("the server did not begin with a welcome")
        return read(frame, Welcome)
    except BaseException:
        socket.transport.abort()
        raise


def _disconnected(exc: ConnectionClosed, bye: Bye | None) -> DisconnectedError:
    """Say why a connection ended: the close frame counts first, then the bye that announced it."""
    if bye is not None:
        code = exc.rcvd.code if exc.rcvd and exc.rcvd.code != 1005 else bye.code
        return DisconnectedError(code, bye.reason, bye.after)
    # 1005 stands for a close frame without a code (RFC 6455 section 7.1.5).
    if exc.rcvd is not None and exc.rcvd.code != 1005:
        return DisconnectedError(exc.rcvd.code, exc.rcvd.reason)
    # What this side sent last explains it: an oversized frame, a broken one.
    return DisconnectedError(1006, exc.sent.reason if exc.sent else "connection lost")


def _refused(response: Response) -> RefusedError:
    code, message, after = read_refusal(
        response.body, response.headers.get("Retry-After"), response.reason_phrase
    )
    return RefusedError(response.status_code, code, message, after)


def read_refusal(
    body: bytes | bytearray, retry_after: str | None, reason: str
) -> tuple[str | None, str, int | None]:
    """Code, message and milliseconds to wait, of an HTTP answer that says no."""
    after = None
    if retry_after is not None and re.fullmatch("[0-9]{1,6}", retry_after):
        after = int(retry_after) * 1000
    try:
        error = json.loads(body)["error"]
        return str(error["code"]), str(error["message"]), after
    except (ValueError, LookupError, TypeError, RecursionError):
        return None, reason, after

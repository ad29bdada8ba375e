"""From a URL and a token to an open socket and its welcome, or the reason why not.

The border to websockets: none of its exceptions goes further than here and the reader.
"""

from __future__ import annotations

import asyncio
import json
import logging
import re
from collections.abc import Awaitable, Callable
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection
from websockets.asyncio.client import connect as websockets_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus, InvalidURI, WebSocketException
from websockets.http11 import Response
from websockets.typing import Subprotocol

from .errors import DisconnectedError, RefusedError
from .events import Bye, FrameError, Welcome, parse, read

TokenSource = Callable[[], Awaitable[str]]

# The largest frame a server may send.
FRAME_BYTES = 2**20
CLOSE_SECONDS = 3.0
TOKEN = re.compile(r"[A-Za-z0-9._~+/=-]+")

# At DEBUG websockets logs every header and frame, and with them the tokens. A level of its own
# keeps it from inheriting an application's DEBUG.
_transport_log = logging.getLogger("chatserver.client.transport")
_transport_log.setLevel(logging.INFO)


async def open_socket(
    url: str, token: str | TokenSource, deadline: float
) -> tuple[ClientConnection, Welcome]:
    """Open a connection and read its welcome, all in ``deadline`` seconds (the token's besides).

    Raises `RefusedError` when the server says no, `DisconnectedError` when it cannot be reached,
    and ValueError for a URL or token that can be neither.
    """
    dial = _dial(url, token if isinstance(token, str) else await fetch_token(token, deadline))
    try:
        async with asyncio.timeout(deadline):
            socket = await dial
            return socket, await _receive_welcome(socket)
    except InvalidStatus as exc:
        raise _refused(exc.response) from None
    except ConnectionClosed as exc:
        raise disconnected(exc, None) from exc
    except FrameError as exc:
        raise DisconnectedError(1002, str(exc)) from exc
    except TimeoutError as exc:
        raise DisconnectedError(1006, f"no answer in {deadline:g} s") from exc
    except (OSError, WebSocketException) as exc:
        raise DisconnectedError(1006, f"cannot connect: {exc}") from exc


async def fetch_token(source: TokenSource, deadline: float) -> str:
    """Ask the application for a token; TimeoutError when it takes longer than ``deadline``."""
    async with asyncio.timeout(deadline):
        return await source()


def disconnected(exc: ConnectionClosed, bye: Bye | None) -> DisconnectedError:
    """Say why a connection ended: the close frame counts first, then the bye that announced it."""
    if bye is not None:
        code = exc.rcvd.code if exc.rcvd else bye.code
        return DisconnectedError(code, bye.reason, bye.after)
    if exc.rcvd is not None:
        return DisconnectedError(exc.rcvd.code, exc.rcvd.reason)
    # What this side sent last explains it: a keepalive without an answer, an oversized frame.
    return DisconnectedError(1006, exc.sent.reason if exc.sent else "connection lost")


def _dial(url: str, token: str) -> websockets_connect:
    if not TOKEN.fullmatch(token):
        raise ValueError("a token has characters that no token has")
    try:
        return websockets_connect(
            url,
            additional_headers={"Authorization": f"Bearer {token}"},
            subprotocols=[Subprotocol("chat.v1")],
            # A deflate context for each connection would cost more memory than all the rest.
            compression=None,
            max_size=FRAME_BYTES,
            open_timeout=None,
            close_timeout=CLOSE_SECONDS,
            # A proxy set for the outside world knows nothing of this host's own servers.
            proxy=None if urlsplit(url).hostname in ("localhost", "127.0.0.1", "::1") else True,
            logger=_transport_log,
        )
    except InvalidURI as exc:
        raise ValueError(f"not a WebSocket URL: {exc.msg}") from None


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


def _refused(response: Response) -> RefusedError:
    seconds = response.headers.get("Retry-After", "")
    after = int(seconds) * 1000 if re.fullmatch("[0-9]{1,6}", seconds) else None
    try:
        error = json.loads(response.body)["error"]
        code, message = str(error["code"]), str(error["message"])
    except (ValueError, LookupError, TypeError, RecursionError):
        return RefusedError(response.status_code, None, response.reason_phrase, after)
    return RefusedError(response.status_code, code, message, after)

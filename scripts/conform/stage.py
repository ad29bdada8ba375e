"""One case's server and its client: who comes with which token, and what the tokens are traded for.

A script takes the connections as they arrive, and says beforehand which handshakes are to be
refused and which trades are to go wrong. Whatever a client must never do is noted as a fault, also
when the script does not look.
"""

from __future__ import annotations

import asyncio
import json
import tempfile
import time
from collections import deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import NamedTuple

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

from conform.peer import SOON, Broken, Peer

START = 20.0
"""Seconds that a program may take to start."""
SAVING = 0.4
"""Seconds that it takes to save a pair."""
LIFETIME = 900_000
VERSION = Subprotocol("chat.v1")


class Handshake(NamedTuple):
    at: float
    token: str


class Trade(NamedTuple):
    at: float
    token: str


class Pair(NamedTuple):
    access_token: str
    refresh_token: str

    def answer(self) -> dict[str, object]:
        now = int(time.time() * 1000)
        return self._asdict() | {
            "session": "s-1",
            "expires_at": now + LIFETIME,
            "refresh_expires_at": now + 7 * 86_400_000,
        }


class Lost:
    """The trade happens, and its answer never comes."""


class Stage:
    def __init__(self, command: Sequence[str], patience: float) -> None:
        self.patience = patience
        self.handshakes: list[Handshake] = []
        """All that came, the refused ones too."""
        self.trades: list[Trade] = []
        self.refusals: deque[Response] = deque()
        """What the next handshakes are answered with, in the place of a connection."""
        self.fates: deque[Response | Lost] = deque()
        """What becomes of the next trades."""
        self.cut = False
        """Every request is cut off, as when nobody is there."""
        self.must_save = False
        self.pair = Pair("access-1", "refresh-1")
        self.faults: list[str] = []
        self.url = ""
        self._command = command
        self._arrivals: asyncio.Queue[Peer] = asyncio.Queue()
        self._peers: list[Peer] = []
        self._good = {"access-1"}
        self._owners = {"access-1": "refresh-1"}
        """Which refresh token came along with an access token."""
        self._saved = {"refresh-1"}
        self._traded = ""
        self._trading = False
        self._refusal: Response | None = None
        self._process: asyncio.subprocess.Process | None = None

    # For scripts.

    async def arrival(self, within: float = 2 * SOON) -> Peer:
        """The next connection."""
        if not self._peers:
            within = START
        self._ended_early()
        assert self._process is not None
        arrival = asyncio.create_task(self._arrivals.get())
        end = asyncio.create_task(self._process.wait())
        either, seconds = [arrival, end], within * self.patience
        try:
            await asyncio.wait(either, timeout=seconds, return_when=asyncio.FIRST_COMPLETED)
            if arrival.done():
                return arrival.result()
        finally:
            for task in either:
                task.cancel()
        self._ended_early()
        raise Broken(f"no connection came in {within:g} s")

    async def nobody(self, seconds: float, *, after: int = 1) -> None:
        """For so long there is no handshake after the first ones."""
        await asyncio.sleep(seconds)
        if len(self.handshakes) > after:
            raise Broken("it came back, and should not have")

    async def tried(self, count: int, within: float) -> None:
        """So many handshakes have come in all."""
        deadline = time.monotonic() + within * self.patience
        while len(self.handshakes) < count:
            if time.monotonic() > deadline:
                raise Broken(f"{len(self.handshakes)} handshakes, not {count}, in {within:g} s")
            await asyncio.sleep(0.01)

    async def traded(self, count: int, within: float = SOON) -> Trade:
        """The latest of so many trades."""
        deadline = time.monotonic() + within * self.patience
        while len(self.trades) < count:
            if time.monotonic() > deadline:
                raise Broken(f"{len(self.trades)} trades, not {count}, in {within:g} s")
            await asyncio.sleep(0.01)
        return self.trades[count - 1]

    def expire(self) -> None:
        """No access token given so far is good any longer."""
        self._good.clear()

    def newest(self, token: object) -> None:
        """A token that a client uses must be of the pair it got last."""
        if token != self.pair.access_token:
            raise Broken(f"it came with the token {token}, and not with a new one")

    def used(self, token: str) -> None:
        if self.must_save and self._owners.get(token) not in self._saved:
            self._fault("it used a new access token before the new pair was saved")

    # The client.

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        with tempfile.TemporaryFile() as said:
            async with serve(
                self._receive,
                "127.0.0.1",
                0,
                process_request=self._respond,
                select_subprotocol=_version,
                compression=None,
                ping_interval=None,
                close_timeout=0.5,
            ) as server:
                port = next(iter(server.sockets)).getsockname()[1]
                self.url = f"ws://127.0.0.1:{port}/v1/ws"
                self._process = await asyncio.create_subprocess_exec(
                    *self._command,
                    self.url,
                    json.dumps(self.pair.answer()),
                    stdin=asyncio.subprocess.DEVNULL,
                    stdout=said,
                    stderr=said,
                )
                try:
                    yield
                    if self.faults:
                        raise Broken("it broke a rule of all cases:")
                except Broken as broken:
                    said.seek(0)
                    words = said.read().decode(errors="replace")
                    why = [str(broken), *dict.fromkeys(self.faults), *words.splitlines()[-20:]]
                    raise Broken("\n".join(why)) from None
                finally:
                    await self._end()

    async def _end(self) -> None:
        process = self._process
        assert process is not None
        if process.returncode is None:
            process.kill()
        await process.wait()
        for peer in self._peers:
            peer.abort()

    def _ended_early(self) -> None:
        process = self._process
        if process is not None and process.returncode is not None and self._arrivals.empty():
            raise Broken(f"the program ended by itself, with {process.returncode}")

    # The server.

    async def _receive(self, socket: ServerConnection) -> None:
        peer = Peer(socket, self)
        self._peers.append(peer)
        self._arrivals.put_nowait(peer)
        await peer.read()

    async def _respond(self, socket: ServerConnection, request: Request) -> Response | None:
        path, _, query = request.path.partition("?")
        if self.cut:
            socket.transport.abort()
            return refuse(503, "unavailable")
        if request.method == "OPTIONS":
            return answer(204, {})
        token = _token(request)
        match (request.method, path):
            case ("GET", "/v1/ws") if request.headers.get("Upgrade", "").lower() == "websocket":
                if "access-" in query:
                    self._fault("it put a token into the URL")
                if (offers := _offers(request)) and VERSION not in offers:
                    self._fault("it offered sub-protocols, but not chat.v1")
                self._refusal = self._judge(token)
                return self._refusal
            case ("GET", "/v1/ws"):
                # A browser asks why its handshake was refused.
                return self._refusal or refuse(426, "upgrade_required")
            case ("POST", "/v1/tokens/refresh"):
                return await self._trade(socket, token)
            case ("POST", "/saved"):
                await asyncio.sleep(SAVING)
                self._saved.add(token)
                return answer(200, {})
        return refuse(404, "not_found")

    def _judge(self, token: str) -> Response | None:
        self.handshakes.append(Handshake(time.monotonic(), token))
        if self.refusals:
            return self.refusals.popleft()
        if token not in self._good:
            return refuse(401, "token_expired" if token in self._owners else "token_invalid")
        self.used(token)
        return None

    async def _trade(self, socket: ServerConnection, token: str) -> Response:
        self.trades.append(Trade(time.monotonic(), token))
        if self._trading:
            self._fault("it made two trades at the same time")
        self._trading = True
        try:
            await asyncio.sleep(0.2)  # So that two at the same time are seen.
        finally:
            self._trading = False
        fate = self.fates.popleft() if self.fates else None
        if isinstance(fate, Response):
            return fate
        if token == self.pair.refresh_token:
            self._rotate()
        elif token != self._traded:
            self._fault(f"it presented {token}, which is spent: that ends the session")
            return refuse(401, "token_revoked")
        if isinstance(fate, Lost):
            socket.transport.abort()
        return answer(200, self.pair.answer())

    def _rotate(self) -> None:
        self._traded = self.pair.refresh_token
        number = int(self._traded.rpartition("-")[2]) + 1
        self.pair = Pair(f"access-{number}", f"refresh-{number}")
        self._owners[self.pair.access_token] = self.pair.refresh_token
        self._good.add(self.pair.access_token)

    def _fault(self, text: str) -> None:
        self.faults.append(text)


def _version(_: ServerConnection, offered: Sequence[Subprotocol]) -> Subprotocol | None:
    """Who offers none means version 1."""
    return VERSION if VERSION in offered else None


def _token(request: Request) -> str:
    """From the header or, as a browser has it, from the sub-protocols."""
    header = request.headers.get("Authorization", "")
    if header.startswith("Bearer "):
        return header.removeprefix("Bearer ")
    tokens = [offer for offer in _offers(request) if offer.startswith("bearer.")]
    return tokens[0].removeprefix("bearer.") if tokens else ""


def _offers(request: Request) -> list[str]:
    header = request.headers.get("Sec-WebSocket-Protocol", "")
    return [offer.strip() for offer in header.split(",") if offer.strip()]


def answer(status: int, body: object, **headers: str) -> Response:
    fields = {name.replace("_", "-"): value for name, value in headers.items()} | {
        "Content-Type": "application/json",
        "Cache-Control": "no-store",
        "Connection": "close",
        "Access-Control-Allow-Origin": "*",
        "Access-Control-Allow-Headers": "Authorization",
        "Access-Control-Expose-Headers": "Retry-After",
    }
    payload = b"" if status == 204 else json.dumps(body).encode()
    fields["Content-Length"] = str(len(payload))
    return Response(status, HTTPStatus(status).phrase, Headers(fields), payload)


def refuse(status: int, code: str, **headers: str) -> Response:
    return answer(status, {"error": {"code": code, "message": "No."}}, **headers)

"""A server that plays a script: one coroutine for each connection, in the order they come."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from http import HTTPStatus
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.datastructures import Headers
from websockets.http11 import Request, Response
from websockets.typing import Subprotocol

Frame = dict[str, Any]

# Far above what anything here takes, and still an answer when something hangs.
PATIENCE = 20.0

LIMITS = {
    "frame_bytes": 65536,
    "rooms": 256,
    "send_rate": 10,
    "send_burst": 20,
    "command_rate": 50,
    "command_burst": 320,
    "key_window": 600_000,
    "history": 1000,
    "replay": 1000,
}


class Peer:
    """The server's end of one connection. ``say`` and ``expect`` are all that a script needs."""

    def __init__(self, socket: ServerConnection) -> None:
        self.socket = socket

    async def welcome(
        self,
        *,
        user: str = "alice",
        expires_at: int = 900_000,
        interval: int = 25_000,
        **limits: int,
    ) -> None:
        await self.say(
            "welcome",
            protocol=1,
            connection="c1",
            session="s1",
            user=user,
            roles=["member"],
            ts=1_000,
            expires_at=expires_at,
            ping_interval=interval,
            limits=LIMITS | limits,
        )

    async def say(self, kind: str, **fields: Any) -> None:
        await self.socket.send(json.dumps({"type": kind, **fields}))

    async def hear(self) -> Frame:
        frame = json.loads(await self.socket.recv())
        assert isinstance(frame, dict)
        return frame

    async def expect(self, kind: str, **fields: Any) -> Frame:
        """The next command, which must be of this kind and have these fields."""
        frame = await self.hear()
        assert (frame["type"], frame | fields) == (kind, frame)
        return frame

    async def ack(self, command: Frame, **fields: Any) -> None:
        await self.say("ack", id=command["id"], **fields)

    async def error(self, command: Frame, code: str, **fields: Any) -> None:
        await self.say("error", id=command["id"], code=code, message="No.", **fields)

    async def admit(self, offset: int, replay: int = 0, **fields: Any) -> Frame:
        """Take a join of ``general``, ack it and replay the log's last ``replay`` events."""
        join = await self.expect("join", room="general")
        ack = {"epoch": "e1", "offset": offset, "rights": "rw", "replay": replay} | fields
        await self.ack(join, room="general", **ack)
        for missed in range(offset - replay + 1, offset + 1):
            await self.message(missed)
        return join

    async def message(
        self, offset: int, body: Any = None, user: str = "bob", room: str = "general"
    ) -> None:
        body = {"text": f"m{offset}"} if body is None else body
        await self.say("message", room=room, offset=offset, ts=1, user=user, body=body)

    async def store(self, send: Frame, offset: int) -> None:
        """Ack a send, and deliver it as the live event it has become."""
        await self.ack(send, room="general", epoch="e1", offset=offset, ts=1)
        await self.message(offset, send["body"], user="alice")

    async def renew(self, refresh: Frame) -> None:
        """Ack a refresh, and let a message follow that shows when the ack was read."""
        await self.ack(refresh, expires_at=1_800_000, roles=["member"], left=[])
        await self.message(1)

    async def bye(self, code: int, reason: str, **fields: Any) -> None:
        await self.say("bye", code=code, reason=reason, reconnect=code < 4500, **fields)
        await self.socket.close(code, reason)


Script = Callable[[Peer], Awaitable[None]]


@asynccontextmanager
async def scripted(*scripts: Script | Response) -> AsyncIterator[str]:
    """Play ``scripts`` to the connections made to the URL given; a response is a refusal.

    A script that fails fails the test, whatever the client made of it, and so does one not
    played. The connection stays open after the last line until the client closes it.
    """
    waiting = list(scripts)
    failures: list[BaseException] = []
    played: list[asyncio.Event] = []

    def respond(socket: ServerConnection, request: Request) -> Response | None:
        if waiting and isinstance(waiting[0], Response):
            return waiting.pop(0)  # type: ignore[return-value]
        return None

    async def play(socket: ServerConnection) -> None:
        done = asyncio.Event()
        played.append(done)
        try:
            script = waiting.pop(0)
            assert not isinstance(script, Response)
            await script(Peer(socket))
            await socket.wait_closed()
        except BaseException as exc:
            failures.append(exc)
            raise
        finally:
            done.set()

    server = await serve(
        play,
        "127.0.0.1",
        0,
        process_request=respond,
        subprotocols=[Subprotocol("chat.v1")],
        close_timeout=1,
    )
    port = next(iter(server.sockets)).getsockname()[1]
    try:
        async with asyncio.timeout(PATIENCE):
            yield f"ws://127.0.0.1:{port}/v1/ws"
            for done in played:
                await done.wait()
    finally:
        server.close()
        await server.wait_closed()
        for failure in failures:
            raise failure
    assert waiting == []


def refusal(status: int, body: str, **headers: str) -> Response:
    fields = {name.replace("_", "-"): value for name, value in headers.items()}
    return Response(status, HTTPStatus(status).phrase, Headers(fields), body.encode())


def refused(status: int, code: str, **headers: str) -> Response:
    """A refusal as the protocol has it."""
    return refusal(status, json.dumps({"error": {"code": code, "message": "No."}}), **headers)

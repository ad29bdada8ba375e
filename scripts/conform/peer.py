"""The server's end of one connection: what a script says, and what it hears."""

from __future__ import annotations

import asyncio
import json
import time
from collections import defaultdict
from typing import TYPE_CHECKING, Any

from websockets.asyncio.server import ServerConnection
from websockets.exceptions import ConnectionClosed

if TYPE_CHECKING:
    from conform.stage import Stage

Frame = dict[str, Any]

SOON = 5.0
"""Seconds in which a client does what it does at once."""
COMMANDS = ("join", "leave", "send", "history", "refresh", "logout", "ping")
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


class Broken(Exception):
    """A rule was broken; the text says which, to the client's author."""


class Peer:
    """Commands wait by kind, since a client may do several things at once in any order; pings are
    answered by themselves."""

    def __init__(self, socket: ServerConnection, stage: Stage) -> None:
        self.at = time.monotonic()
        self.token = stage.handshakes[-1].token
        self._socket = socket
        self._stage = stage
        self._welcomed = False
        self._heard: dict[str, asyncio.Queue[Frame]] = defaultdict(asyncio.Queue)
        self._closed = asyncio.Event()

    # What it hears.

    async def read(self) -> None:
        try:
            async for text in self._socket:
                await self._receive(text)
        except ConnectionClosed:
            pass
        finally:
            self._closed.set()

    async def _receive(self, text: str | bytes) -> None:
        try:
            frame = json.loads(text)
            kind = frame["type"]
        except (ValueError, TypeError, KeyError):
            kind = None
        if isinstance(text, bytes) or kind not in COMMANDS:
            return self._stage.faults.append(f"it sent what is no command: {text[:200]!r}")
        if not self._welcomed:
            self._stage.faults.append(f"it sent a {kind} before the welcome")
        if kind == "send" and not 0 < len(str(frame.get("key", ""))) <= 64:
            self._stage.faults.append("it sent a message without a key")
        if kind == "refresh":
            self._stage.used(str(frame.get("token")))
        if kind == "ping":
            return await self.ack(frame, ts=_now())
        self._heard[kind].put_nowait(frame)
        return None

    async def expect(self, kind: str, within: float = SOON, **fields: Any) -> Frame:
        """The next command of this kind, which must have these fields."""
        try:
            async with asyncio.timeout(within * self._stage.patience):
                frame = await self._heard[kind].get()
        except TimeoutError:
            gone = ": the connection is gone" if self._closed.is_set() else ""
            raise Broken(f"no {kind} came in {within:g} s{gone}") from None
        for name, wanted in fields.items():
            if frame.get(name) != wanted:
                raise Broken(f"a {kind} came with {name} {frame.get(name)}, and not {wanted}")
        return frame

    async def nothing(self, kind: str, seconds: float) -> None:
        """No command of this kind comes for so long."""
        try:
            async with asyncio.timeout(seconds):
                frame = await self._heard[kind].get()
        except TimeoutError:
            return
        raise Broken(f"a {kind} came that should not: {json.dumps(frame)[:200]}")

    async def sent(self, text: str, within: float = SOON) -> Frame:
        """The next message, which must be this one."""
        return await self.expect("send", within, room="general", body={"text": text})

    async def told(self, what: str, **fields: Any) -> None:
        """The application has been told of something: the program says so in a message."""
        frame = await self.expect("send")
        body = frame["body"]
        if not isinstance(body, dict) or body.get("saw") != what:
            raise Broken(f"it sent {body}, and did not say that it saw {what}")
        for name, wanted in fields.items():
            if body.get(name) != wanted:
                raise Broken(f"it saw {what} with {name} {body.get(name)}, and not {wanted}")
        await self.ack(frame, room="general", epoch="e1", offset=900, ts=_now())

    # What it says.

    async def say(self, kind: str, **fields: Any) -> None:
        try:
            await self._socket.send(json.dumps({"type": kind, **fields}))
        except ConnectionClosed:
            raise Broken(f"the client had gone when it was to be told {kind}") from None

    async def welcome(self, *, ping_interval: int = 25_000, **limits: int) -> None:
        self._welcomed = True
        now = _now()
        await self.say(
            "welcome",
            protocol=1,
            connection=f"c-{id(self)}",
            session="s-1",
            user="alice",
            roles=["member"],
            ts=now,
            expires_at=now + 900_000,
            ping_interval=ping_interval,
            limits=LIMITS | limits,
        )

    async def ack(self, command: Frame, **fields: Any) -> None:
        if "id" in command:
            await self.say("ack", id=command["id"], **fields)

    async def error(self, command: Frame, code: str, **fields: Any) -> float:
        """Refuse; returns when that was."""
        await self.say("error", id=command.get("id"), code=code, message="No.", **fields)
        return time.monotonic()

    async def admit(
        self, offset: int, *, room: str = "general", epoch: str = "e1", replay: int = 0, **more: Any
    ) -> Frame:
        """Take a join and ack it. The replayed events are the script's to send."""
        join = await self.expect("join", room=room)
        if "since" in join:
            more.setdefault("recovered", True)
        await self.ack(
            join, room=room, epoch=epoch, offset=offset, rights="rw", replay=replay, **more
        )
        return join

    async def begin(self, offset: int = 4, **limits: int) -> None:
        """Welcome a client and let it into the room, wherever it was."""
        await self.welcome(**limits)
        await self.admit(offset)

    async def resume(self, offset: int, epoch: str = "e1", **more: Any) -> Frame:
        """Welcome a client that comes back, which must go on from this position."""
        await self.welcome()
        join = await self.admit(offset, epoch=epoch, **more)
        self.goes_on_from(join, epoch, offset)
        return join

    @staticmethod
    def goes_on_from(join: Frame, epoch: str, offset: int) -> None:
        wanted = {"epoch": epoch, "offset": offset}
        if join.get("since") != wanted:
            raise Broken(f"it joined since {join.get('since')}, and not since {wanted}")

    async def message(self, offset: int, body: Any = None, room: str = "general") -> None:
        body = {"text": f"message {offset}"} if body is None else body
        await self.say("message", room=room, offset=offset, ts=_now(), user="bob", body=body)

    async def ask(self, offset: int, text: str) -> None:
        """A message that has the program send another."""
        await self.message(offset, {"do": "send", "text": text})

    async def store(self, send: Frame, offset: int, **more: Any) -> None:
        """Ack a message, and deliver it as the event it has become."""
        await self.ack(send, room="general", epoch="e1", offset=offset, ts=_now(), **more)
        if "duplicate" not in more:
            await self.say(
                "message",
                room="general",
                offset=offset,
                ts=_now(),
                user="alice",
                body=send["body"],
                key=send["key"],
            )

    async def refresh(self, *left: str) -> Frame:
        """Take a refresh, and ack it; rooms that are ``left`` are allowed no more."""
        frame = await self.expect("refresh")
        await self.ack(frame, expires_at=_now() + 900_000, roles=["member"], left=left)
        return frame

    async def renew(self) -> None:
        """Take a refresh, whose token must be of the pair given last."""
        self._stage.newest((await self.refresh())["token"])

    async def expiring(self, **more: Any) -> None:
        await self.say("expiring", expires_at=_now() + 60_000, **more)

    async def bye(self, code: int, reason: str, **fields: Any) -> float:
        """Close the connection as the protocol has it; returns when that was."""
        await self.say("bye", code=code, reason=reason, reconnect=code < 4500, **fields)
        return await self.close(code, reason)

    async def close(self, code: int, reason: str = "") -> float:
        at = time.monotonic()
        await self._socket.close(code, reason)
        return at

    def abort(self) -> float:
        """Go away without a word."""
        self._socket.transport.abort()
        return time.monotonic()

    def freeze(self) -> None:
        """The connection stands, and nothing goes either way."""
        self._socket.transport.pause_reading()


def _now() -> int:
    return int(time.time() * 1000)

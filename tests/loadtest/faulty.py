"""A chat server of a page's length that does one thing wrong."""

from __future__ import annotations

import itertools
import json
from collections import defaultdict
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

Fault = Callable[[int, str], list[str]]
"""What goes out in place of an event, by its offset."""


def keep(offset: int, event: str) -> list[str]:
    return [event]


def skip_the_third(offset: int, event: str) -> list[str]:
    return [] if offset == 3 else [event]


def double_the_third(offset: int, event: str) -> list[str]:
    return [event, event] if offset == 3 else [event]


class Swap:
    """The third after the fourth."""

    def __call__(self, offset: int, event: str) -> list[str]:
        if offset == 3:
            self._held = event
            return []
        return [event, self._held] if offset == 4 else [event]


LIMITS = {"send_rate": 10}


class _Room:
    def __init__(self) -> None:
        self.members: set[ServerConnection] = set()
        self.offsets = itertools.count(1)
        self.last = 0


@asynccontextmanager
async def faulty(fault: Fault) -> AsyncIterator[str]:
    """Serve with this fault; yields the URL."""
    rooms: defaultdict[str, _Room] = defaultdict(_Room)

    async def chat(socket: ServerConnection) -> None:
        await socket.send(json.dumps({"type": "welcome", "session": "s", "limits": LIMITS}))
        try:
            async for text in socket:
                command = json.loads(text)
                room = rooms[command["room"]]
                ack = {"type": "ack", "id": command["id"], "room": command["room"], "epoch": "e"}
                if command["type"] == "join":
                    room.members.add(socket)
                    await socket.send(json.dumps(ack | {"offset": room.last, "replay": 0}))
                else:
                    room.last = next(room.offsets)
                    await socket.send(json.dumps(ack | {"offset": room.last}))
                    await publish(room, command)
        except ConnectionClosed:
            pass
        finally:
            for room in rooms.values():
                room.members.discard(socket)

    async def publish(room: _Room, command: dict[str, Any]) -> None:
        event = json.dumps(
            {"type": "message", "room": command["room"], "offset": room.last, "ts": 1, "user": "u"}
            | {"body": command["body"]},
            separators=(",", ":"),
        )
        for out in fault(room.last, event):
            for member in list(room.members):
                await member.send(out)

    async with serve(chat, "127.0.0.1", 0, subprotocols=None, select_subprotocol=_chat) as server:
        port = next(iter(server.sockets)).getsockname()[1]
        yield f"ws://127.0.0.1:{port}/v1/ws"


def _chat(socket: ServerConnection, offered: Any) -> Any:
    return offered[0] if offered else None

"""The Python client of the chat server: asyncio, typed, independent of the server's own code.

For example::

    async with connect("wss://chat.example/v1/ws", token=fetch_token) as client:
        room = await client.join("general", last=20)
        await room.send({"text": "hello"})
        async for event in room:
            ...
"""

from __future__ import annotations

from .connection import Client, connect
from .errors import ChatError, CommandError, DisconnectedError, RefusedError
from .events import Gap, History, Left, Limits, Message, Position, Refreshed, Welcome
from .handshake import TokenSource
from .room import Event, Room

__all__ = [
    "ChatError",
    "Client",
    "CommandError",
    "DisconnectedError",
    "Event",
    "Gap",
    "History",
    "Left",
    "Limits",
    "Message",
    "Position",
    "Refreshed",
    "RefusedError",
    "Room",
    "TokenSource",
    "Welcome",
    "connect",
]

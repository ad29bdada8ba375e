"""The Python client of the chat server: asyncio, typed, independent of the server's own code.

For example::

    async with connect("wss://chat.example/v1/ws", token=fetch_token) as client:
        room = await client.join("general", last=20)
        await room.send({"text": "hello"})
        async for event in room:
            ...

It reconnects, recovers what was missed, and refreshes its token by itself.
"""

from __future__ import annotations

from .client import Client, connect
from .errors import (
    ChatError,
    CommandError,
    DisconnectedError,
    RefusedError,
    TokenRefusedError,
    UnknownOutcomeError,
)
from .events import Event, Gap, History, Left, Limits, Message, Position, Refreshed, Welcome
from .keeper import TokenKeeper, TokenPair
from .room import Room
from .states import Closed, Connecting, Open, State, Waiting
from .tokens import TokenSource

__all__ = [
    "ChatError",
    "Client",
    "Closed",
    "CommandError",
    "Connecting",
    "DisconnectedError",
    "Event",
    "Gap",
    "History",
    "Left",
    "Limits",
    "Message",
    "Open",
    "Position",
    "Refreshed",
    "RefusedError",
    "Room",
    "State",
    "TokenKeeper",
    "TokenPair",
    "TokenRefusedError",
    "TokenSource",
    "UnknownOutcomeError",
    "Waiting",
    "Welcome",
    "connect",
]

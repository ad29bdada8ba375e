"""One joined room: which events are new, which are missing, and those that wait to be taken."""

from __future__ import annotations

import asyncio
import copy
from collections import deque
from enum import Enum, auto
from typing import TYPE_CHECKING, Any, Self

from .errors import DisconnectedError
from .events import (
    Frame,
    Gap,
    History,
    JoinAck,
    Left,
    Message,
    NewEpoch,
    Position,
    read,
    read_message,
)

if TYPE_CHECKING:
    from .connection import Client

Event = Message | Gap | Left


class State(Enum):
    LIVE = auto()
    # The queue is full: events are let go until it is empty, then asked for again.
    FULL = auto()
    # A join is under way: what comes before its ack is part of the hole, or of its replay.
    REPAIRING = auto()
    ENDED = auto()


class Room:
    """A room this connection has joined: ``async for event in room`` gives its events.

    They come in order, each once: `Message`, or `Gap` where some may be missing, or `Left` when
    the server ended the stay. Iteration ends after that, after `leave`, when the room is joined
    again (by another Room) and when the client is closed; it raises `DisconnectedError` when the
    connection is lost, after the events that had arrived. Waiting for an event has no deadline.

    At most ``bound`` events wait to be taken. Past that the newest are let go, and read from the
    server's log when the others have been taken, so that a slow reader holds up nothing else; it
    gets a `Gap` if by then the log does not reach back.
    """

    def __init__(self, client: Client, ack: JoinAck, bound: int) -> None:
        self.name = ack.room
        self.head = Position(ack.epoch, ack.offset)
        """The end of the log when the room was joined: what follows it is live."""
        self.position = ack.start
        """The last event handed out. Join ``since`` here to go on after a disconnect."""
        self._client = client
        self._bound = bound
        self._queue: deque[tuple[Position, Event | None]] = deque()
        self._wake = asyncio.Event()
        self._lost: DisconnectedError | None = None
        self.receive_ack(ack)

    def __repr__(self) -> str:
        return f"<Room {self.name} {self._state.name} at {self.reached.offset}>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while True:
            while self._queue:
                self.position, event = self._queue.popleft()
                if event is not None:
                    return event
            if self._state is State.ENDED:
                if self._lost is None:
                    raise StopAsyncIteration
                raise copy.copy(self._lost)
            if self._state is State.FULL:
                self._repair()
            self._wake.clear()
            await self._wake.wait()

    async def send(self, body: Any, *, key: str | None = None, echo: bool = True) -> Position:
        """Publish to this room; see `Client.send`."""
        return await self._client.send(self.name, body, key=key, echo=echo)

    async def history(
        self, *, before: int | None = None, after: int | None = None, limit: int = 50
    ) -> History:
        """Page through this room's log; see `Client.history`."""
        return await self._client.history(self.name, before=before, after=after, limit=limit)

    async def leave(self) -> None:
        """Stop receiving this room; see `Client.leave`."""
        await self._client.leave(self.name)

    @property
    def ended(self) -> bool:
        return self._state is State.ENDED

    def receive_ack(self, ack: JoinAck) -> None:
        """Start where a join's replay starts, also when that is before what was reached."""
        self.rights = ack.rights
        self.reached = ack.start
        self._state = State.LIVE
        if not ack.recovered:
            # Not subject to the bound: what was lost must not be forgotten as well.
            missing = (ack.gap.first, ack.gap.last) if ack.gap else ()
            self._append(ack.start, Gap(self.name, ack.start, *missing))

    def receive(self, frame: Frame) -> None:
        """Take one frame that names this room and is no reply."""
        if frame["type"] == "left":
            self.end(read(frame, Left))
        elif self._state is State.LIVE:
            self._receive_live(frame)

    def end(self, why: Left | DisconnectedError | None) -> None:
        """Let no more events in; the iteration ends after those that wait."""
        if self._state is State.ENDED:
            return
        self._state = State.ENDED
        if isinstance(why, Left):
            self._append(self.reached, why)
        else:
            self._lost = why
        self._wake.set()

    def _receive_live(self, frame: Frame) -> None:
        if frame["type"] == "epoch":
            return self._put(Position(read(frame, NewEpoch).epoch, self.reached.offset), None)
        if frame["type"] == "reset":
            position = read(frame, Position)
            return self._put(position, Gap(self.name, position))
        offset = frame.get("offset")
        if not isinstance(offset, int) or offset <= self.reached.offset:
            return None
        if offset == self.reached.offset + 1:
            known = frame["type"] == "message"
            event = read_message(frame, self.reached.epoch) if known else None
            return self._put(Position(self.reached.epoch, offset), event)
        return self._repair() if len(self._queue) < self._bound else self._overflow()

    def _put(self, position: Position, event: Event | None) -> None:
        if len(self._queue) >= self._bound:
            return self._overflow()
        self.reached = position
        return self._append(position, event)

    def _append(self, position: Position, event: Event | None) -> None:
        self._queue.append((position, event))
        self._wake.set()

    def _overflow(self) -> None:
        self._state = State.FULL

    def _repair(self) -> None:
        self._state = State.REPAIRING
        self._client.repair(self)

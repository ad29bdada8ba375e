"""One joined room: the events that wait to be taken, across connections."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import TYPE_CHECKING, Any, Self

from .errors import ChatError
from .events import Event, Frame, History, JoinAck, Left, Position, read
from .positions import Place, Standing

if TYPE_CHECKING:
    from .client import Client


class Room:
    """A room that the client is in: ``async for event in room`` gives its events.

    They come in order, each once, whatever becomes of the connection: `Message`, or `Gap` where
    some may be missing, or `Left` when the server ended the stay. Iteration ends after that, after
    `leave`, when the room is joined again (by another Room) and when the client is closed; when
    the client is told not to come back it raises what `Closed` tells, after the events that had
    arrived. Waiting for an event has no deadline. One task at a time may iterate.

    At most ``bound`` events wait to be taken. Past that the newest are let go, and read from the
    server's log when half of the others have been taken, so that a slow reader holds up nothing
    else; it gets a `Gap` if by then the log does not reach back.
    """

    __slots__ = (
        "_admission",
        "_bound",
        "_client",
        "_ended",
        "_lost",
        "_place",
        "_queue",
        "_waiter",
        "head",
        "last",
        "name",
        "not_before",
        "position",
        "recovered",
        "refusals",
        "rights",
    )

    def __init__(
        self, client: Client, name: str, since: Position | None, last: int | None, bound: int
    ) -> None:
        self.name = name
        self.rights = ""
        """What this user may do here, such as ``"rw"``."""
        self.head = self.position = since or Position("", 0)
        """``head`` is the end of the log at the latest join: what follows it is live. ``position``
        is the last event handed out: join ``since`` here to go on in another process."""
        self.recovered = True
        """Whether the latest join has everything since the position before."""
        self.last = last
        self.not_before = 0.0
        """When a join that was refused for now is to be repeated."""
        self.refusals = 0
        self._admission: asyncio.Future[Exception | None] | None = None
        self._client = client
        self._bound = bound
        self._place = Place(name, since)
        self._queue: deque[tuple[Position, Event | None]] = deque()
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._lost: Exception | None = None

    def __repr__(self) -> str:
        return f"<Room {self._place!r}, {len(self._queue)} waiting>"

    def __aiter__(self) -> Self:
        return self

    async def __anext__(self) -> Event:
        while True:
            while self._queue:
                self.position, event = self._queue.popleft()
                if self.wanting and len(self._queue) == self._bound // 2:
                    self._client.rejoin(self)
                if event is not None:
                    return event
            if self._ended:
                if self._lost is None:
                    raise StopAsyncIteration
                raise self._lost.with_traceback(None)
            await self._arrival()

    async def _arrival(self) -> None:
        if self._waiter is not None:
            raise RuntimeError("another task is iterating over this room")
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    async def send(self, body: Any, *, key: str | None = None, echo: bool = True) -> Position:
        """Publish to this room; see `Client.send`."""
        return await self._client.send(self.name, body, key=key, echo=echo)

    async def history(
        self, *, before: int | None = None, after: int | None = None, limit: int = 50
    ) -> History:
        """Page through this room's log; see `Client.history`."""
        return await self._client.history(self.name, before=before, after=after, limit=limit)

    async def leave(self) -> None:
        """Stop receiving this room; see `Client.leave`. Nothing to do for one that has ended."""
        if not self._ended:
            await self._client.leave(self.name)

    # What the client asks and tells.

    @property
    def wanting(self) -> bool:
        """Whether it ought to be joined, again: it is out, and has space for what it missed."""
        return (
            not self._ended
            and self._place.standing is Standing.OUT
            and len(self._queue) <= self._bound // 2
        )

    @property
    def ended(self) -> bool:
        return self._ended

    @property
    def joined(self) -> bool:
        """Whether events come in at present."""
        return self._place.standing is Standing.LIVE

    def ask(self) -> Position | None:
        """A join is being sent; returns its ``since``."""
        return self._place.ask()

    def admit(self, ack: JoinAck) -> None:
        """The join was acked; its replay follows."""
        self.rights, self.recovered = ack.rights, ack.recovered
        self.head = Position(ack.epoch, ack.offset)
        self.refusals, self.not_before = 0, 0.0
        self._answer(None)
        gap = self._place.admit(ack)
        if gap is not None:
            # There is space: otherwise it would not have been joined.
            self._put(ack.start, gap)
        elif not self._queue:
            self.position = ack.start

    def postpone(self, until: float) -> None:
        """The join was refused for now."""
        self._place.leave()
        self.not_before = until
        self.refusals += 1

    def refuse(self, error: Exception) -> None:
        """Whoever waits for the first join is told why there will be none."""
        self._answer(error)

    async def admission(self) -> None:
        """Wait for the first join's ack. Raises its refusal, what ends the client, and `ChatError`
        when the room has ended before."""
        self._admission = asyncio.get_running_loop().create_future()
        refused = await self._admission
        self._admission = None
        if refused is not None:
            raise refused.with_traceback(None)

    def _answer(self, refused: Exception | None) -> None:
        if self._admission is not None and not self._admission.done():
            self._admission.set_result(refused)

    def lose(self) -> None:
        """The connection is gone."""
        self._place.leave()

    def receive(self, frame: Frame) -> None:
        """Take one frame that names this room and is no reply."""
        if frame["type"] == "left":
            self.end(read(frame, Left))
            return
        step = self._place.receive(frame, space=len(self._queue) < self._bound)
        if step is not None:
            self._put(*step)

    def end(self, why: Left | Exception | None) -> None:
        """Let no more events in; the iteration ends after those that wait."""
        if self._ended:
            return
        self._ended = True
        self._place.leave()
        if isinstance(why, Left):
            self._put(self._place.position or self.position, why)
        else:
            self._lost = why
        self._answer(self._lost or ChatError(f"{self.name} was left, or joined again, meanwhile"))
        self._wake()

    def _put(self, position: Position, event: Event | None) -> None:
        self._queue.append((position, event))
        self._wake()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

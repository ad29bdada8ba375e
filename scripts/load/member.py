"""One client: it connects, joins its rooms, sends what it is told to, and comes back.

It does what docs/protocol.md says and nothing else, and counts what the server does about it.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

from chatserver.client.backoff import full_jitter

from .agenda import SECOND
from .connection import Connection
from .credentials import TokenError
from .positions import Position
from .tally import Measure
from .wire import Events, body

if TYPE_CHECKING:
    from .crowd import Crowd

FINAL = 4500
"""Close codes from here on are final."""
REVOKED = 4503
LASTING = 10 * SECOND
"""A connection that has held so long starts the waits between tries from the beginning."""
RETRY_SECONDS = 0.25
"""Before a command is repeated that was answered ``unavailable``."""


class Message(NamedTuple):
    """Something to publish, until it is acked. The key makes repeating it safe."""

    room: str
    key: str
    due: int


class Command(NamedTuple):
    """Something that the server has not answered."""

    measure: Measure
    due: int
    room: str = ""
    message: Message | None = None


class Member:
    """``index`` is its number among all clients of all processes."""

    def __init__(self, crowd: Crowd, index: int, rooms: list[str]) -> None:
        self._crowd = crowd
        self.index = index
        self.rooms = rooms
        """Where it wants to be."""
        self.positions: dict[bytes, Position] = {}
        self.connection: Connection | None = None
        """From the welcome on."""
        self.opening: Connection | None = None
        """Until then."""
        self.session = ""
        self.token = ""
        self.begun = False
        """Whether its moment to connect has come."""
        self.gone = ""
        """Why it will never come back, if so."""
        self.delivery = Measure.DELIVERY
        self.on_ack: Callable[[int], object] | None = None
        self.revoked_at = 0
        self._due = 0
        self._numbers = count(1)
        self._keys = count(1)
        self._commands: dict[int, Command] = {}
        self._queue: deque[Message] = deque()
        self._in_flight = 0
        """Messages among the commands."""
        self._held_back = False
        """The server said to wait."""
        self._careful = False
        """It said so, and not everything has been sent since: one message at a time."""
        self._joining = 0
        self._behind: dict[bytes, int] = {}
        """Rooms in which it has not caught up since it came back, with the offset it needs."""
        self._welcomed_at = 0
        self._dropped_at = 0
        self._bye_after: int | None = None
        self._attempt = 0
        self._stopped: Connection | None = None
        """One that is not read."""

    def __repr__(self) -> str:
        return f"<Member {self.index} in {len(self.positions)} rooms>"

    # Coming and going.

    async def enter(self, due: int) -> None:
        """Connect, as often as it takes. The welcome is where it goes on."""
        self.begun = True
        self._due = due
        crowd = self._crowd
        while not self.gone and not crowd.over:
            try:
                self.token = await self._next_token()
                refusal = await crowd.dial(self, self.token)
            except TokenError:
                crowd.tally.counts["refused_no_token"] += 1
                self._give_up("no token")
                return
            if refusal is None:
                return
            crowd.tally.counts[f"refused_{refusal.reason}"] += 1
            if refusal.final:
                self._give_up(refusal.reason)
                return
            after = refusal.retry_after
            told = None if after is None else int(after * 1000)
            await asyncio.sleep(full_jitter(self._attempt) if told is None else told / 1000)
            self._attempt += 1

    async def _next_token(self) -> str:
        """Its own at first; when it comes back a fresh one, if there can be any."""
        credentials = self._crowd.credentials
        if not self.session or not credentials.renewable:
            return await credentials.token(self.index)
        while True:
            try:
                return await credentials.renew(self.index, self._crowd.source(self.index))
            except OSError:
                self._crowd.tally.counts["refused_no_answer"] += 1
                await asyncio.sleep(full_jitter(self._attempt))
                self._attempt += 1

    def _give_up(self, why: str) -> None:
        self.gone = why
        self._crowd.settled(self)

    def cut(self, now: int) -> None:
        """Vanish, and come back by the rules."""
        if self.connection is not None:
            self._crowd.tally.counts["dropped"] += 1
            self.connection.cut()
            self._end(now)
            self._crowd.spawn(self._come_back())

    def leave(self) -> None:
        """For good."""
        for connection in (self.connection, self.opening):
            if connection is not None:
                connection.leave()
        self.connection = self.opening = None

    def closed(self, code: int, now: int) -> None:
        self._end(now)
        if self._crowd.over:
            return
        self._crowd.tally.counts[f"closed_{code}"] += 1
        if code == REVOKED and self.revoked_at:
            self._crowd.tally.record(Measure.REVOCATION, self.revoked_at, now)
        if code >= FINAL:
            self._give_up(f"closed with {code}")
        else:
            self._crowd.spawn(self._come_back())

    def _end(self, now: int) -> None:
        if self.connection is not None:
            self._crowd.tally.connected -= 1
            self._dropped_at = self._dropped_at or now
            if now - self._welcomed_at > LASTING:
                self._attempt = 0
        self.connection = self.opening = None
        self._joining = 0
        self._behind.clear()
        # What was not answered is unknown: it is sent again, in its order, with its key.
        unanswered = [c.message for c in self._commands.values() if c.message is not None]
        self._queue.extendleft(reversed(unanswered))
        self._commands.clear()
        self._in_flight = 0

    async def _come_back(self) -> None:
        told = self._bye_after
        await asyncio.sleep(full_jitter(self._attempt) if told is None else told / 1000)
        self._attempt += 1
        self._bye_after = None
        await self.enter(self._dropped_at or self._due)

    def _welcome(self, frame: dict[str, Any], now: int) -> None:
        tally = self._crowd.tally
        self.connection, self.opening = self.opening, None
        self.session = frame["session"]
        self._crowd.send_rate = frame["limits"]["send_rate"]
        tally.connected += 1
        tally.counts["connects"] += 1
        self._welcomed_at = now
        if self._dropped_at:
            tally.counts["reconnects"] += 1
        else:
            tally.record(Measure.CONNECT, self._due, now)
        for room in self.rooms:
            self.join(room, now)
        if not self.rooms:
            self._entered(now)

    def _entered(self, now: int) -> None:
        """In all its rooms, or wherever it may be."""
        self._crowd.settled(self)
        self._flush()
        self._look(now)

    def _look(self, now: int) -> None:
        """Whether it has caught up since it came back."""
        if self._dropped_at and not self._joining and not self._behind:
            self._crowd.tally.record(Measure.RECOVERY, self._dropped_at, now)
            self._dropped_at = 0

    # Commands.

    def _ask(self, command: Command, **fields: object) -> None:
        if self.connection is not None:
            number = next(self._numbers)
            self._commands[number] = command
            self.connection.send({"id": number, **fields})

    def join(self, room: str, due: int) -> None:
        self._joining += 1
        position = self.positions.get(room.encode())
        since = {"epoch": position.epoch, "offset": position.last} if position else None
        fields = {"since": since} if since else {}
        self._ask(Command(Measure.JOIN, due, room), type="join", room=room, **fields)

    def part(self, room: str, due: int) -> None:
        """Leave a room."""
        if room in self.rooms:
            self.rooms.remove(room)
        self._ask(Command(Measure.LEAVE, due, room), type="leave", room=room)

    def history(self, room: str, due: int) -> None:
        self._ask(Command(Measure.HISTORY, due, room), type="history", room=room, limit=50)

    def publish(self, room: str, due: int) -> None:
        """Sent at once, or when it is connected and the server lets it."""
        key = f"{self._crowd.options.run}-{self.index}-{next(self._keys)}"
        self._queue.append(Message(room, key, due))
        self._crowd.tally.counts["sends"] += 1
        self._flush()

    def _flush(self) -> None:
        while self._queue and self.connection is not None and not self._held_back:
            if self._careful and self._in_flight:
                return
            message = self._queue.popleft()
            self._in_flight += 1
            self._ask(
                Command(Measure.ACK, message.due, message.room, message),
                type="send",
                room=message.room,
                key=message.key,
                body=body(message.due, self._crowd.text),
            )

    @property
    def unanswered(self) -> int:
        """Messages that are not acked."""
        return len(self._queue) + self._in_flight

    @property
    def busy(self) -> bool:
        """Whether anything is under way that will end by itself."""
        if self.gone or not self.begun:
            return False
        away = self.connection is None or bool(self._behind) or bool(self.revoked_at)
        return away or bool(self._queue) or bool(self._commands)

    async def refresh(self, due: int) -> None:
        """Put a fresh token in the place of the connection's, on the open socket."""
        try:
            token = await self._crowd.credentials.renew(self.index, self._crowd.source(self.index))
        except (TokenError, OSError):
            self._crowd.tally.counts["error_no_token"] += 1
            return
        self.token = token
        self._ask(Command(Measure.REFRESH, due), type="refresh", token=token)

    # What comes.

    def receive_events(self, events: Events, now: int) -> None:
        tally = self._crowd.tally
        tally.counts["deliveries"] += len(events.times)
        position = self.positions.get(events.room)
        if position is None:
            tally.counts["stray"] += len(events.times)
            return
        position.take(events.first, events.last, tally.counts)
        if self._behind:
            tally.record_each(Measure.LATE_DELIVERY, events.times, now)
            self._catch_up(events.room, position, now)
        else:
            tally.record_each(self.delivery, events.times, now)

    def receive_text(self, payload: bytes, now: int) -> None:
        frame = orjson.loads(payload)
        kind, number = frame["type"], frame.get("id")
        counts = self._crowd.tally.counts
        if kind == "ack":
            if command := self._commands.pop(number, None):
                self._acked(command, frame, now)
        elif kind == "error":
            counts[f"error_{frame['code']}"] += 1
            if command := self._commands.pop(number, None):
                self._failed(command, frame)
        elif kind == "welcome":
            self._welcome(frame, now)
        elif kind == "bye":
            self._bye_after = frame.get("after")
        elif kind == "expiring":
            if self._crowd.credentials.renewable:
                self._crowd.spawn(self.refresh(now))
        elif kind == "left":
            counts["left"] += 1
            self.positions.pop(frame["room"].encode(), None)
        elif "room" in frame:
            self._place(frame, now)

    def _place(self, frame: dict[str, Any], now: int) -> None:
        """Events that are not ours, places of events, and what moves a room as a whole."""
        counts = self._crowd.tally.counts
        room = frame["room"].encode()
        position = self.positions.get(room)
        if position is None:
            counts["stray"] += 1
        elif frame["type"] == "epoch":
            position.epoch = frame["epoch"]
        elif frame["type"] == "reset":
            counts["resets"] += 1
            position.reset(frame["epoch"], frame["offset"])
        elif "offset" in frame:
            counts["deliveries"] += frame["type"] == "message"
            position.take(frame["offset"], frame["offset"], counts)
            self._catch_up(room, position, now)

    def _catch_up(self, room: bytes, position: Position, now: int) -> None:
        if position.last >= self._behind.get(room, position.last + 1):
            del self._behind[room]
            self._look(now)

    def _acked(self, command: Command, frame: dict[str, Any], now: int) -> None:
        tally = self._crowd.tally
        tally.record(command.measure, command.due, now)
        match command.measure:
            case Measure.ACK:
                tally.counts["acks"] += 1
                self._crowd.acked(frame["room"], frame["epoch"], frame["offset"])
                self._in_flight -= 1
                self._careful = self._careful and bool(self._queue)
                self._flush()
                if self.on_ack is not None:
                    self.on_ack(now)
            case Measure.JOIN:
                tally.counts["joins"] += 1
                self._joined(command.room.encode(), frame, now)
            case Measure.LEAVE:
                tally.counts["leaves"] += 1
                self.positions.pop(command.room.encode(), None)
            case Measure.HISTORY:
                tally.counts["histories"] += 1
            case Measure.REFRESH:
                tally.counts["refreshes"] += 1

    def _joined(self, room: bytes, frame: dict[str, Any], now: int) -> None:
        start = frame["offset"] - frame["replay"]
        if (position := self.positions.get(room)) is not None:
            gap = frame.get("gap")
            position.rejoin(
                frame["epoch"],
                start,
                frame["recovered"],
                gap["to"] - gap["from"] + 1 if gap else 0,
                self._crowd.tally.counts,
            )
        else:
            self.positions[room] = Position(frame["epoch"], start)
        if frame["replay"]:
            self._behind[room] = frame["offset"]
        self._joined_or_not(now)

    def _joined_or_not(self, now: int) -> None:
        self._joining -= 1
        if not self._joining:
            self._entered(now)

    def _failed(self, command: Command, frame: dict[str, Any]) -> None:
        """What may be repeated is, when the server says so."""
        again = frame["code"] in ("rate_limited", "unavailable")
        wait = frame["retry_after"] / 1000 if "retry_after" in frame else RETRY_SECONDS
        later = asyncio.get_running_loop().call_later
        if command.message is not None:
            self._in_flight -= 1
            if again:
                self._queue.appendleft(command.message)
                self._hold_back(wait)
        elif command.measure is Measure.JOIN:
            if again:
                later(wait, self._join_again, command, self.connection)
            else:
                self._joined_or_not(command.due)

    def _hold_back(self, seconds: float) -> None:
        # All at once again would be refused again, and each refusal costs of the same budget.
        self._careful = True
        if not self._held_back:
            self._held_back = True
            asyncio.get_running_loop().call_later(seconds, self._go_on)

    def _go_on(self) -> None:
        self._held_back = False
        self._flush()

    def _join_again(self, command: Command, connection: Connection | None) -> None:
        if connection is self.connection and connection is not None:
            self._joining -= 1
            self.join(command.room, command.due)

    # Not reading.

    def stop_reading(self) -> None:
        self.delivery = Measure.LATE_DELIVERY
        if self.connection is not None:
            self._stopped = self.connection
            self._stopped.stop_reading()

    def read_on(self) -> None:
        if self._stopped is not None:
            self._stopped.read_on()
            self._stopped = None

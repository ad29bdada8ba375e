"""Where a client is in one room: section "Positions" of the protocol, to the letter. Pure."""

from __future__ import annotations

from enum import Enum, auto

from .events import Event, Frame, Gap, JoinAck, NewEpoch, Position, read, read_message

Step = tuple[Position, Event | None]
"""A new position, and what there is to tell of it."""


class Standing(Enum):
    OUT = auto()
    """Events are dropped; a join from here is wanted."""
    ASKED = auto()
    """A join is under way; events are dropped until its ack, for its replay has them."""
    LIVE = auto()
    """Each event has its place."""


class Place:
    """A place in a room's log, kept across connections.

    ``position`` is the last event taken in, None before the first join. What is dropped here is
    never lost: the join that follows asks for what comes after ``position``.
    """

    __slots__ = ("position", "room", "standing")

    def __init__(self, room: str, position: Position | None = None) -> None:
        self.room = room
        self.position = position
        self.standing = Standing.OUT

    def __repr__(self) -> str:
        return f"<Place {self.standing.name} in {self.room} at {self.position}>"

    def ask(self) -> Position | None:
        """A join is being sent; returns its ``since``."""
        self.standing = Standing.ASKED
        return self.position

    def leave(self) -> None:
        """Let events go, or there is no connection: from here on they are missing."""
        self.standing = Standing.OUT

    def admit(self, ack: JoinAck) -> Gap | None:
        """Start where the replay starts, also when that is before what was reached.

        Returns what is missing, if that is not certain to be nothing.
        """
        self.standing = Standing.LIVE
        self.position = ack.start
        if ack.recovered:
            return None
        missing = (ack.gap.first, ack.gap.last) if ack.gap else ()
        return Gap(self.room, ack.start, *missing)

    def receive(self, frame: Frame, space: bool = True) -> Step | None:
        """Take one frame that names this room; None when it moves nothing.

        A hole, and a step for which the caller has no ``space``, put this place ``OUT``.
        """
        if self.standing is not Standing.LIVE or self.position is None:
            return None
        step = self._step(frame, self.position)
        if step is None or self.standing is not Standing.LIVE:
            return None
        if not space:
            self.leave()
            return None
        self.position = step[0]
        return step

    def _step(self, frame: Frame, last: Position) -> Step | None:
        match frame["type"]:
            case "epoch":
                return Position(read(frame, NewEpoch).epoch, last.offset), None
            case "reset":
                position = read(frame, Position)
                return position, Gap(self.room, position)
        offset = frame.get("offset")
        # True is an int, too.
        if type(offset) is not int or offset <= last.offset:
            return None
        if offset > last.offset + 1:
            self.leave()
            return None
        known = frame["type"] == "message"
        return Position(last.epoch, offset), read_message(frame, last.epoch) if known else None

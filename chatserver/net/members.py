"""One room's members on this worker, and how far each has got: by itself, or in unison."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum, auto
from typing import TYPE_CHECKING

from chatserver.net.compression import SharedFrames
from chatserver.net.connection import Connection

if TYPE_CHECKING:
    from chatserver.net.fanout import Room

UNISON_LEAST = 64
"""Fewer live members are looked at one by one. A look is a tenth of what a delivery costs, but it
may find a reply to join the event, which saves a whole send: in a small room that is likely."""
UNISON_MOST = 500
"""Members that one call writes to, with nothing else in between: some 3 ms of kernel time."""


class Standing(Enum):
    BEHIND = auto()
    LIVE = auto()
    GONE = auto()


class Member:
    """One connection in one room, and how far it has got."""

    __slots__ = ("_place", "connection", "epoch", "reading", "replayed_to", "room", "standing")

    def __init__(
        self, connection: Connection, room: Room, epoch: str, position: int, replayed_to: int
    ) -> None:
        self.connection = connection
        self.replayed_to = replayed_to
        """Up to here it is shown its own events, too, whatever their ``echo``."""
        self.room = room
        self.epoch = epoch
        self._place: int | Unison = position
        self.standing = Standing.BEHIND
        self.reading = False
        """A read of the log is under way for it."""

    @property
    def position(self) -> int:
        """Offset of the last event written to it."""
        place = self._place
        return place.position if isinstance(place, Unison) else place

    @position.setter
    def position(self, offset: int) -> None:
        self._place = offset

    def fall_in(self, unison: Unison) -> None:
        """From here on its position is that of the others."""
        self._place = unison

    def fall_out(self) -> None:
        """Its position is its own again."""
        self._place = self.position


class Unison:
    """Live members of a room who are all at one position and are written to without a look at each.

    A delivery then costs little more than the kernel's send. The room ends it as soon as one of
    them comes to be different (``Room.part``).
    """

    __slots__ = ("_size", "_writes", "position", "until")

    def __init__(self, members: Sequence[Member], position: int) -> None:
        self.position = position
        self.until = min(member.connection.expires_at for member in members)
        """When the first of their tokens expires."""
        self._size = len(members)
        self._writes: dict[int, list[Callable[[bytes], None]]] = {}
        """Transports' ``write``, by the window of what they may be sent compressed."""
        for member in members:
            connection = member.connection
            self._writes.setdefault(connection.window_bits, []).append(connection.transport.write)
            member.fall_in(self)

    def __len__(self) -> int:
        return self._size

    def write(self, frames: SharedFrames, top: int) -> int:
        """Write these frames, the last of which is at ``top``. Returns the sum of bytes."""
        self.position = top  # First: whoever stalls at its own write has it.
        size = 0
        for window_bits, writes in self._writes.items():
            data = frames[window_bits]
            for write in writes:
                write(data)
            size += len(writes) * len(data)
        return size

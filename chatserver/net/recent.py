"""Recent events: what members that are behind need for the last stretch, without asking the log."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable

from chatserver.core.room import Event

ROOM_BYTES = 262_144
TOTAL_BYTES = 67_108_864
"""Of one room, and of all: the rooms go first that were silent longest."""


class Recent:
    """One room's, without a hole."""

    __slots__ = ("events", "size")

    def __init__(self) -> None:
        self.events: deque[Event] = deque()
        self.size = 0

    def after(self, position: int) -> list[Event] | None:
        """All after the position; None when they do not reach back to it."""
        if not self.events or self.events[0].offset > position + 1:
            return None
        return [event for event in self.events if event.offset > position]

    def add(self, events: Iterable[Event]) -> None:
        for event in events:
            self.events.append(event)
            self.size += len(event.payload)
        while self.size > ROOM_BYTES:
            self.size -= len(self.events.popleft().payload)

    def clear(self) -> None:
        self.events.clear()
        self.size = 0


class Memory:
    """All rooms' together, within their bound."""

    def __init__(self) -> None:
        self._rooms: dict[Recent, None] = {}
        """Those with events, the one that was silent longest first."""
        self._size = 0

    def remember(self, recent: Recent, events: Iterable[Event]) -> None:
        self._rooms.pop(recent, None)
        self._rooms[recent] = None
        self._size -= recent.size
        recent.add(events)
        self._size += recent.size
        while self._size > TOTAL_BYTES:
            self.forget(next(iter(self._rooms)))

    def forget(self, recent: Recent) -> None:
        self._rooms.pop(recent, None)
        self._size -= recent.size
        recent.clear()

"""A history, sorted out: who was where, what was sent, what each member owes.

A member's records in one room make a *trail* of segments. A segment is a stretch in which nothing
may be missing: it goes on through reconnects (``recovered:true``) and through ``epoch`` events,
which keep the offset; it ends where the member was told that something may be lost (``reset``,
``recovered:false``), where it left, or with the run.

Epochs of one room may share a log: whoever went from one to another and kept its position p
proves that up to p they are the same. A place is compared over all epochs that are known to share
it, and never over others.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

from tests.faults.history import (
    Closed,
    Connected,
    Epoch,
    Fault,
    Final,
    Hole,
    Joined,
    Left,
    Logged,
    Mark,
    Received,
    Record,
    Reset,
    Revoked,
    Sent,
    Session,
)

LOSSY = ("store_emptied", "store_older", "failover")
"""Faults that may lose what was acked. Whoever has seen it is told; who has not, cannot be."""


class Segment:
    """Consecutive offsets that one member owes in one room."""

    def __init__(self, member: str, room: str, start: int, epoch: str, at: float) -> None:
        self.member = member
        self.room = room
        self.start = start
        self.top = start
        self.epochs = [(epoch, start)]
        """Each with the position at which it began."""
        self.got: dict[int, Received] = {}
        self.again: list[Received] = []
        self.late: list[Received] = []
        """Out of order: below what came before, and not seen before."""
        self.moved_at = at

    def __repr__(self) -> str:
        return f"{self.member} in {self.room} ({self.start}..{self.top} of {self.epoch})"

    @property
    def epoch(self) -> str:
        return self.epochs[-1][0]

    def epoch_of(self, offset: int) -> str:
        """Under which it would have been received."""
        return next((e for e, begin in reversed(self.epochs) if begin < offset), self.epochs[0][0])

    def receive(self, event: Received) -> None:
        if event.offset in self.got:
            self.again.append(event)
            return
        self.got[event.offset] = event
        if event.offset <= self.top:
            self.late.append(event)
        else:
            self.top = event.offset
            self.moved_at = event.at

    def missing(self) -> list[int]:
        if len(self.got) == self.top - self.start and not self.late:
            return []
        return [n for n in range(self.start + 1, self.top + 1) if n not in self.got]


class Trail:
    """One member in one room, from its first record to the last."""

    def __init__(self, member: str, room: str) -> None:
        self.member = member
        self.room = room
        self.segments: list[Segment] = []
        self.open: Segment | None = None
        self.connection: str | None = None
        """On which it is in the room now."""
        self.wanted = False
        """It has been in the room, and neither left nor was sent away."""
        self.strays: list[Received] = []
        self.untold: list[str] = []

    def join(self, ack: Joined) -> None:
        start = ack.offset - ack.replay
        self.connection, self.wanted = ack.connection, True
        since, before = ack.since, self.open
        if since is not None and before is not None and since.offset > before.top:
            self.untold.append(f"it asked for what follows {since}, and had less: {before}")
        if since is not None and ack.recovered:
            if start != since.offset:
                self.untold.append(f"recovered from {since}, but the replay begins after {start}")
            if before is None or before.top != since.offset or before.epoch != since.epoch:
                self._begin(start, since.epoch, ack.at)
            self._rename(ack.epoch, ack.at)
            return
        if since is not None and since.epoch == ack.epoch and since.offset < start:
            gap = (since.offset + 1, start)
            if ack.gap is None or tuple(ack.gap) != gap:
                self.untold.append(f"told of the gap {ack.gap}, which is {gap}: since {since}")
        self._begin(start, ack.epoch, ack.at)

    def _begin(self, start: int, epoch: str, at: float) -> None:
        self.open = Segment(self.member, self.room, start, epoch, at)
        self.segments.append(self.open)

    def _rename(self, epoch: str, at: float) -> None:
        assert self.open is not None
        self.open.moved_at = at
        if epoch != self.open.epoch:
            self.open.epochs.append((epoch, self.open.top))

    def receive(self, event: Received) -> None:
        if self.open is None or self.connection != event.connection:
            self.strays.append(event)
            return
        if event.epoch != self.open.epoch:
            self.untold.append(f"the epoch {event.epoch} of {event.offset}: {self.open}")
        self.open.receive(event)

    def rename(self, event: Epoch) -> None:
        if self.open is not None and self.connection == event.connection:
            self._rename(event.epoch, event.at)

    def reset(self, event: Reset) -> None:
        if self.connection == event.connection:
            self._begin(event.offset, event.epoch, event.at)

    def leave(self) -> None:
        self.open, self.connection, self.wanted = None, None, False


class Room:
    """One room's sends, log and lineage."""

    def __init__(self) -> None:
        self.acked: dict[int, list[Sent]] = defaultdict(list)
        self.logged: list[Logged] = []
        self.told: Final | None = None
        self.links: dict[tuple[str, str], int] = {}
        """Two epochs and the greatest offset up to which they are known to be the same log."""

    @property
    def final(self) -> Final | None:
        """The end of the log, as it was told in the quiet. Where another store took the place of
        the one that told it, and the log has gone on there, as that one has it."""
        last = self.logged[-1] if self.logged else None
        if self.told is None or last is None or last.epoch in ("", self.told.epoch):
            return self.told
        return Final(at=last.at, room=last.room, epoch=last.epoch, offset=last.offset)

    def link(self, one: str, other: str, offset: int) -> None:
        pair = (min(one, other), max(one, other))
        self.links[pair] = max(self.links.get(pair, 0), offset)

    def sharing(self, epoch: str, offset: int) -> frozenset[str]:
        """The epochs that have the same event at this offset, as far as is known."""
        found = {epoch}
        if self.links:
            grown = True
            while grown:
                grown = False
                for pair, top in self.links.items():
                    if offset <= top and len(found.intersection(pair)) == 1:
                        found.update(pair)
                        grown = True
        return frozenset(found)


class Window(NamedTuple):
    name: str
    begin: float
    end: float
    members: tuple[str, ...]


class Story:
    """A history, sorted out."""

    def __init__(self, history: Iterable[Record]) -> None:
        self.trails: dict[tuple[str, str], Trail] = {}
        self.rooms: dict[str, Room] = defaultdict(Room)
        self.sends: dict[tuple[str, str], Sent] = {}
        """By room and key."""
        self.joins: list[Joined] = []
        self.received: list[Received] = []
        self.connected: dict[str, Connected] = {}
        self.present: dict[str, Connected | None] = {}
        """Each member's connection at the end."""
        self.gone: set[str] = set()
        """Members that left for good: by themselves, or because they were revoked."""
        self.sessions: dict[str, Session] = {}
        self.revoked: dict[str, float] = {}
        self.windows: list[Window] = []
        self.marks: dict[str, float] = {}
        self._begun: dict[int, Fault] = {}
        for record in history:
            if "end" not in self.marks or isinstance(record, Final | Logged | Sent | Revoked):
                self._tell(record)
        never = float("inf")
        self.windows += [Window(f.name, f.at, never, f.members) for f in self._begun.values()]
        for trail in self.trails.values():
            for segment in trail.segments:
                self._link(segment)

    def _trail(self, record: Joined | Left | Received | Reset | Epoch) -> Trail:
        key = (record.member, record.room)
        if key not in self.trails:
            self.trails[key] = Trail(*key)
        return self.trails[key]

    def _tell(self, record: Record) -> None:
        match record:
            case Received():
                self.received.append(record)
                self._trail(record).receive(record)
            case Sent():
                self.sends[record.room, record.key] = record
                if record.outcome == "ok":
                    self.rooms[record.room].acked[record.offset].append(record)
            case Joined():
                self.joins.append(record)
                self._trail(record).join(record)
            case Reset():
                self._trail(record).reset(record)
            case Epoch():
                self._trail(record).rename(record)
            case Left():
                self._trail(record).leave()
            case Final():
                self.rooms[record.room].told = record
            case Logged():
                self.rooms[record.room].logged.append(record)
            case Hole():
                pass  # The join that it causes says what became of it.
            case _:
                self._tell_of_connections(record)

    def _tell_of_connections(
        self, record: Session | Connected | Closed | Revoked | Fault | Mark
    ) -> None:
        match record:
            case Session():
                self.sessions[record.session] = record
                self.present.setdefault(record.member, None)
            case Connected():
                self.connected[record.connection] = record
                self.present[record.member] = record
                self.gone.discard(record.member)
            case Closed():
                self.present[record.member] = None
                connected = self.connected.get(record.connection)
                revoked = connected is not None and connected.session in self.revoked
                if record.code == 1000 or (record.code == 4503 and revoked):
                    self.gone.add(record.member)
            case Revoked():
                self.revoked.setdefault(record.session, record.at)
            case Mark():
                self.marks[record.name] = record.at
            case Fault(phase="begin"):
                self._begun[record.id] = record
            case Fault():
                begun = self._begun.pop(record.id)
                self.windows.append(Window(record.name, begun.at, record.at, begun.members))

    def _link(self, segment: Segment) -> None:
        for (old, _), (new, position) in pairwise(segment.epochs):
            self.rooms[segment.room].link(old, new, position)

    @property
    def lossy(self) -> bool:
        return any(window.name in LOSSY for window in self.windows)

    def segments(self) -> Iterator[Segment]:
        for trail in self.trails.values():
            yield from trail.segments

    def is_present(self, trail: Trail) -> bool:
        """In the room when the run ended."""
        connected = self.present.get(trail.member)
        return connected is not None and connected.connection == trail.connection

    def owed(self, segment: Segment) -> int:
        """The last offset that must have come."""
        trail = self.trails[segment.member, segment.room]
        final = self.rooms[segment.room].final
        if segment is not trail.open or final is None or not self.is_present(trail):
            return segment.top
        return max(segment.top, final.offset)

    def session_of(self, connection: str) -> Session | None:
        connected = self.connected.get(connection)
        return self.sessions.get(connected.session) if connected else None

"""Rooms: who may do what, and which events come next.

A room's events carry consecutive offsets under an epoch. What a worker hears from the store's
pub/sub is a hint that may be missing, doubled or late; the log is the truth. ``Feed`` turns the
two into one sequence without holes, and ``recover`` decides where a member's replay begins.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from chatserver.core.claims import Identity
from chatserver.core.frames import Since

# --- rights --------------------------------------------------------------------------------

ROLE_RIGHTS = {"guest": "r", "member": "rw", "moderator": "rwm", "admin": "rwm", "service": "rwm"}
_DIRECT = re.compile(r"dm:([A-Za-z0-9._@+-]{1,60}):([A-Za-z0-9._@+-]{1,60})")


def rights(identity: Identity, room: str) -> str:
    """The letters of ``rwm``, in this order, that the token gives in the room."""
    if room.startswith("dm:"):
        return _direct_rights(identity.user, room)
    if identity.rooms is None:
        granted = "".join(ROLE_RIGHTS.get(role, "") for role in identity.roles)
    else:
        granted = _claimed_rights(identity.rooms, room)
    return "".join(letter for letter in "rwm" if letter in granted)


def _direct_rights(user: str, room: str) -> str:
    pair = _DIRECT.fullmatch(room)
    if pair is None:
        return ""
    first, second = pair.groups()
    return "rw" if first < second and user in (first, second) else ""


def _claimed_rights(rooms: Mapping[str, str], room: str) -> str:
    """The exact name, else the longest prefix; only that entry counts."""
    if room in rooms:
        return rooms[room]
    prefixes = [p for p in rooms if p.endswith("*") and room.startswith(p[:-1])]
    return rooms[max(prefixes, key=len)] if prefixes else ""


# --- events and positions ------------------------------------------------------------------


class Event(NamedTuple):
    """One entry of a room's log, with its place. ``payload`` is the finished frame's JSON."""

    epoch: str
    offset: int
    payload: bytes
    origin: str | None = None
    """The connection that sent it and does not want it echoed."""


class Reading(NamedTuple):
    """What a read of a log returned: its state at that moment, and a run of its events."""

    epoch: str
    top: int
    """Offset of the latest event; 0 before the first."""
    first: int
    """Offset of the oldest event that is retained; ``top + 1`` when there is none."""
    shared: int
    """Up to here the epoch that was asked for tells of this log: ``top`` when it is the log's own
    or none was named, less when the store's history forked since, -1 when it is unknown."""
    events: list[Event]

    def continues(self, offset: int) -> bool:
        """Whether this log goes on, without a hole, from a position of the epoch asked for."""
        return self.first - 1 <= offset <= self.shared

    def nearest(self, offset: int) -> int:
        """Where somebody from a position of the epoch asked for goes on in this log."""
        if self.shared < 0:
            return self.start()
        return max(min(offset, self.shared), self.first - 1)

    def start(self) -> int:
        """The position before its events."""
        return self.events[0].offset - 1 if self.events else self.top


class Recovery(NamedTuple):
    """Where a member starts: events after ``start`` are replayed up to the log's top."""

    start: int
    recovered: bool | None
    """None when the client asked for no recovery."""
    gap: tuple[int, int] | None


def has_more(reading: Reading, *, onwards: bool) -> bool:
    """Whether the log goes on behind a page of it, in the direction in which it was read."""
    events = reading.events
    if onwards:
        return bool(events) and events[-1].offset < reading.top
    return bool(events) and events[0].offset > reading.first


def recover(reading: Reading, *, since: Since | None, last: int | None, replay: int) -> Recovery:
    """Decide what a joining member is replayed. ``last`` None: the client did not say."""
    top, oldest = reading.top, reading.first - 1
    if since is None:
        return Recovery(max(top - (last or 0), oldest), None, None)
    if reading.continues(since.offset) and top - since.offset <= replay:
        return Recovery(since.offset, True, None)
    start = max(top - (50 if last is None else last), oldest)
    same = since.epoch == reading.epoch
    gap = (since.offset + 1, start) if same and since.offset < start else None
    return Recovery(start, False, gap)


HELD_EVENTS = 1024


class Step(NamedTuple):
    """What a feed wants done: the events to deliver now."""

    events: list[Event]
    moved: bool = False
    """The epoch is another one, or the log does not go on where the feed was: what that means to
    a member depends on the member's own position."""


_NOTHING = Step([])


class Feed:
    """The place that one worker has reached in one room.

    ``receive_live`` and ``receive_reading`` return what to deliver, in order, each event once.
    When ``behind`` is true afterwards, a read of the log after ``offset`` is wanted; exactly one
    should be under way at a time.
    """

    __slots__ = ("_again", "_held", "behind", "epoch", "offset")

    def __init__(self) -> None:
        self.epoch = ""
        self.offset: int | None = None
        self.behind = False
        self._held: list[Event] = []
        # The reading under way may lack what was missed since it was taken: one more is wanted.
        self._again = False

    def start(self, reading: Reading) -> Step:
        """The first reading after the subscription was confirmed gives the place to begin."""
        assert self.offset is None
        self.epoch, self.offset = reading.epoch, reading.top
        return self._release([])

    def receive_live(self, event: Event) -> Step:
        if self.offset is None or self.behind:
            self._hold(event)
            return _NOTHING
        if event.epoch == self.epoch:
            if event.offset == self.offset + 1:
                self.offset = event.offset
                return Step([event])
            if event.offset <= self.offset:
                return _NOTHING
        # Not held: the reading that is wanted now has it, or tells that its epoch has ended.
        self.behind = True
        return _NOTHING

    def miss(self) -> None:
        """What comes next must be read from the log, though it be heard of."""
        self._again |= self.behind
        self.behind = True

    def receive_reading(self, reading: Reading) -> Step:
        """The answer to a read after ``offset`` under ``epoch``, or from the place nearest to it.

        Of an unknown epoch ``reading.events`` are the log's latest.
        """
        assert self.offset is not None
        self.behind = False
        joins = reading.continues(self.offset)
        moved = not joins or reading.epoch != self.epoch
        self.epoch = reading.epoch
        if not joins:
            self.offset = reading.start()
        events = [event for event in reading.events if event.offset > self.offset]
        if events:
            self.offset = events[-1].offset
        # A reading is bounded: there may be more of the log before what was held meanwhile.
        self.behind = self.offset < reading.top
        return self._release(events)._replace(moved=moved)

    def _release(self, events: list[Event]) -> Step:
        held, self._held = self._held, []
        self.behind = self.behind or self._again
        self._again = False
        for event in held:
            if event.epoch == self.epoch:
                events += self.receive_live(event).events
            else:
                # Of an epoch that has ended, or of one begun after this reading: the next tells.
                # Held any longer, the former would ask for a reading for ever.
                self.behind = True
        return Step(events)

    def _hold(self, event: Event) -> None:
        # Beyond the bound the log is asked again: it has what is not kept here.
        if len(self._held) < HELD_EVENTS:
            self._held.append(event)
        else:
            self._again = True

"""Reads a history and says which promises it breaks. Pure: no clock, no server, no other run.

Within a segment (story.py) every offset must have come, once and in order, and every acked
message must be at its place. Those who are in the room at the end owe everything up to the log's
last offset, so that a lost last message is found, too.

What cannot be decided from a history (memory, descriptors, logs, exit codes) is looked at by the
run itself. A sender's order is judged by acked attempts on one connection: what is repeated after
a reconnect may rightly come behind what was sent later, and an ack with ``duplicate`` tells of an
attempt that was made earlier.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from enum import IntEnum
from itertools import pairwise
from typing import NamedTuple, TypeVar

from tests.faults.history import (
    Closed,
    Connected,
    Epoch,
    Fault,
    Hole,
    Joined,
    Received,
    Record,
    Reset,
    Revoked,
    Sent,
)
from tests.faults.story import Segment, Story, Trail

T = TypeVar("T", bound=Hashable)

REVOCATION_SECONDS = 1.0
"""After the server's answer, for bytes on their way and for a client that is slow to read them."""
LIVENESS_SECONDS = 10.0
LIVE_SHARE = 0.99
MARGIN_SECONDS = 0.1
"""At both ends of a fault's window: when it took effect is not known better."""

STORE_DOWN = ("store_killed", "store_frozen")
UNREAD = ("slow_readers", "links_frozen", "links_slow")
"""Faults that keep what was written long before from being read."""

ELSEWHERE = ("bits_flipped", "revocations")
"""Faults that slow nobody down who is not their victim."""


class Invariant(IntEnum):
    NO_LOSS = 1
    NO_DUPLICATE = 2
    AGREEMENT = 3
    ORDER = 4
    NO_GAP = 5
    NOTHING_INVENTED = 6
    REVOCATION = 7
    AUTHORIZATION = 8
    BOUNDED = 9
    LIVENESS = 10
    NO_FALSE_SUCCESS = 11
    HYGIENE = 12


class Violation(NamedTuple):
    invariant: Invariant
    text: str

    def __str__(self) -> str:
        return f"{self.invariant.value} {self.invariant.name.lower()}: {self.text}"


Violations = Iterator[Violation]


def no_loss(story: Story) -> Violations:
    """1. Every acked message is at its place, with each member that was told of no loss."""
    for segment in story.segments():
        room = story.rooms[segment.room]
        for offset in range(segment.start + 1, story.owed(segment) + 1):
            for sent in room.acked.get(offset, ()):
                if _owes(story, segment, sent) and not _has(segment, sent):
                    yield Violation(
                        Invariant.NO_LOSS, f"{_place(sent)} {sent.key} never came: {segment!r}"
                    )
    for name, room in story.rooms.items():
        at = {entry.offset: entry for entry in room.logged}
        if not at:
            continue
        epoch, first = room.logged[0].epoch, min(at)
        for offset, sends in room.acked.items():
            for sent in sends:
                shared = epoch in room.sharing(sent.epoch, offset)
                if shared and offset >= first and offset not in at:
                    yield Violation(Invariant.NO_LOSS, f"{sent.key} is not in the log of {name}")


def _owes(story: Story, segment: Segment, sent: Sent) -> bool:
    room = story.rooms[segment.room]
    if sent.epoch in room.sharing(segment.epoch_of(sent.offset), sent.offset):
        return True
    # Acked under an epoch that the member left further down, keeping its position: it was told
    # that nothing was lost.
    passed = any(epoch == sent.epoch for epoch, _ in segment.epochs)
    return passed and not story.lossy


def _has(segment: Segment, sent: Sent) -> bool:
    event = segment.got.get(sent.offset)
    if event is None:
        return False
    skipped = event.kind == "skip" and sent.sender == segment.member and not sent.echo
    return event.key == sent.key or skipped


def no_duplicate(story: Story) -> Violations:
    """2. Each offset, and each key, once per member, and each key once in a log."""
    for segment in story.segments():
        for event in segment.again:
            yield Violation(Invariant.NO_DUPLICATE, f"{_place(event)} came again: {segment!r}")
    for key, places in _places_of_keys(story).items():
        sent = story.sends.get(key)
        if sent is None or sent.outcome == "ok":
            for text in _two_places(story, key, places):
                yield Violation(Invariant.NO_DUPLICATE, text)


Place = tuple[str, int]


def _places_of_keys(story: Story) -> Mapping[tuple[str, str], set[Place]]:
    places: dict[tuple[str, str], set[Place]] = defaultdict(set)
    for room, key, epoch, offset, _ in _witnesses(story):
        places[room, key].add((epoch, offset))
    return places


def _two_places(story: Story, key: tuple[str, str], places: set[Place]) -> Iterator[str]:
    """Where one key stands at two offsets of what is known to be one log."""
    if len({offset for _, offset in places}) < 2:
        return
    room = story.rooms[key[0]]
    shared = [(room.sharing(epoch, offset), offset) for epoch, offset in sorted(places)]
    offsets = {
        tuple(sorted((offset, other)))
        for epochs, offset in shared
        for others, other in shared
        if offset != other and epochs & others
    }
    for one, other in sorted(offsets):
        yield f"{key[1]} is at {one} and at {other} of {key[0]}"


def _witnesses(story: Story) -> Iterator[tuple[str, str, str, int, str]]:
    """Everyone who says that a key is at a place: room, key, epoch, offset, who."""
    for sent in story.sends.values():
        if sent.outcome == "ok":
            yield sent.room, sent.key, sent.epoch, sent.offset, f"acked to {sent.sender}"
    for event in story.received:
        if event.kind == "message":
            yield event.room, event.key, event.epoch, event.offset, event.member
    for name, room in story.rooms.items():
        for entry in room.logged:
            yield name, entry.key, entry.epoch, entry.offset, "the store"


def agreement(story: Story) -> Violations:
    """3. One key at each place, whoever says so."""
    said: dict[tuple[str, frozenset[str], int], dict[str, str]] = defaultdict(dict)
    for name, key, epoch, offset, who in _witnesses(story):
        shared = story.rooms[name].sharing(epoch, offset)
        said[name, shared, offset].setdefault(key, who)
    for (name, epochs, offset), keys in said.items():
        if len(keys) > 1:
            what = ", ".join(f"{key or 'no key'} ({who})" for key, who in keys.items())
            yield Violation(
                Invariant.AGREEMENT, f"{name} {'/'.join(sorted(epochs))} {offset} is {what}"
            )


def order(story: Story) -> Violations:
    """4. Offsets ascend; what one connection sent is in the order sent."""
    for segment in story.segments():
        for event in segment.late:
            yield Violation(Invariant.ORDER, f"{_place(event)} came late: {segment!r}")
    streams: dict[tuple[str, str], list[Sent]] = defaultdict(list)
    for sent in story.sends.values():
        if sent.outcome == "ok" and not sent.duplicate:
            streams[sent.connection, sent.room].append(sent)
    for sends in streams.values():
        sends.sort(key=lambda sent: sent.attempt)
        for one, other in pairwise(sends):
            if one.epoch == other.epoch and one.offset >= other.offset:
                yield Violation(
                    Invariant.ORDER, f"{_place(other)} was sent after {_place(one)} by {one.sender}"
                )


def no_gap(story: Story) -> Violations:
    """5. Offsets are consecutive but where the member was told otherwise."""
    for trail in story.trails.values():
        for text in trail.untold:
            yield Violation(Invariant.NO_GAP, f"{trail.member} in {trail.room}: {text}")
    for segment in story.segments():
        missing = segment.missing()
        missing += range(segment.top + 1, story.owed(segment) + 1)
        if missing:
            yield Violation(Invariant.NO_GAP, f"without {_ranges(missing)}: {segment!r}")


def nothing_invented(story: Story) -> Violations:
    """6. What nobody sent, or what was refused, is nowhere; what is unknown, at one place."""
    told = set()
    for room, key, epoch, offset, who in _witnesses(story):
        sent = story.sends.get((room, key))
        if (sent is None or sent.outcome == "failed") and (room, key) not in told:
            told.add((room, key))
            why = "nobody sent" if sent is None else f"was refused ({sent.code})"
            yield Violation(
                Invariant.NOTHING_INVENTED, f"{key} {why}: {room} {epoch} {offset} ({who})"
            )
    for name, places in _places_of_keys(story).items():
        sent = story.sends.get(name)
        if sent is not None and sent.outcome == "unknown":
            for text in _two_places(story, name, places):
                yield Violation(Invariant.NOTHING_INVENTED, text)


def revocation(story: Story) -> Violations:
    """7. A revoked session is served nothing, and nothing is taken from it."""
    for connected in story.connected.values():
        limit = _limit(story, connected.session)
        if connected.began > limit:
            yield Violation(Invariant.REVOCATION, f"{connected.connection} was let in")
    for event in story.received:
        limit = _limit_of_connection(story, event.connection)
        late = event.at > limit and not _unread(story, event)
        if late or event.ts / 1000 > limit:
            yield Violation(
                Invariant.REVOCATION, f"{_place(event)} went to {event.connection} at {event.at}"
            )
    for sent in story.sends.values():
        if sent.outcome == "ok" and sent.tried > _limit_of_connection(story, sent.connection):
            yield Violation(Invariant.REVOCATION, f"{_place(sent)} was accepted from {sent.sender}")


def _limit(story: Story, session: str) -> float:
    return story.revoked.get(session, float("inf")) + REVOCATION_SECONDS


def _limit_of_connection(story: Story, connection: str) -> float:
    connected = story.connected.get(connection)
    return _limit(story, connected.session) if connected else float("inf")


def _unread(story: Story, event: Received) -> bool:
    """It may have lain in a buffer: the member did not read."""
    return any(
        window.name in UNREAD
        and event.member in window.members
        and window.begin < event.at < window.end + LIVENESS_SECONDS
        for window in story.windows
    )


def authorization(story: Story) -> Violations:
    """8. A room is seen by those who are in it and may be, and written to by those who may; who
    wants no echo gets none."""
    for trail in story.trails.values():
        for event in trail.strays:
            yield Violation(Invariant.AUTHORIZATION, f"{_place(event)} to {trail.member} outside")
    refused = set()
    events: list[Joined | Received] = [*story.joins, *story.received]
    for seen in events:
        case = (seen.connection, seen.room)
        if case not in refused and not _may(story, "r", *case):
            refused.add(case)
            yield Violation(
                Invariant.AUTHORIZATION, f"{seen.member} may not read {seen.room}, and did"
            )
    for sent in story.sends.values():
        if sent.outcome == "ok" and not _may(story, "w", sent.connection, sent.room):
            yield Violation(
                Invariant.AUTHORIZATION, f"{sent.sender} may not write to {sent.room}, and did"
            )
    for event in _echoes(story):
        yield Violation(
            Invariant.AUTHORIZATION, f"{_place(event)} to {event.member}, who sent it without echo"
        )


def _echoes(story: Story) -> Iterator[Received]:
    """What a connection was shown that had sent it with ``echo`` false, beside a join's replay."""
    joins: dict[tuple[str, str], list[Joined]] = defaultdict(list)
    for joined in story.joins:
        joins[joined.connection, joined.room].append(joined)
    for event in story.received:
        sent = story.sends.get((event.room, event.key))
        if event.kind == "skip" or sent is None or sent.echo or sent.duplicate:
            continue
        if sent.outcome == "ok" and sent.connection == event.connection:
            before = [each for each in joins[event.connection, event.room] if each.at <= event.at]
            if before and event.offset > before[-1].offset:
                yield event


def _may(story: Story, right: str, connection: str, room: str) -> bool:
    session = story.session_of(connection)
    return session is None or right in rights(session.rooms, room)


def rights(rooms: Mapping[str, str], room: str) -> str:
    """What a token's ``rooms`` give: the exact name, else the longest prefix (section 5)."""
    if room in rooms:
        return rooms[room]
    fitting = [name for name in rooms if name.endswith("*") and room.startswith(name[:-1])]
    return rooms[max(fitting, key=len)] if fitting else ""


def liveness(story: Story) -> Violations:
    """10. Soon after the last fault nearly all are connected, and have what the log has."""
    if "quiet" not in story.marks:
        return
    deadline = story.marks["quiet"] + LIVENESS_SECONDS
    rooms: dict[str, list[Trail]] = defaultdict(list)
    for trail in story.trails.values():
        rooms[trail.member].append(trail)
    late = {}
    expected = [member for member in story.present if member not in story.gone]
    for member in expected:
        why = _behind(story, member, rooms[member], deadline)
        if why is not None:
            late[member] = why
    if late and len(late) > (1 - LIVE_SHARE) * len(expected):
        who = "; ".join(f"{member} {why}" for member, why in sorted(late.items())[:5])
        yield Violation(
            Invariant.LIVENESS,
            f"{len(late)} of {len(expected)} are late after {LIVENESS_SECONDS:g} s: {who}",
        )


def _behind(story: Story, member: str, trails: list[Trail], deadline: float) -> str | None:
    connected = story.present[member]
    if connected is None:
        return "is not connected"
    if connected.at > deadline:
        return f"connected {connected.at - deadline:.1f} s late"
    for trail in trails:
        final = story.rooms[trail.room].final
        if not trail.wanted or final is None:
            continue
        if not story.is_present(trail) or trail.open is None:
            return f"is not in {trail.room}"
        if trail.open.top < final.offset:
            return f"is at {trail.open.top} of {final.offset} in {trail.room}"
        if trail.open.epoch != final.epoch and trail.open.top != final.offset:
            return f"does not know the epoch of {trail.room}"
        if trail.open.moved_at > deadline:
            return f"caught up in {trail.room} {trail.open.moved_at - deadline:.1f} s late"
    return None


def no_false_success(story: Story) -> Violations:
    """11. While the store is down nothing is acked and nobody is let in."""
    for window in story.windows:
        if window.name not in STORE_DOWN:
            continue
        begin, end = window.begin + MARGIN_SECONDS, window.end - MARGIN_SECONDS
        for sent in story.sends.values():
            if sent.outcome == "ok" and begin < sent.tried and sent.at < end:
                yield Violation(
                    Invariant.NO_FALSE_SUCCESS, f"{_place(sent)} was acked in {window.name}"
                )
        for connected in story.connected.values():
            if begin < connected.began and connected.at < end:
                yield Violation(
                    Invariant.NO_FALSE_SUCCESS,
                    f"{connected.connection} was let in in {window.name}",
                )


INVARIANTS: tuple[Callable[[Story], Violations], ...] = (
    no_loss,
    no_duplicate,
    agreement,
    order,
    no_gap,
    nothing_invented,
    revocation,
    authorization,
    liveness,
    no_false_success,
)


def check(history: Iterable[Record]) -> list[Violation]:
    """Every violation of every invariant that a history can tell of."""
    story = Story(history)
    return [violation for invariant in INVARIANTS for violation in invariant(story)]


def _place(what: Sent | Received) -> str:
    return f"{what.room} {what.epoch} {what.offset}"


def _ranges(offsets: list[int]) -> str:
    first, last = offsets[0], offsets[-1]
    return str(first) if len(offsets) == 1 else f"{len(offsets)} of {first}..{last}"


# --- figures -------------------------------------------------------------------------------


class Latency(NamedTuple):
    """From the first attempt to the delivery, in milliseconds, to who was connected then."""

    deliveries: int
    p50: float
    p99: float

    def __str__(self) -> str:
        if not self.deliveries:
            return "no delivery"
        return f"p50 {self.p50:.1f} ms, p99 {self.p99:.1f} ms ({self.deliveries})"


class Report(NamedTuple):
    """What a run was made of."""

    outcomes: dict[str, int]
    duplicates: int
    """Acks that told of an earlier attempt."""
    delivered: int
    recovered: int
    not_recovered: int
    resets: int
    epochs: int
    holes: int
    connections: int
    closes: dict[int, int]
    revoked: int
    faults: dict[str, int]
    before: Latency
    """Delivered before the first fault: what the others are to be measured by."""
    calm: Latency
    """Sent and delivered between faults, when what they did was over."""
    faulty: Latency
    """On the way during a fault, or within the time that recovery may take."""

    @classmethod
    def of(cls, history: Iterable[Record]) -> Report:
        records = list(history)
        count: dict[type[Record], int] = defaultdict(int)
        for record in records:
            count[type(record)] += 1
        sends = [record for record in records if isinstance(record, Sent)]
        recovered = [r.recovered for r in records if isinstance(r, Joined) and r.since]
        before, calm, faulty = _latencies(records)
        return cls(
            outcomes=_counted(sent.outcome for sent in sends),
            duplicates=sum(sent.duplicate for sent in sends),
            delivered=count[Received],
            recovered=recovered.count(True),
            not_recovered=recovered.count(False),
            resets=count[Reset],
            epochs=count[Epoch],
            holes=count[Hole],
            connections=count[Connected],
            closes=_counted(r.code for r in records if isinstance(r, Closed)),
            revoked=count[Revoked],
            faults=_counted(r.name for r in records if isinstance(r, Fault) and r.phase == "begin"),
            before=before,
            calm=calm,
            faulty=faulty,
        )

    def __str__(self) -> str:
        outcomes = ", ".join(f"{n} {name}" for name, n in sorted(self.outcomes.items()))
        closes = ", ".join(f"{code} x {n}" for code, n in sorted(self.closes.items()))
        faults = ", ".join(f"{name} x {n}" for name, n in sorted(self.faults.items()))
        return "\n".join(
            [
                f"faults      {faults or 'none'}",
                f"sends       {sum(self.outcomes.values())}: {outcomes}; "
                f"{self.duplicates} acked as duplicates",
                f"delivered   {self.delivered}; {self.holes} holes",
                f"recovered   {self.recovered} true, {self.not_recovered} false; "
                f"{self.resets} resets, {self.epochs} epochs",
                f"connections {self.connections}; closed {closes or 'none'}; "
                f"{self.revoked} sessions revoked",
                f"latency     before any fault {self.before}",
                f"            between faults {self.calm}",
                f"            with faults {self.faulty}",
            ]
        )


def _counted(values: Iterable[T]) -> dict[T, int]:
    count: dict[T, int] = defaultdict(int)
    for value in values:
        count[value] += 1
    return dict(count)


def _latencies(records: list[Record]) -> tuple[Latency, Latency, Latency]:
    story = Story(records)
    windows = [w for w in story.windows if w.name not in ELSEWHERE]
    first = min((window.begin for window in windows), default=float("inf"))
    before: list[float] = []
    calm: list[float] = []
    faulty: list[float] = []
    for event in story.received:
        sent = story.sends.get((event.room, event.key))
        connected = story.connected.get(event.connection)
        if sent is None or event.kind != "message" or connected is None:
            continue
        if connected.at > sent.began:
            continue  # It was away by its own fault or another's: this is a recovery.
        near = any(
            window.begin < event.at and sent.began < window.end + LIVENESS_SECONDS / 2
            for window in windows
        )
        found = faulty if near else before if event.at <= first else calm
        found.append((event.at - sent.began) * 1000)
    return _latency(before), _latency(calm), _latency(faulty)


def _latency(values: list[float]) -> Latency:
    if not values:
        return Latency(0, 0.0, 0.0)
    values.sort()
    return Latency(len(values), values[len(values) // 2], values[int(len(values) * 0.99)])

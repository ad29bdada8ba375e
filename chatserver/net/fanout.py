"""Fan-out: one room's events to its members on this worker.

An event arrives from the store's pub/sub, takes its place in the room's feed (core/room.py) and
waits for the end of the loop's tick. Then the frames of the tick are joined once, and each live
member's transport gets one write: the kernel's send is the price of a delivery, so the way to go
faster is to send less often.

A member is *live* when the room's shared bytes are what it needs next, else *behind*: it has
just joined, reads too slowly, or its token has expired. One that is behind keeps only its
position and is fed from the log (from the room's recent events for the last stretch) until it
has caught up. So joining, lagging and coming back are one mechanism:

    behind ──caught up──▶ live ──stalled, expired, joined anew──▶ behind
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

from chatserver import telemetry
from chatserver.core import errors, frames
from chatserver.core.errors import Disconnect, StoreUnavailable
from chatserver.core.flow import Verdict, judge_reader
from chatserver.core.frames import Since
from chatserver.core.room import Event, Feed, Reading, Step
from chatserver.metrics import measured
from chatserver.net.compression import SharedFrames
from chatserver.net.connection import Connection, Phase, text_frame
from chatserver.net.members import UNISON_LEAST, UNISON_MOST, Member, Standing, Unison
from chatserver.net.recent import Memory, Recent
from chatserver.store import deadline
from chatserver.store.link import Subscription
from chatserver.store.log import RoomLog, channel, parse_live, room_of

WRITES_PER_ITERATION = 2000
"""Sockets written to before the loop may do something else: some 12 ms of kernel time."""
CHECK_SECONDS = 30.0
"""How often each room's position is compared with its log: pub/sub may lose the last message."""
ROUND_TICKS = 60
"""A round of looking at every room takes so many ticks: 15 seconds."""
CONFIRM_SECONDS = 0.4
"""How long a join waits for its subscription; with a read after it, less than a second."""
LINGER_SECONDS = 10.0
"""An empty room stays subscribed so long: people come back."""

log = telemetry.logger(__name__)


class Room:
    """One room on this worker."""

    __slots__ = (
        "behind",
        "checked_at",
        "confirmed",
        "feed",
        "interest",
        "left_at",
        "live",
        "name",
        "pending",
        "reading",
        "recent",
        "steady",
        "targets",
        "unison",
        "waiting",
    )

    def __init__(self, name: str, now: float) -> None:
        self.name = name
        self.feed = Feed()
        self.live: dict[Member, None] = {}
        self.interest = 0
        """Members, and joins under way."""
        self.behind = 0
        """How many of them will need the recent events."""
        self.confirmed = False
        self.waiting: list[Callable[[], None]] = []
        """Joins that wait for the subscription."""
        self.reading = False
        """A read of the log is under way for the feed."""
        self.pending: list[Event] = []
        """Events of this tick, not yet written to anyone."""
        self.targets: Batch | None = None
        """A write to more members than one iteration serves."""
        self.recent = Recent()
        self.checked_at = now
        self.left_at = now
        self.unison: dict[int, Unison] = {}
        """While nobody is different, all live members in their order: each group by the number of
        members before it. In a small room none."""
        self.steady = False
        """Who is live has not changed for a whole batch."""

    def part(self) -> None:
        """Its live members are not the same any more, or not for as long."""
        self.unison.clear()
        self.steady = False

    def fall_in(self, position: int) -> None:
        """All live members are written to in unison from here on, if that will last: that is when
        they have been the same for two batches."""
        if self.unison or len(self.live) < UNISON_LEAST:
            return
        if not self.steady:
            self.steady = True
            return
        members = list(self.live)
        if any(member.position != position for member in members):
            return
        for start in range(0, len(members), UNISON_MOST):
            self.unison[start] = Unison(members[start : start + UNISON_MOST], position)

    def written(self) -> int:
        """Up to this offset live members have been served or are being served."""
        if self.pending:
            return self.pending[0].offset - 1
        assert self.feed.offset is not None
        return self.feed.offset


class Batch:
    """A tick's frames on their way to the members that were live then."""

    __slots__ = ("base", "events", "frames", "members", "next", "origins", "taken_at", "top")

    def __init__(self, events: list[Event], members: list[Member]) -> None:
        self.events = events
        self.members = members
        self.next = 0
        self.base = events[0].offset - 1
        self.top = events[-1].offset
        self.frames = SharedFrames([event.payload for event in events])
        self.origins = {event.origin for event in events if event.origin is not None}
        self.taken_at = frames.taken_at(events[0].payload)
        """When the store took the first of them."""

    def count(self, deliveries: int, size: int) -> None:
        """So many, of so many bytes in all, were just written."""
        measured.deliveries += deliveries
        measured.sent_bytes += size
        if self.taken_at is not None:
            waited = time.time() - measured.clock_offset_seconds - self.taken_at
            measured.delivery_latency_seconds.observe(waited, deliveries)


class Fanout:
    """All rooms of this worker.

    ``fresh()`` tells whether revocations are current; while not, nothing is delivered (the log
    has it). ``disconnect(connection, why)`` ends a connection.
    """

    def __init__(
        self,
        room_log: RoomLog,
        *,
        fresh: Callable[[], bool],
        disconnect: Callable[[Connection, Disconnect], None],
    ) -> None:
        self._log = room_log
        self._fresh = fresh
        self._disconnect = disconnect
        self._subscription: Subscription | None = None
        self._rooms: dict[str, Room] = {}
        self._dirty: dict[Room, None] = {}
        self._flush_scheduled = False
        self._replies: list[Connection] = []
        """Connections that hold what they are to be told beside the rooms' events."""
        self._unrepaired: set[Room] = set()
        self._retry: set[Member] = set()
        self._memory = Memory()
        self._round: list[Room] = []
        """Rooms to be looked at before the next round begins."""
        self._share = 1
        self.occupied = 0
        """Rooms with members, or with joins under way."""

    def attach(self, subscription: Subscription) -> None:
        """Where to hear of events; made with ``receive_live`` and ``confirm`` of this."""
        self._subscription = subscription

    def __len__(self) -> int:
        return len(self._rooms)

    # Joining and leaving.

    def join(
        self,
        name: str,
        since: Since | None,
        last: int,
        replay: int,
        done: Callable[[Reading | StoreUnavailable], None],
    ) -> None:
        """Subscribe, wait until that is confirmed, then read: the seam loses and doubles nothing.

        What is read begins where the member will: after ``since``, or with the latest ``last``
        events where that cannot be or more than ``replay`` follow it. The room is kept until
        ``admit`` or ``abandon`` follows, once for each ``join``.
        """
        room = self._enter(name)
        if room.interest == 0:
            self.occupied += 1
        room.interest += 1
        room.behind += 1

        def opened(reading: Reading | StoreUnavailable) -> None:
            if isinstance(reading, Reading):
                if room.feed.offset is None:
                    self._dispatch(room, room.feed.start(reading))
                else:
                    self._compare(room, reading)
            done(reading)

        def read() -> None:
            epoch, after = (since.epoch, since.offset) if since else ("", None)
            self._log.read(name, opened, epoch=epoch, after=after, backwards=last, replay=replay)

        def give_up() -> None:
            if read in room.waiting:
                room.waiting.remove(read)
                done(StoreUnavailable("the subscription was not confirmed"))

        if room.confirmed:
            read()
        else:
            room.waiting.append(read)
            deadline.call_later(CONFIRM_SECONDS, give_up)

    def abandon(self, name: str) -> None:
        """A join that will not be admitted."""
        room = self._rooms[name]
        self._caught_up(room)
        self._forgo(room)

    def admit(self, connection: Connection, name: str, start: int, opening: Reading) -> None:
        """Replay what comes after ``start``, then deliver live events."""
        room = self._rooms[name]
        if connection.memberships.get(name):
            self.leave(connection, name)
        member = Member(connection, room, opening.epoch, start, opening.top)
        connection.memberships[name] = member
        self._serve(member, [event for event in opening.events if event.offset > start])

    def leave(self, connection: Connection, name: str) -> None:
        """Nothing of the room goes to the connection from now on. Leaving twice is no error."""
        member = connection.memberships.pop(name, None)
        if member is None:
            return
        if member.standing is Standing.BEHIND:
            self._caught_up(member.room)
        member.room.live.pop(member, None)
        member.room.part()
        member.standing = Standing.GONE
        self._retry.discard(member)
        self._forgo(member.room)
        self._relieve(connection)

    def leave_all(self, connection: Connection) -> None:
        for name in list(connection.memberships):
            self.leave(connection, name)

    def _enter(self, name: str) -> Room:
        room = self._rooms.get(name)
        if room is None:
            room = self._rooms[name] = Room(name, time.monotonic())
            assert self._subscription is not None
            self._subscription.subscribe(channel(name))
        return room

    def _forgo(self, room: Room) -> None:
        room.interest -= 1
        if room.interest == 0:
            self.occupied -= 1
            room.left_at = time.monotonic()

    # Holding back and catching up.

    def hold_back(self, connection: Connection) -> None:
        """Deliver nothing more to it for now; each room's position is kept."""
        for member in connection.memberships.values():
            self._fall_behind(member)

    def _fall_behind(self, member: Member) -> None:
        if member.standing is Standing.LIVE:
            member.standing = Standing.BEHIND
            member.fall_out()
            member.room.live.pop(member, None)
            member.room.part()
            member.room.behind += 1
            if member.connection.lagging_since is None:
                member.connection.lagging_since = time.monotonic()

    def catch_up(self, connection: Connection) -> None:
        """Go on where ``hold_back`` left off."""
        for member in list(connection.memberships.values()):
            if member.standing is Standing.BEHIND:
                self._advance(member)
        self._relieve(connection)

    def _relieve(self, connection: Connection) -> None:
        """It lags no longer once it reads, and nothing is held back from it."""
        if connection.lagging_since is None or connection.writing_paused:
            return
        if all(member.standing is Standing.LIVE for member in connection.memberships.values()):
            connection.lagging_since = None

    def _advance(self, member: Member) -> None:
        """Bring a member that is behind one step further."""
        connection, room = member.connection, member.room
        if member.reading or not _receptive(connection):
            return
        feed = room.feed
        if feed.offset is not None and member.epoch == feed.epoch:
            if member.position >= room.written():
                self._go_live(member)
                return
            recent = room.recent.after(member.position)
            if recent is not None:
                self._serve(member, recent)
                return
        if room.reading and member.epoch != feed.epoch:
            # The room is about to learn of another epoch; one of the two is out of date.
            self._retry.add(member)
            return
        member.reading = True
        self._log.read(
            room.name,
            lambda reading: self._receive_missed(member, reading),
            epoch=member.epoch,
            after=member.position,
            nearest=True,
        )

    def _receive_missed(self, member: Member, reading: Reading | StoreUnavailable) -> None:
        member.reading = False
        if member.standing is not Standing.BEHIND:
            return
        if isinstance(reading, StoreUnavailable):
            self._retry.add(member)
            return
        self._compare(member.room, reading)
        if not _receptive(member.connection):
            return
        # Under another epoch it is told with a reset where it goes on.
        missing = reading.first - 1 - member.position if reading.epoch == member.epoch else 0
        if judge_reader(missing=missing) is Verdict.DISCONNECT:
            self._disconnect(member.connection, errors.SLOW_CONSUMER)
            return
        self._settle(member, reading)
        self._serve(member, [e for e in reading.events if e.offset > member.position])

    def _serve(self, member: Member, events: list[Event]) -> None:
        """Write a run of events to one member that is behind, then go on from there."""
        connection = member.connection
        if not events or events[0].offset != member.position + 1:
            events = []
        if events and _receptive(connection):
            if not self._fresh():
                self._retry.add(member)
                return
            member.position = events[-1].offset
            data, shown = _frames_for(member, events)
            measured.deliveries += shown
            measured.replayed_events += len(events)
            connection.write(data)
        if member.standing is Standing.BEHIND:
            self._advance(member)

    def _go_live(self, member: Member) -> None:
        member.standing = Standing.LIVE
        member.room.live[member] = None
        member.room.part()
        self._caught_up(member.room)
        self._relieve(member.connection)

    def _caught_up(self, room: Room) -> None:
        room.behind -= 1
        if room.behind == 0:
            self._memory.forget(room.recent)

    def _settle(self, member: Member, reading: Reading) -> None:
        """Tell a member where it is in the log as it was read."""
        connection, name = member.connection, member.room.name
        if not reading.continues(member.position):
            member.position = member.replayed_to = reading.nearest(member.position)
            measured.resets += 1
            connection.send(frames.reset(name, reading.epoch, member.position))
        elif reading.epoch != member.epoch:
            connection.send(frames.epoch(name, reading.epoch))
        member.epoch = reading.epoch

    # Live events.

    def receive_live(self, channel: str, payload: bytes) -> None:
        """A message from the store's pub/sub."""
        room = self._rooms.get(room_of(channel))
        if room is None:
            return  # unsubscribed meanwhile
        try:
            event = parse_live(payload)
        except ValueError:
            measured.garbage_messages += 1
            return
        if not self._fresh():
            # Nothing may be delivered before revocations are current: read it later.
            room.feed.miss()
        self._dispatch(room, room.feed.receive_live(event))

    def confirm(self, channel: str) -> None:
        """The store has confirmed the subscription, for the first time or again."""
        room = self._rooms.get(room_of(channel))
        if room is None:
            return
        again, room.confirmed = room.confirmed, True
        waiting, room.waiting = room.waiting, []
        for read in waiting:
            read()
        room.checked_at = time.monotonic()
        if again:
            # A reading that is under way, the first one too, may have been taken before: one more
            # is wanted after it.
            room.feed.miss()
            self._unrepaired.add(room)
            self._repair(room)

    def _dispatch(self, room: Room, step: Step) -> None:
        if step.events:
            room.pending += step.events
            if room.behind:
                self._memory.remember(room.recent, step.events)
            self._dirty[room] = None
            self._schedule_flush()
        if room.feed.behind:
            self._unrepaired.add(room)
            self._repair(room)

    def _move(self, room: Room, reading: Reading) -> None:
        """The log goes on under another epoch, or elsewhere: each member is told its part."""
        self._write_out(room)
        room.part()
        self._memory.forget(room.recent)
        now = time.time()
        for member in list(room.live):
            if member.connection.expires_at <= now:
                self.hold_back(member.connection)
            else:
                self._settle(member, reading)

    def _repair(self, room: Room) -> None:
        """Read what the feed is missing. What comes meanwhile waits in the feed."""
        feed = room.feed
        if room.reading or feed.offset is None or not self._fresh():
            return
        measured.repairs += 1
        room.reading = True
        room.checked_at = time.monotonic()
        feed.behind = True
        self._log.read(
            room.name,
            lambda reading: self._receive_repair(room, reading),
            epoch=feed.epoch,
            after=feed.offset,
            nearest=True,
        )

    def _compare(self, room: Room, reading: Reading) -> None:
        """A reading made for a member may show that the room's own epoch is over."""
        if room.feed.offset is not None and reading.epoch != room.feed.epoch:
            room.feed.miss()
            self._unrepaired.add(room)
            self._repair(room)

    def _receive_repair(self, room: Room, reading: Reading | StoreUnavailable) -> None:
        room.reading = False
        if isinstance(reading, StoreUnavailable) or not self._fresh():
            self._unrepaired.add(room)
            return
        self._unrepaired.discard(room)
        step = room.feed.receive_reading(reading)
        if step.moved:
            self._move(room, reading)
        self._dispatch(room, step)

    # Writing.

    def flush_later(self, connection: Connection) -> None:
        """It holds something to be written at the end of the loop's turn."""
        self._replies.append(connection)
        self._schedule_flush()

    def _schedule_flush(self) -> None:
        if not self._flush_scheduled:
            self._flush_scheduled = True
            asyncio.get_running_loop().call_soon(self._flush)

    def _flush(self) -> None:
        """Write the tick's events, to so many members that the loop stays responsive."""
        self._flush_scheduled = False
        # While this process knows nothing of revocations, replies alone go out; tick() goes on
        # with the rooms when it may.
        fresh = self._fresh()
        # Small rooms first, for a member may get a reply in the same write; the other replies
        # before what large rooms write in unison, which looks at nobody and may not overtake them.
        if fresh:
            self._write_rooms([room for room in self._dirty if len(room.live) < UNISON_LEAST])
        replies, self._replies = self._replies, []
        for connection in replies:
            if connection.phase is Phase.OPEN:
                connection.flush()
        if fresh:
            self._write_rooms([room for room in self._dirty if len(room.live) >= UNISON_LEAST])
            if self._dirty:
                self._schedule_flush()

    def _write_rooms(self, rooms: list[Room]) -> None:
        left = WRITES_PER_ITERATION
        for room in rooms:
            if left <= 0:
                break
            left -= self._write(room, left)
            self._dirty.pop(room, None)
            if room.targets is not None or room.pending:
                self._dirty[room] = None  # Behind the others: the next turn is theirs.

    def _write_out(self, room: Room) -> None:
        """Everything pending, to everyone, now."""
        while room.pending or room.targets:
            self._write(room, len(room.live) + 1)

    def _write(self, room: Room, most: int) -> int:
        """Write the room's current batch to about so many members. Returns to how many."""
        now = time.time()
        batch = room.targets
        if batch is None:
            if not room.pending:
                return 0
            events, room.pending = room.pending, []
            batch = room.targets = Batch(events, list(room.live))
            if batch.origins:
                room.unison.clear()  # One of them may see a skip in it.
        served = 0
        while served < most and batch.next < len(batch.members):
            unison = room.unison.get(batch.next)
            if unison is not None and unison.until > now:
                written = len(unison)
                batch.count(written * len(batch.events), unison.write(batch.frames, batch.top))
            else:
                written = self._write_each(batch, most - served, now)
            batch.next += written
            served += written
        if batch.next >= len(batch.members):
            room.targets = None
            room.fall_in(batch.top)
        return served

    def _write_each(self, batch: Batch, most: int, now: float) -> int:
        """Look at the batch's next members, one by one. Returns at how many."""
        chunk = batch.members[batch.next : batch.next + most]
        base, top, shared = batch.base, batch.top, batch.frames
        live = Standing.LIVE
        origins = batch.origins
        served = size = 0
        for member in chunk:
            if member.standing is not live:
                continue
            connection = member.connection
            if connection.expires_at <= now:
                self.hold_back(connection)
            elif member.position == base and not (origins and connection.id in origins):
                member.position = top
                data = shared[connection.window_bits]
                connection.write_now(data)
                served += 1
                size += len(data)
            elif member.position < top:
                self._write_singly(member, batch)
        if served:
            batch.count(served * len(batch.events), size)
        return len(chunk)

    def _write_singly(self, member: Member, batch: Batch) -> None:
        """For a member that is ahead of the batch's beginning, or sees a skip in it."""
        events = [event for event in batch.events if event.offset > member.position]
        data, shown = _frames_for(member, events)
        member.position = batch.top
        member.connection.write_now(data)
        batch.count(shown, len(data))

    # Time.

    def tick(self) -> None:
        """A few times a second: try again what failed, compare positions, drop empty rooms."""
        if not self._fresh():
            return
        if self._dirty:
            self._schedule_flush()
        retry, self._retry = self._retry, set()
        for member in retry:
            if member.standing is Standing.BEHIND:
                self._advance(member)
        for room in list(self._unrepaired):
            self._repair(room)
        self._go_round()

    def _go_round(self) -> None:
        """Look at the next few rooms, so that each has its turn within half of CHECK_SECONDS."""
        if not self._round:
            self._round = list(self._rooms.values())
            self._share = len(self._round) // ROUND_TICKS + 1
        now = time.monotonic()
        for room in self._round[-self._share :]:
            if self._rooms.get(room.name) is not room:
                continue
            if room.interest == 0 and now - room.left_at > LINGER_SECONDS:
                self._drop(room)
            elif room.confirmed and now - room.checked_at > CHECK_SECONDS / 2:
                self._check(room)
        del self._round[-self._share :]

    def _check(self, room: Room) -> None:
        """Compare the room's position with its log. Meanwhile it goes on as it was."""
        feed = room.feed
        if room.reading or feed.offset is None or feed.behind:
            return  # it is being compared already
        room.checked_at = time.monotonic()

        def compare(reading: Reading | StoreUnavailable) -> None:
            if isinstance(reading, StoreUnavailable):
                self._unrepaired.add(room)
            elif reading.epoch != feed.epoch or reading.top > (feed.offset or 0):
                # Perhaps what is missing is only on its way; the next reading tells.
                feed.miss()
                self._unrepaired.add(room)
                self._repair(room)

        self._log.read(room.name, compare, backwards=0)

    def _drop(self, room: Room) -> None:
        del self._rooms[room.name]
        self._memory.forget(room.recent)
        self._dirty.pop(room, None)
        self._unrepaired.discard(room)
        assert self._subscription is not None
        self._subscription.unsubscribe(channel(room.name))


def _frames_for(member: Member, events: list[Event]) -> tuple[bytes, int]:
    """What one member is sent of a run of events, and how many of them it is shown."""
    sender, replayed_to = member.connection.id, member.replayed_to
    payloads = [event.payload for event in events]
    shown = len(events)
    for number, event in enumerate(events):
        if event.origin == sender and event.offset > replayed_to:
            payloads[number] = frames.skip(member.room.name, event.offset)
            shown -= 1
    return b"".join(map(text_frame, payloads)), shown


def _receptive(connection: Connection) -> bool:
    """Whether the connection may be written to."""
    return (
        connection.phase is Phase.OPEN
        and not connection.writing_paused
        and connection.expires_at > time.time()
    )

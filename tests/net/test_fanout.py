"""Fan-out against a model of the store: a log that answers late, pub/sub that loses and doubles."""

from __future__ import annotations

import asyncio
import json
import random
import time
import zlib
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest

from chatserver.core.errors import SLOW_CONSUMER, Disconnect, StoreUnavailable
from chatserver.core.frames import Since
from chatserver.core.room import Event, Reading
from chatserver.metrics import measured
from chatserver.net import compression
from chatserver.net.connection import Connection, Phase
from chatserver.net.fanout import WRITES_PER_ITERATION, Fanout
from chatserver.net.members import UNISON_LEAST, UNISON_MOST
from chatserver.store.log import channel

ROOM = "general"
USER = b"somebody" * 15
"""So long that an event is worth compressing."""
Answer = Callable[[Reading | StoreUnavailable], None]


class Transport(asyncio.Transport):
    """Keeps what is written, one entry a write."""

    def __init__(self) -> None:
        super().__init__()
        self.writes: list[bytes] = []
        self.after_write: Callable[[], None] = lambda: None

    def write(self, data: Any) -> None:
        self.writes.append(bytes(data))
        self.after_write()

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False


class Log:
    """A room's log and its readings, which are taken and answered when the test says so."""

    def __init__(self) -> None:
        self.epoch = "e1"
        self.past: dict[str, int] = {}
        """Earlier epochs, and the last offset that each shares with this log."""
        self.events: list[Event] = []
        self.top = 0
        self.serial = 0
        self.asked: list[tuple[dict[str, Any], Answer]] = []

    def append(self, origin: str | None = None) -> Event:
        self.top += 1
        self.serial += 1
        place = (self.top, self.serial)
        head = b'{"type":"message","room":"general","offset":%d,"body":%d,' % place
        payload = head + b'"user":"%b"}' % USER
        event = Event(self.epoch, self.top, payload, origin)
        self.events.append(event)
        return event

    def restart_empty(self, epoch: str) -> None:
        self.epoch, self.past, self.events, self.top = epoch, {}, [], 0

    def fork(self, epoch: str, lost: int = 0) -> None:
        """The store comes back without the latest events, but with its epoch."""
        self.top = max(self.top - lost, *self.past.values(), 0)
        self.events = [event for event in self.events if event.offset <= self.top]
        self.past[self.epoch] = self.top
        self.epoch = epoch

    def read(self, room: str, done: Answer, **asked: Any) -> None:
        assert room == ROOM
        self.asked.append((asked, done))

    def take(self, asked: dict[str, Any]) -> Reading:
        """As store/lua/read.lua."""
        first = self.events[0].offset if self.events else self.top + 1
        epoch, after = asked.get("epoch", ""), asked.get("after")
        shared = self.top if epoch in ("", self.epoch) else self.past.get(epoch, -1)
        if after is not None and shared >= 0 and asked.get("nearest"):
            after = max(min(after, shared), first - 1)
        replay = asked.get("replay") or self.top
        if after is not None and first - 1 <= after <= shared and self.top - after <= replay:
            events = [e for e in self.events if e.offset > after][: asked.get("onwards", 8)]
        else:
            count = asked.get("backwards", 8)
            latest = self.events[-count:] if count else []
            events = latest[:8] if asked.get("replay") else latest[-8:]
        now = [event._replace(epoch=self.epoch) for event in events]
        return Reading(self.epoch, self.top, first, shared, now)

    def answer_all(self) -> None:
        while self.asked:
            asked, done = self.asked.pop(0)
            done(self.take(asked))


class Subscriptions:
    def __init__(self) -> None:
        self.channels: set[str] = set()

    def subscribe(self, name: str) -> None:
        self.channels.add(name)

    def unsubscribe(self, name: str) -> None:
        self.channels.discard(name)


class Owner:
    """A listener, as far as a connection that only writes needs one."""

    def __init__(self, fanout: Fanout) -> None:
        self.holding = fanout.flush_later


class House:
    """A fan-out with its surroundings."""

    def __init__(self) -> None:
        self.log = Log()
        self.is_fresh = True
        self.disconnected: list[tuple[Connection, Disconnect]] = []
        self.fanout = Fanout(
            self.log,  # type: ignore[arg-type]
            fresh=lambda: self.is_fresh,
            disconnect=lambda connection, why: self.disconnected.append((connection, why)),
        )
        self.subscriptions = Subscriptions()
        self.fanout.attach(self.subscriptions)  # type: ignore[arg-type]

    def connection(self, name: str = "c", window_bits: int = 0) -> Connection:
        connection = Connection(Owner(self.fanout), 65536)  # type: ignore[arg-type]
        connection.transport = Transport()
        connection.phase = Phase.OPEN
        connection.id = name
        connection.window_bits = window_bits
        connection.expires_at = time.time() + 900
        return connection

    def join(self, connection: Connection, since: Since | None = None, last: int = 0) -> None:
        """As the hub does, once the answer is there."""

        def opened(reading: Reading | StoreUnavailable) -> None:
            assert isinstance(reading, Reading)
            start = max(reading.top - last, reading.first - 1) if since is None else since.offset
            self.fanout.admit(connection, ROOM, start, reading)

        self.fanout.join(ROOM, since, last, 1000, opened)

    def confirm(self) -> None:
        self.fanout.confirm(channel(ROOM))

    def joined(self, name: str = "c", window_bits: int = 0) -> Connection:
        connection = self.connection(name, window_bits)
        self.join(connection)
        self.confirm()
        self.log.answer_all()
        return connection

    def hear(self, event: Event) -> None:
        origin = (event.origin or "-").encode()
        payload = b"%b %d %b %b" % (event.epoch.encode(), event.offset, origin, event.payload)
        self.fanout.receive_live(channel(ROOM), payload)

    def publish(self, origin: str | None = None) -> None:
        self.hear(self.log.append(origin))


def writes(connection: Connection) -> list[bytes]:
    assert isinstance(connection.transport, Transport)
    return connection.transport.writes


def seen(connection: Connection) -> list[dict[str, Any]]:
    """The frames written so far, and whether each came compressed."""
    data, frames = b"".join(writes(connection)), []
    while data:
        size, start = data[1], 2
        if size == 126:
            size, start = int.from_bytes(data[2:4], "big"), 4
        payload = data[start : start + size]
        compressed = data[0] == 0xC1
        if compressed:
            # By itself: nothing of what came before is needed.
            payload = zlib.decompress(payload + b"\0\0\xff\xff\x03\0", -connection.window_bits)
        frames.append(json.loads(payload) | {"compressed": compressed})
        data = data[start + size :]
    return frames


def offsets(connection: Connection) -> list[int]:
    return [frame["offset"] for frame in seen(connection) if frame["type"] != "reset"]


async def settle() -> None:
    """Let everything that is scheduled run."""
    for _ in range(20):
        await asyncio.sleep(0)


async def test_a_tick_of_events_is_one_write_to_each_member() -> None:
    house = House()
    members = [house.joined("a"), house.joined("b")]
    for _ in range(5):
        house.publish()
    await settle()

    for member in members:
        assert len(writes(member)) == 1
        assert offsets(member) == [1, 2, 3, 4, 5]


async def test_nothing_is_read_before_the_subscription_is_confirmed() -> None:
    house = House()
    house.join(house.connection())

    assert house.log.asked == []
    house.confirm()
    assert len(house.log.asked) == 1


async def test_a_subscription_that_is_never_confirmed_fails_the_join(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chatserver.net.fanout.CONFIRM_SECONDS", 0.0)
    house = House()
    failed: list[object] = []
    house.fanout.join(ROOM, None, 0, 1000, failed.append)
    while not failed:
        await asyncio.sleep(0)

    assert isinstance(failed[0], StoreUnavailable)


async def test_what_comes_between_subscription_and_reading_is_delivered_once() -> None:
    house = House()
    for _ in range(3):
        house.log.append()
    connection = house.connection()
    house.join(connection, last=2)
    house.confirm()
    house.publish()  # heard before the answer, and in the answer
    house.log.answer_all()
    house.publish()
    await settle()

    assert offsets(connection) == [3, 4, 5]


async def test_the_sender_that_wants_no_echo_sees_a_skip_in_its_place() -> None:
    house = House()
    sender, other = house.joined("s"), house.joined("o")
    house.publish()
    house.publish(origin="s")
    await settle()

    assert [frame["type"] for frame in seen(sender)] == ["message", "skip"]
    assert [frame["type"] for frame in seen(other)] == ["message", "message"]
    assert offsets(sender) == [1, 2]


async def test_the_skip_is_seen_also_where_the_event_had_to_be_read_from_the_log() -> None:
    house = House()
    sender, other = house.joined("s"), house.joined("o")
    house.log.append(origin="s")  # lost on the way
    house.publish()
    house.log.answer_all()
    await settle()

    assert [frame["type"] for frame in seen(sender)] == ["skip", "message"]
    assert [frame["type"] for frame in seen(other)] == ["message", "message"]
    assert offsets(sender) == offsets(other) == [1, 2]


async def test_a_sender_that_reads_slowly_sees_the_skip_too() -> None:
    house = House()
    sender = house.joined("s")
    sender.writing_paused = True
    house.fanout.hold_back(sender)
    house.publish(origin="s")
    house.publish()
    await settle()
    sender.writing_paused = False
    house.fanout.catch_up(sender)
    house.log.answer_all()
    await settle()

    assert [frame["type"] for frame in seen(sender)] == ["skip", "message"]


async def test_a_replay_shows_the_sender_its_own_whatever_their_echo() -> None:
    house = House()
    for _ in range(12):  # more than one reading
        house.log.append(origin="s")
    sender = house.connection("s")
    house.join(sender, since=Since("e1", 0))
    house.confirm()
    house.log.answer_all()
    house.publish(origin="s")
    await settle()

    assert [frame["type"] for frame in seen(sender)] == ["message"] * 12 + ["skip"]
    assert offsets(sender) == list(range(1, 14))


async def test_after_a_reset_nothing_of_the_replay_is_left_to_show() -> None:
    house = House()
    for _ in range(3):
        house.log.append()
    sender = house.connection("s")
    house.join(sender, since=Since("e1", 0))
    house.confirm()
    house.log.answer_all()
    house.log.restart_empty("e2")
    house.publish(origin="s")
    house.log.answer_all()
    await settle()

    assert [frame["type"] for frame in seen(sender)] == ["message"] * 3 + ["reset", "skip"]


async def test_a_hole_is_filled_from_the_log_before_anything_later() -> None:
    house = House()
    connection = house.joined()
    house.publish()
    house.log.append()  # lost on the way
    house.publish()
    await settle()
    assert offsets(connection) == [1]

    house.log.answer_all()
    await settle()
    assert offsets(connection) == [1, 2, 3]


async def test_a_lost_last_message_is_found_when_the_subscription_is_confirmed_again() -> None:
    house = House()
    connection = house.joined()
    house.log.append()
    house.confirm()
    house.log.answer_all()
    await settle()

    assert offsets(connection) == [1]


async def test_a_message_lost_amid_the_first_reading_is_found_when_confirmed_again() -> None:
    house = House()
    connection = house.connection()
    house.join(connection)
    house.confirm()
    asked, answer = house.log.asked.pop()
    reading = house.log.take(asked)
    house.log.append()
    house.confirm()
    answer(reading)
    house.log.answer_all()
    await settle()

    assert offsets(connection) == [1]


async def test_a_lost_last_message_is_found_when_positions_are_compared(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chatserver.net.fanout.CHECK_SECONDS", -1.0)
    house = House()
    connection = house.joined()
    house.publish()
    house.log.append()  # lost on the way, and nothing comes after it
    house.fanout.tick()
    house.log.answer_all()
    await settle()

    assert offsets(connection) == [1, 2]


async def test_what_comes_while_positions_are_compared_is_not_held_up(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chatserver.net.fanout.CHECK_SECONDS", -1.0)
    house = House()
    connection = house.joined()
    house.fanout.tick()
    [(asked, compared)] = house.log.asked
    house.log.asked.clear()
    before = house.log.take(asked)
    house.publish()
    await settle()
    assert offsets(connection) == [1]

    compared(before)
    assert house.log.asked == []  # it was only older than what is known


async def test_every_room_is_looked_at_within_a_round(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("chatserver.net.fanout.CHECK_SECONDS", -1.0)
    monkeypatch.setattr("chatserver.net.fanout.ROUND_TICKS", 10)
    house = House()
    asked: list[tuple[str, Answer]] = []
    monkeypatch.setattr(house.log, "read", lambda room, done, **_: asked.append((room, done)))
    for number in range(95):
        house.fanout.join(f"room-{number}", None, 0, 1000, lambda reading: None)
        house.fanout.confirm(channel(f"room-{number}"))
    for _, done in asked:
        done(Reading("e1", 0, 1, 0, []))
    asked.clear()
    looked_at: list[int] = []
    for _ in range(10):
        house.fanout.tick()
        looked_at.append(len(asked) - sum(looked_at))

    assert len({room for room, _ in asked}) == 95
    assert max(looked_at) == 10


async def test_a_failed_repair_is_tried_again() -> None:
    house = House()
    connection = house.joined()
    house.log.append()
    house.publish()
    _, done = house.log.asked.pop()
    done(StoreUnavailable("away"))
    house.fanout.tick()
    house.log.answer_all()
    await settle()

    assert offsets(connection) == [1, 2]


async def test_an_expired_connection_gets_nothing_and_later_everything() -> None:
    house = House()
    connection, other = house.joined("expired"), house.joined("other")
    connection.expires_at = time.time() - 1
    house.publish()
    await settle()
    house.publish()
    await settle()
    assert offsets(connection) == []
    assert offsets(other) == [1, 2]

    connection.expires_at = time.time() + 900
    house.fanout.catch_up(connection)
    house.log.answer_all()
    await settle()
    assert offsets(connection) == [1, 2]


async def test_one_that_is_held_back_is_not_waited_for() -> None:
    house = House()
    slow, quick = house.joined("slow"), house.joined("quick")
    slow.writing_paused = True
    house.fanout.hold_back(slow)
    for _ in range(20):
        house.publish()
        await settle()
    assert offsets(quick) == list(range(1, 21))
    assert offsets(slow) == []

    slow.writing_paused = False
    house.fanout.catch_up(slow)
    while house.log.asked:
        house.log.answer_all()
    house.publish()
    await settle()
    assert offsets(slow) == list(range(1, 22))


async def test_one_whose_place_is_no_longer_in_the_log_is_sent_away() -> None:
    house = House()
    slow = house.joined("slow")
    house.fanout.hold_back(slow)
    for _ in range(10):
        house.publish()
    await settle()
    house.log.events = house.log.events[5:]
    member = slow.memberships[ROOM]
    member.room.recent.clear()
    house.fanout.catch_up(slow)
    house.log.answer_all()

    assert house.disconnected == [(slow, SLOW_CONSUMER)]


async def test_what_the_log_drops_behind_a_replay_does_not_end_it() -> None:
    house = House()
    for _ in range(20):
        house.log.append()
    joiner = house.connection()
    house.join(joiner, last=20)
    house.confirm()
    while house.log.asked:
        asked, done = house.log.asked.pop(0)
        done(house.log.take(asked))
        house.log.events = house.log.events[5:]
    await settle()

    assert offsets(joiner) == list(range(1, 21))
    assert house.disconnected == []


async def test_a_reply_and_an_event_of_one_tick_are_one_write() -> None:
    house = House()
    member = house.joined("a")
    member.send(b'{"type":"ack","id":1}')
    house.publish()
    member.send(b'{"type":"ack","id":2}')
    await settle()

    assert len(writes(member)) == 1
    assert [frame["type"] for frame in seen(member)] == ["ack", "ack", "message"]


async def in_unison(house: House, members: int) -> list[Connection]:
    """A large room in which nobody has come or gone for a while."""
    found = [house.joined(f"m{i}") for i in range(members)]
    for _ in range(2):
        house.publish()
        await settle()
    assert found[0].memberships[ROOM].room.unison
    return found


async def test_in_a_large_room_a_reply_is_not_overtaken_by_a_later_event() -> None:
    house = House()
    members = await in_unison(house, UNISON_LEAST)
    members[0].send(b'{"type":"ack","id":1}')
    house.publish()
    await settle()

    assert [frame["type"] for frame in seen(members[0])] == ["message", "message", "ack", "message"]


async def test_in_a_large_room_a_sender_sees_a_skip_where_it_wants_no_echo() -> None:
    house = House()
    members = await in_unison(house, UNISON_LEAST)
    sender, *others = members
    house.publish(origin=sender.id)
    house.publish()
    await settle()

    assert [frame["type"] for frame in seen(sender)] == ["message", "message", "skip", "message"]
    assert all(offsets(member) == [1, 2, 3, 4] for member in others)


async def test_in_a_large_room_whoever_is_ahead_of_the_others_sees_nothing_twice() -> None:
    house = House()
    members = [house.joined(f"m{i}") for i in range(UNISON_LEAST)]
    known = [house.log.append() for _ in range(5)]
    ahead = house.connection("ahead")
    house.join(ahead)
    house.log.answer_all()
    for event in known:
        house.hear(event)
        await settle()
    house.publish()
    await settle()

    assert offsets(ahead) == [6]
    assert all(offsets(member) == [1, 2, 3, 4, 5, 6] for member in members)


async def test_in_a_large_room_nothing_is_delivered_to_whoever_has_left() -> None:
    house = House()
    members = await in_unison(house, UNISON_LEAST + 1)
    house.fanout.leave(members[0], ROOM)
    house.publish()
    await settle()

    assert offsets(members[0]) == [1, 2]
    assert all(offsets(member) == [1, 2, 3] for member in members[1:])


async def test_in_a_large_room_nothing_is_delivered_to_whoever_was_revoked_in_this_tick() -> None:
    house = House()
    members = await in_unison(house, UNISON_LEAST)
    house.publish()
    members[0].deafen()
    await settle()

    assert offsets(members[0]) == [1, 2]
    assert all(offsets(member) == [1, 2, 3] for member in members[1:])


async def test_in_a_large_room_an_expired_token_is_noticed_before_the_next_delivery(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    house = House()
    members = await in_unison(house, UNISON_LEAST)
    members[0].serve_until(time.time() + 100)
    for _ in range(2):
        house.publish()
        await settle()
    assert members[0].memberships[ROOM].room.unison
    late = time.time() + 101
    monkeypatch.setattr("chatserver.net.fanout.time.time", lambda: late)
    house.publish()
    await settle()

    assert offsets(members[0]) == [1, 2, 3, 4]
    assert all(offsets(member) == [1, 2, 3, 4, 5] for member in members[1:])


async def test_a_huge_room_is_written_to_over_several_iterations() -> None:
    house = House()
    members = [house.joined(f"m{i}") for i in range(WRITES_PER_ITERATION + 10)]
    house.publish()
    await asyncio.sleep(0)
    served = sum(bool(writes(member)) for member in members)
    assert served == WRITES_PER_ITERATION

    last = members[-1]
    house.fanout.leave(last, ROOM)
    house.publish()
    await settle()
    assert offsets(last) == []
    assert all(offsets(member) == [1, 2] for member in members[:-1])


async def test_a_huge_room_goes_on_in_unison_in_the_next_iteration() -> None:
    house = House()
    members = await in_unison(house, WRITES_PER_ITERATION + UNISON_MOST + 10)
    room = members[0].memberships[ROOM].room
    house.publish()
    await asyncio.sleep(0)
    served = sum(offsets(member) == [1, 2, 3] for member in members)
    assert served == WRITES_PER_ITERATION

    house.publish()
    await settle()
    assert len(room.unison) == WRITES_PER_ITERATION // UNISON_MOST + 2
    assert all(offsets(member) == [1, 2, 3, 4] for member in members)


async def test_a_huge_room_that_is_never_silent_gives_the_others_their_turn(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chatserver.net.fanout.WRITES_PER_ITERATION", UNISON_LEAST)
    house = House()

    def members(room: str, many: int) -> list[Connection]:
        found = [house.connection(f"{room}{i}") for i in range(many)]
        for each in found:
            admit = partial(house.fanout.admit, each, room, 0)
            house.fanout.join(room, None, 0, 1000, admit)
        house.fanout.confirm(channel(room))
        return found

    def say(room: str, offset: int) -> None:
        house.fanout.receive_live(
            channel(room), b'e1 %d - {"type":"message","offset":%d}' % (offset, offset)
        )

    empty = Reading("e1", 0, 1, 0, [])
    monkeypatch.setattr(house.log, "read", lambda room, done, **asked: done(empty))
    busy, other = members("busy", 2 * UNISON_LEAST - 1), members("other", UNISON_LEAST)
    say("busy", 1)
    say("other", 1)
    for offset in range(2, 5):
        await asyncio.sleep(0)
        say("busy", offset)

    assert all(offsets(member) == [1] for member in other)
    await settle()
    assert all(offsets(member) == [1, 2, 3, 4] for member in busy)


@pytest.mark.parametrize("place", [0, -1])
async def test_whoever_is_revoked_amid_a_huge_rooms_delivery_gets_no_more(place: int) -> None:
    house = House()
    members = await in_unison(house, WRITES_PER_ITERATION + UNISON_MOST + 10)
    house.publish()
    await asyncio.sleep(0)
    revoked = members.pop(place)
    seen_by_then = offsets(revoked)
    revoked.deafen()
    house.publish()
    await settle()

    assert offsets(revoked) == seen_by_then
    assert all(offsets(member) == [1, 2, 3, 4] for member in members)


async def test_nothing_is_delivered_while_revocations_are_not_current() -> None:
    house = House()
    connection = house.joined()
    house.is_fresh = False
    house.publish()
    house.fanout.tick()
    await settle()
    assert offsets(connection) == []

    house.is_fresh = True
    house.fanout.tick()
    house.log.answer_all()
    await settle()
    assert offsets(connection) == [1]


async def test_events_already_waiting_are_held_when_revocations_go_stale() -> None:
    house = House()
    connection = house.joined()
    house.publish()
    house.is_fresh = False
    await settle()
    assert offsets(connection) == []

    house.is_fresh = True
    house.fanout.tick()
    await settle()
    assert offsets(connection) == [1]


async def test_an_emptied_store_is_told_with_a_reset_and_the_new_events_follow() -> None:
    house = House()
    connection = house.joined()
    house.publish()
    house.log.restart_empty("e2")
    house.publish()
    house.log.answer_all()
    house.publish()
    await settle()

    assert [(frame["type"], frame["offset"]) for frame in seen(connection)] == [
        ("message", 1),
        ("reset", 0),
        ("message", 1),
        ("message", 2),
    ]


async def test_a_log_that_goes_on_under_a_new_epoch_is_told_and_nothing_else_changes() -> None:
    house = House()
    connection, expired = house.joined("c"), house.joined("x")
    house.publish()
    await settle()
    house.log.fork("e2")
    expired.expires_at = time.time() - 1
    house.publish()
    house.log.answer_all()
    await settle()

    assert [(f["type"], f.get("epoch"), f.get("offset")) for f in seen(connection)] == [
        ("message", None, 1),
        ("epoch", "e2", None),
        ("message", None, 2),
    ]
    assert offsets(expired) == [1]


async def test_whoever_is_beyond_a_fork_is_reset_to_it_and_whoever_is_not_keeps_its_place() -> None:
    house = House()
    reader, slow = house.joined("r"), house.joined("s")
    house.publish()
    await settle()
    house.fanout.hold_back(slow)
    slow.writing_paused = True
    house.publish()
    house.publish()
    await settle()
    house.log.fork("e2", lost=2)
    house.publish()
    house.log.answer_all()
    slow.writing_paused = False
    house.fanout.catch_up(slow)
    house.log.answer_all()
    await settle()

    told = [(f["type"], f.get("offset"), f.get("body")) for f in seen(reader)]
    assert told == [
        ("message", 1, 1),
        ("message", 2, 2),
        ("message", 3, 3),
        ("reset", 1, None),
        ("message", 2, 4),
    ]
    told = [(f["type"], f.get("offset"), f.get("body")) for f in seen(slow)]
    assert told == [("message", 1, 1), ("epoch", None, None), ("message", 2, 4)]


async def test_a_reader_ahead_of_its_worker_is_reset_where_the_worker_is_not() -> None:
    """Its own reading had shown it more than the worker had heard of when the store forked."""
    house = House()
    house.joined("early")
    house.log.append()
    house.log.append()
    ahead = house.joined("ahead")  # at 2, and the worker has heard of nothing
    house.log.fork("e2", lost=1)
    house.publish()
    house.log.answer_all()
    await settle()

    assert [(f["type"], f["offset"], f.get("body")) for f in seen(ahead)] == [
        ("reset", 1, None),
        ("message", 2, 3),
    ]


async def test_recent_events_of_all_rooms_together_are_bounded(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("chatserver.net.recent.TOTAL_BYTES", 900)
    house = House()
    slow = house.joined("slow")
    house.fanout.hold_back(slow)
    room = slow.memberships[ROOM].room
    for _ in range(3):
        house.publish()
    assert len(room.recent.events) == 3
    house.publish()
    house.publish()
    house.publish()
    assert room.recent.size <= 900

    house.fanout.catch_up(slow)
    while house.log.asked:
        house.log.answer_all()
    await settle()
    assert offsets(slow) == [1, 2, 3, 4, 5, 6]


async def test_an_event_is_compressed_once_for_all_who_agreed_on_the_same_window(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compressed: list[int] = []
    monkeypatch.setattr(compression, "deflate", deflate_counted(compressed))
    house = House()
    windows = [0, 12, 12, 9, 12, 0, 9]
    members = [house.joined(f"m{i}", bits) for i, bits in enumerate(windows)]
    house.publish()
    house.publish()
    await settle()

    assert sorted(compressed) == [9, 9, 12, 12]
    for member, bits in zip(members, windows, strict=True):
        assert len(writes(member)) == 1
        assert offsets(member) == [1, 2]
        assert {frame["compressed"] for frame in seen(member)} == {bits > 0}


async def test_nothing_is_compressed_where_nobody_asked_for_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    compressed: list[int] = []
    monkeypatch.setattr(compression, "deflate", deflate_counted(compressed))
    house = House()
    house.joined()
    house.publish()
    await settle()

    assert compressed == []


async def test_what_is_for_one_connection_alone_is_not_compressed() -> None:
    house = House()
    for _ in range(3):
        house.log.append()
    newcomer, sender = house.connection("new", 12), house.joined("sender", 12)
    house.join(newcomer, last=3)
    house.log.answer_all()
    house.publish()
    house.publish(origin="sender")
    await settle()

    assert offsets(newcomer) == [1, 2, 3, 4, 5]
    assert [frame["compressed"] for frame in seen(newcomer)] == [False] * 3 + [True] * 2
    assert [frame["type"] for frame in seen(sender)] == ["message", "skip"]
    assert [frame["compressed"] for frame in seen(sender)] == [False, False]


def deflate_counted(windows: list[int]) -> Callable[[bytes, int], bytes]:
    """The real thing, which notes what it is called for."""
    real = compression.deflate

    def deflate(payload: bytes, window_bits: int) -> bytes:
        windows.append(window_bits)
        return real(payload, window_bits)

    return deflate


async def test_garbage_on_the_channel_is_ignored_and_counted() -> None:
    house = House()
    connection = house.joined()
    before = measured.garbage_messages
    for payload in (b"", b"x", b"e1 one - {}", b"e1 1 - nonsense", b"\xff \xff \xff {", b"a b c d"):
        house.fanout.receive_live(channel(ROOM), payload)
    house.publish()
    await settle()

    assert measured.garbage_messages - before == 6
    assert offsets(connection) == [1]


async def test_an_empty_room_is_forgotten_after_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    house = House()
    connection = house.joined()
    house.fanout.leave_all(connection)
    house.fanout.tick()
    assert len(house.fanout) == 1

    monkeypatch.setattr("chatserver.net.fanout.LINGER_SECONDS", -1.0)
    house.fanout.tick()
    assert len(house.fanout) == 0
    assert house.subscriptions.channels == set()


@pytest.mark.parametrize("together", [0, 2, 500])
@pytest.mark.parametrize("seed", range(40))
async def test_every_member_sees_each_event_once_and_in_order(
    seed: int, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the store loses, doubles and answers late, and whoever comes, stalls and goes."""
    monkeypatch.setattr("chatserver.net.fanout.UNISON_LEAST", 1 if together else 1000)
    monkeypatch.setattr("chatserver.net.fanout.UNISON_MOST", together)
    monkeypatch.setattr("chatserver.net.fanout.WRITES_PER_ITERATION", 3)
    chance = random.Random(seed)
    house = House()
    connections = [house.connection(f"c{i}", (0, 12, 0, 9)[i]) for i in range(4)]
    in_flight: list[Event] = []
    started: set[str] = set()

    def publish() -> None:
        event = house.log.append(origin=chance.choice([None] * 8 + ["c0"]))
        if chance.random() < 0.85:
            in_flight.append(event)
        if chance.random() < 0.1:
            in_flight.append(event)

    def hear() -> None:
        if in_flight:
            house.hear(in_flight.pop(0 if chance.random() < 0.8 else -1))

    def answer() -> None:
        if house.log.asked:
            asked, done = house.log.asked.pop(chance.randrange(len(house.log.asked)))
            # A join's own reading does not fail here: the hub would have to abandon it.
            fails = chance.random() < 0.1 and "backwards" not in asked
            done(StoreUnavailable("away") if fails else house.log.take(asked))

    def join() -> None:
        connection = chance.choice(connections)
        if connection.id not in started:
            started.add(connection.id)
            house.join(connection, last=chance.choice([0, 3]))
            house.confirm()

    def stall(connection: Connection) -> None:
        connection.writing_paused = True
        house.fanout.hold_back(connection)

    def stall_at_its_own_write() -> None:
        connection = chance.choice(connections)
        transport = connection.transport
        assert isinstance(transport, Transport)

        def after_write() -> None:
            transport.after_write = lambda: None
            stall(connection)

        transport.after_write = after_write

    def drain() -> None:
        connection = chance.choice(connections)
        connection.writing_paused = False
        house.fanout.catch_up(connection)

    def expire() -> None:
        chance.choice(connections).serve_until(0.0)

    def refresh() -> None:
        connection = chance.choice(connections)
        connection.serve_until(time.time() + 900)
        house.fanout.catch_up(connection)

    def reply() -> None:
        chance.choice(connections).send(b'{"type":"ack","id":1}')

    epochs, forking = 1, chance.choice([0.0, 0.3])

    def fork() -> None:
        nonlocal epochs
        if chance.random() < forking:
            epochs += 1
            house.log.fork(f"e{epochs}", lost=chance.choice([0, 0, 1, 3]))
            in_flight.clear()

    steps = [publish, hear, answer, join, drain, drain, house.fanout.tick, reply, fork]
    steps += [stall_at_its_own_write, lambda: stall(chance.choice(connections))]
    steps += [expire, refresh, refresh]
    for _ in range(200):
        chance.choice(steps)()
        # What is live must stay so for a while to be written to in unison.
        for _ in range(chance.randrange(6)):
            chance.choice([publish, hear, answer])()
            if chance.random() < 0.5:
                await asyncio.sleep(0)

    for connection in connections:
        assert isinstance(connection.transport, Transport)
        connection.transport.after_write = lambda: None
        connection.writing_paused = False
        connection.serve_until(time.time() + 900)
        house.fanout.catch_up(connection)
    house.confirm()
    for _ in range(200):
        house.fanout.tick()
        house.log.answer_all()
        await settle()
    for connection in connections:
        if connection.id in started:
            check_view(connection, house.log)
            assert not house.disconnected


def check_view(connection: Connection, log: Log) -> None:
    """What a client makes of its frames: without holes, nothing twice, at the log's end."""
    frames = seen(connection)
    position = None
    bodies = []
    for frame in frames:
        match frame["type"]:
            case "reset":
                position = frame["offset"]
            case "ack":
                pass
            case "message" | "skip":
                assert position in (None, frame["offset"] - 1)
                position = frame["offset"]
                bodies.append(frame.get("body"))
    member = connection.memberships[ROOM]
    told = [frame["epoch"] for frame in frames if frame["type"] in ("reset", "epoch")]
    assert position in (None, log.top)
    assert (member.epoch, member.position) == (log.epoch, log.top)
    assert not told or told[-1] == log.epoch
    shown = [body for body in bodies if body is not None]
    assert len(shown) == len(set(shown))

"""Rooms' logs against a real store: what the scripts promise."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Callable
from typing import Any

import pytest

from chatserver.core.effects import Publish, Published
from chatserver.core.errors import StoreUnavailable
from chatserver.core.frames import message_parts
from chatserver.core.room import Event, Reading
from chatserver.store import log
from chatserver.store.link import Reply, Store
from chatserver.store.log import EMPTY_ROOM_SECONDS, RoomLog, channel, parse_live, room_of
from chatserver.store.topology import Argument
from tests.support.tokens import unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, end, eventually

HISTORY = 40
NAMES = [
    "general",
    "a.b-c+d@e:f_g",
    "room:with:colons:meta",
    "KEYS.1",
    "9",
    "%d%s%1",
    "a*b?c[d]",
    "x" * 128,
]


class Rooms:
    """A RoomLog whose lanes run, with futures in place of callbacks."""

    def __init__(self, url: str, *, replicas: int = 0, **options: Any) -> None:
        self.store = Store(url)
        lanes = self.store.lane(replicas=replicas), self.store.lane()
        options = {"history": HISTORY, "history_seconds": 600, "key_window": 60} | options
        self.log = RoomLog(*lanes, **options)
        self.tasks = [asyncio.create_task(lane.run()) for lane in lanes]

    async def close(self) -> None:
        await end(self.tasks)

    def submit(
        self,
        room: str,
        body: bytes = b"null",
        *,
        key: str | None = None,
        user: str = "alice",
        echo: bool = True,
        wanted: Callable[[], bool] = lambda: True,
    ) -> asyncio.Future[Published | StoreUnavailable]:
        head, tail = message_parts(room, user, body, key)  # type: ignore[arg-type]
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        event = Publish(0, room, head, tail, user, key, echo)
        self.log.publish(event, "connection-1", future.set_result, wanted)
        return future

    async def publish(self, room: str, body: bytes = b"null", **options: Any) -> Published:
        published = await self.submit(room, body, **options)
        assert isinstance(published, Published)
        return published

    async def read(self, room: str, **options: Any) -> Reading:
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.log.read(room, future.set_result, **options)
        reading = await future
        assert isinstance(reading, Reading)
        return reading

    async def available(self, room: str) -> None:
        """Wait until readings are answered."""
        reading: Reading | StoreUnavailable = StoreUnavailable("not asked yet")
        while isinstance(reading, StoreUnavailable):
            future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
            self.log.read(room, future.set_result)
            reading = await future

    async def fill(self, room: str, count: int, size: int = 1) -> None:
        body = json.dumps("x" * size).encode()
        await asyncio.gather(*[self.submit(room, body) for _ in range(count)])


@pytest.fixture
async def rooms(valkey: Valkey) -> AsyncIterator[Rooms]:
    opened = Rooms(valkey.url)
    yield opened
    await opened.close()


@pytest.fixture
async def own_rooms(own_valkey: Valkey) -> AsyncIterator[Rooms]:
    opened = Rooms(own_valkey.url)
    yield opened
    await opened.close()


def offsets(reading: Reading) -> list[int]:
    return [event.offset for event in reading.events]


# --- rooms ---------------------------------------------------------------------------------


async def test_a_page_of_rooms_looks_at_so_many_keys_and_no_more() -> None:
    asked: list[list[Argument]] = []

    async def no_rooms(command: list[Argument]) -> Reply:
        asked.append(command)
        return [b"7", [b"chat:room:{r}:log"]]

    page = await log.rooms(no_rooms, 0, 1)

    assert page == ([], "7")
    assert len(asked) == log.SCANS
    assert max(int(command[-1]) for command in asked) == log.SCAN_KEYS


# --- publish -------------------------------------------------------------------------------


async def test_offsets_are_consecutive_from_one_and_in_the_order_submitted(
    rooms: Rooms, room: str
) -> None:
    published = await asyncio.gather(*[rooms.publish(room, b"%d" % n) for n in range(1, 31)])

    reading = await rooms.read(room)

    assert [p.offset for p in published] == list(range(1, 31))
    assert [json.loads(event.payload)["body"] for event in reading.events] == list(range(1, 31))
    assert len({p.epoch for p in published}) == 1


async def test_an_event_is_a_finished_frame_with_the_body_byte_for_byte(
    rooms: Rooms, room: str
) -> None:
    body = b'{"b": 1.50,"a":"\\u00e9 \xc3\xa9", "b" :2,"big":12345678901234567890}'

    published = await rooms.publish(room, body, key='k"ey', user='al"ice\U0001f600')
    [event] = (await rooms.read(room)).events

    assert json.loads(event.payload) == {
        "type": "message",
        "room": room,
        "offset": published.offset,
        "ts": published.ts,
        "user": 'al"ice\U0001f600',
        "key": 'k"ey',
        "body": json.loads(body),
    }
    assert body in event.payload


async def test_a_repeated_key_stores_nothing_and_returns_the_first_position(
    rooms: Rooms, room: str
) -> None:
    first = await rooms.publish(room, b"1", key="k")
    await rooms.publish(room, b"2")
    again = await rooms.publish(room, b"3", key="k")

    assert not first.duplicate
    assert again == first._replace(duplicate=True)
    assert (await rooms.read(room)).top == 2


async def test_of_many_at_once_with_one_key_one_is_stored(rooms: Rooms, room: str) -> None:
    all_ = await asyncio.gather(*[rooms.publish(room, key="k") for _ in range(20)])

    assert {p.offset for p in all_} == {1}
    assert [p.duplicate for p in all_].count(False) == 1


async def test_a_key_counts_per_user_and_room(rooms: Rooms, room: str) -> None:
    """The NUL in the record's name keeps "a" + "b:c" apart from "a:b" + "c"."""
    pairs = [("a", "b:c"), ("a:b", "c"), ("a:b:c", ""), ("A", "b:c")]
    published = [await rooms.publish(room, user=user, key=key or "-") for user, key in pairs]
    elsewhere = await rooms.publish(room + "-2", user="a", key="b:c")

    assert [p.offset for p in published] == [1, 2, 3, 4]
    assert not any(p.duplicate for p in [*published, elsewhere])


async def test_the_epoch_is_minted_once(rooms: Rooms, room: str) -> None:
    joined = await rooms.read(room)
    published = await rooms.publish(room)
    later = await rooms.read(room)

    assert joined.epoch == published.epoch == later.epoch
    assert joined.epoch


async def test_rooms_have_epochs_of_their_own(rooms: Rooms, room: str) -> None:
    epochs = {(await rooms.publish(f"{room}-{n}")).epoch for n in range(10)}

    assert len(epochs) == 10


async def test_a_store_that_was_emptied_starts_a_new_epoch_in_which_old_keys_are_void(
    own_rooms: Rooms, own_valkey: Valkey, room: str
) -> None:
    before = await own_rooms.publish(room, key="k")
    own_valkey.command("FLUSHALL")
    after = await own_rooms.publish(room, key="k")

    assert after.offset == 1
    assert after.epoch != before.epoch
    assert not after.duplicate


async def test_a_key_of_another_epoch_is_void_though_its_record_is_left(
    rooms: Rooms, valkey: Valkey, room: str
) -> None:
    await rooms.publish(room)
    before = await rooms.publish(room, key="k")
    valkey.command("DEL", f"chat:room:{{{room}}}:meta", f"chat:room:{{{room}}}:log")
    after = await rooms.publish(room, key="k")

    assert after.epoch != before.epoch
    assert (after.offset, after.duplicate) == (1, False)


async def test_a_log_without_its_meta_is_not_continued(
    rooms: Rooms, valkey: Valkey, room: str
) -> None:
    """Its offsets would be handed out twice."""
    before = await rooms.publish(room)
    valkey.command("DEL", f"chat:room:{{{room}}}:meta")
    reading = await rooms.read(room)

    assert reading.epoch != before.epoch
    assert (reading.top, reading.first, reading.events) == (0, 1, [])


async def test_no_more_events_are_retained_than_asked(rooms: Rooms, room: str) -> None:
    await rooms.fill(room, HISTORY + 7)

    reading = await rooms.read(room)

    assert (reading.first, reading.top) == (8, HISTORY + 7)
    assert offsets(reading) == list(range(8, HISTORY + 8))


async def test_what_is_stored_goes_away_by_itself(rooms: Rooms, valkey: Valkey, room: str) -> None:
    await rooms.publish(room, key="k")
    left = {
        name: int(valkey.command("TTL", f"chat:room:{{{room}}}:{name}")[1:])
        for name in ("meta", "log", "key:alice\0k")
    }

    assert 570 < left["meta"] <= 600
    assert 570 < left["log"] <= 600
    assert 30 < left["key:alice\0k"] <= 60


@pytest.mark.parametrize("name", NAMES)
async def test_a_room_name_is_only_a_name(rooms: Rooms, valkey: Valkey, name: str) -> None:
    """None of it means anything to Lua, to patterns, or to a neighbour's keys."""
    name = name[:110] + unique(":")
    await rooms.publish(name, key="k")
    await rooms.publish(name, key="k")

    reading = await rooms.read(name)

    assert reading.top == 1
    assert json.loads(reading.events[0].payload)["room"] == name
    assert valkey.command("EXISTS", f"chat:room:{{{name}}}:log") == b":1"


async def test_large_offsets_stay_exact(rooms: Rooms, valkey: Valkey, room: str) -> None:
    """Lua would write 1e+15."""
    await rooms.read(room)
    valkey.command("HSET", f"chat:room:{{{room}}}:meta", "offset", str(2**52))

    published = await rooms.publish(room)
    [event] = (await rooms.read(room)).events
    after = await rooms.read(room, after=2**52)

    assert published.offset == event.offset == json.loads(event.payload)["offset"] == 2**52 + 1
    assert offsets(after) == [2**52 + 1]


async def test_a_store_that_refuses_makes_it_unavailable_and_the_next_works(
    own_rooms: Rooms, own_valkey: Valkey, room: str
) -> None:
    await own_rooms.publish(room)
    own_valkey.command("CONFIG", "SET", "maxmemory", "1")
    refused = await own_rooms.submit(room)
    own_valkey.command("CONFIG", "SET", "maxmemory", "0")
    accepted = await own_rooms.publish(room)

    assert isinstance(refused, StoreUnavailable)
    assert accepted.offset == 2


# --- live ----------------------------------------------------------------------------------


async def test_what_is_announced_is_what_is_stored(rooms: Rooms, room: str) -> None:
    heard: list[tuple[str, bytes]] = []
    confirmed: list[str] = []
    subscription = rooms.store.subscription(lambda *said: heard.append(said), confirmed.append)
    listening = asyncio.create_task(subscription.run())
    rooms.tasks.append(listening)
    subscription.subscribe(channel(room))
    await eventually(lambda: confirmed)

    await rooms.publish(room, b'"a"')
    await rooms.publish(room, b'"b"', echo=False)
    await rooms.publish(room, b'"c"', key="k")
    await rooms.publish(room, b'"c"', key="k")
    await rooms.publish(room, b'"d"')
    await eventually(lambda: len(heard) >= 4)
    stored = (await rooms.read(room)).events
    events = [parse_live(payload) for _, payload in heard]

    assert {name for name, _ in heard} == {channel(room)}
    assert events == stored
    assert [event.origin for event in events] == [None, "connection-1", None, None]


@pytest.mark.parametrize("name", NAMES)
def test_a_channel_names_its_room(name: str) -> None:
    assert room_of(channel(name)) == name


def test_an_event_with_spaces_in_it_is_parsed_whole() -> None:
    event = b'{"type":"message","body":"a b  c"}'

    assert parse_live(b"e1 12 - " + event) == Event("e1", 12, event, None)


@pytest.mark.parametrize(
    "garbage",
    [
        b"",
        b"   ",
        b"e1",
        b"e1 1 -",
        b"e1 1 - ",
        b"e1 1 - null",
        b'e1 x - {"type":1}',
        b'e1 1.5 - {"type":1}',
        b'e1  - {"type":1}',
        b'\xff\xfe 1 - {"type":1}',
        b'e1 1 \xff {"type":1}',
        b"e1 " + b"9" * 5000 + b' - {"type":1}',
        b"\x00\x01\x02",
        b'{"type":"message","offset":1}',
    ],
)
def test_anything_else_on_the_channel_is_a_value_error(garbage: bytes) -> None:
    with pytest.raises(ValueError):  # noqa: PT011 (whatever int() and decode() say)
        parse_live(garbage)


# --- read ----------------------------------------------------------------------------------


async def test_reading_a_new_room_mints_an_epoch_that_lasts_a_while(
    rooms: Rooms, valkey: Valkey, room: str
) -> None:
    first = await rooms.read(room)
    again = await rooms.read(room)
    left = int(valkey.command("TTL", f"chat:room:{{{room}}}:meta")[1:])

    assert (first.top, first.first, first.events) == (0, 1, [])
    assert first == again
    assert EMPTY_ROOM_SECONDS - 5 <= left <= EMPTY_ROOM_SECONDS


async def test_reading_renews_a_short_life_and_shortens_none(
    rooms: Rooms, valkey: Valkey, room: str
) -> None:
    meta = f"chat:room:{{{room}}}:meta"
    await rooms.read(room)
    valkey.command("EXPIRE", meta, "7")
    await rooms.read(room)
    renewed = int(valkey.command("TTL", meta)[1:])
    await rooms.publish(room)
    await rooms.read(room)
    kept = int(valkey.command("TTL", meta)[1:])

    assert renewed > EMPTY_ROOM_SECONDS - 5
    assert kept > 590


async def test_onwards_reads_what_comes_after(rooms: Rooms, room: str) -> None:
    await rooms.fill(room, 20)
    epoch = (await rooms.read(room)).epoch

    assert offsets(await rooms.read(room, after=12)) == list(range(13, 21))
    assert offsets(await rooms.read(room, epoch=epoch, after=0)) == list(range(1, 21))
    assert offsets(await rooms.read(room, after=5, onwards=3)) == [6, 7, 8]
    assert offsets(await rooms.read(room, after=20)) == []


async def test_backwards_reads_the_latest_in_ascending_order(rooms: Rooms, room: str) -> None:
    await rooms.fill(room, 20)

    assert offsets(await rooms.read(room, backwards=4)) == [17, 18, 19, 20]
    assert offsets(await rooms.read(room, backwards=0)) == []
    assert offsets(await rooms.read(room, before=10, backwards=3)) == [7, 8, 9]
    assert offsets(await rooms.read(room, before=3, backwards=30)) == [1, 2]
    assert offsets(await rooms.read(room, before=1)) == []
    assert offsets(await rooms.read(room, before=10**15, backwards=2)) == [19, 20]


async def test_before_the_first_place_there_is_nothing(rooms: Rooms, room: str) -> None:
    await rooms.fill(room, 3)

    assert offsets(await rooms.read(room, before=0)) == []


@pytest.mark.parametrize("count", [15, 16, 17, 33, 40])
async def test_the_scripts_steps_of_sixteen_do_not_show(
    rooms: Rooms, room: str, count: int
) -> None:
    await rooms.fill(room, count)
    everything = list(range(1, count + 1))

    assert offsets(await rooms.read(room, after=0)) == everything
    assert offsets(await rooms.read(room)) == everything
    assert offsets(await rooms.read(room, onwards=count - 1, after=0)) == everything[:-1]
    assert offsets(await rooms.read(room, backwards=count - 1)) == everything[1:]


async def test_what_cannot_be_continued_is_answered_with_the_latest(
    rooms: Rooms, room: str
) -> None:
    await rooms.fill(room, HISTORY + 10)
    latest = [HISTORY + 9, HISTORY + 10]

    other_epoch = await rooms.read(room, epoch="other", after=30, backwards=2)
    trimmed = await rooms.read(room, after=9, backwards=2)
    beyond = await rooms.read(room, after=HISTORY + 11, backwards=2)
    just_reaches = await rooms.read(room, after=10, onwards=2)

    assert offsets(other_epoch) == offsets(trimmed) == offsets(beyond) == latest
    assert offsets(just_reaches) == [11, 12]


async def test_nearest_reads_on_where_a_trimmed_log_begins(rooms: Rooms, room: str) -> None:
    await rooms.fill(room, HISTORY + 10)

    assert offsets(await rooms.read(room, after=2, onwards=2, nearest=True)) == [11, 12]
    beyond = await rooms.read(room, after=HISTORY + 99, nearest=True)
    assert offsets(beyond) == []


async def test_a_read_stops_at_its_bytes_but_one_event_always_fits(rooms: Rooms, room: str) -> None:
    await rooms.fill(room, 10, size=1000)

    assert offsets(await rooms.read(room, after=0, size=3500)) == [1, 2, 3]
    assert offsets(await rooms.read(room, size=3500)) == [8, 9, 10]
    assert offsets(await rooms.read(room, after=4, size=1)) == [5]
    assert offsets(await rooms.read(room, size=1)) == [10]


async def test_a_replay_begins_with_the_reading_that_opens_it(rooms: Rooms, room: str) -> None:
    await rooms.fill(room, HISTORY + 10, size=1000)

    assert offsets(await rooms.read(room, backwards=5, size=2500, replay=9)) == [46, 47]
    assert offsets(await rooms.read(room, backwards=99, size=2500, replay=9)) == [11, 12]
    assert offsets(await rooms.read(room, backwards=0, replay=9)) == []
    just_reaches = await rooms.read(room, after=41, backwards=3, size=2500, replay=9)
    too_far = await rooms.read(room, after=40, backwards=30, size=2500, replay=9)
    beyond = await rooms.read(room, after=99, backwards=3, replay=9)
    assert offsets(just_reaches) == [42, 43]
    assert offsets(too_far) == [21, 22]
    assert offsets(beyond) == [48, 49, 50]


# --- a store whose history forks -----------------------------------------------------------


async def back(rooms: Rooms) -> None:
    """Wait until both lanes work again: each notices with its first command."""
    async with asyncio.timeout(PATIENCE):
        while isinstance(await rooms.submit("elsewhere"), StoreUnavailable):
            await asyncio.sleep(0.01)
        await rooms.available("elsewhere")


async def test_after_a_plain_restart_the_log_goes_on_under_a_new_epoch(
    own_rooms: Rooms, own_valkey: Valkey, room: str
) -> None:
    await own_rooms.fill(room, 5)
    before = await own_rooms.read(room)
    own_valkey.restart()
    await back(own_rooms)

    after = await own_rooms.read(room, epoch=before.epoch, after=3)
    assert after.epoch != before.epoch
    assert (after.top, after.shared, offsets(after)) == (5, 5, [4, 5])
    assert after.continues(5)
    sent = await own_rooms.publish(room)
    assert (sent.epoch, sent.offset) == (after.epoch, 6)
    later = await own_rooms.read(room, epoch=before.epoch, after=5)
    assert (later.shared, offsets(later)) == (5, [6])


async def test_keys_are_remembered_over_a_restart(
    own_rooms: Rooms, own_valkey: Valkey, room: str
) -> None:
    await own_rooms.fill(room, 2)
    first = await own_rooms.publish(room, key="k")
    own_valkey.restart()
    await back(own_rooms)

    again = await own_rooms.publish(room, key="k")
    assert again == first._replace(epoch=again.epoch, duplicate=True)
    assert again.epoch != first.epoch


async def test_positions_beyond_the_fork_are_told_from_those_before_it(
    own_rooms: Rooms, own_valkey: Valkey, room: str
) -> None:
    await own_rooms.fill(room, 5)
    before = await own_rooms.read(room)
    with own_valkey.older_copy() as put_back:
        await own_rooms.fill(room, 3)
        put_back()
    await back(own_rooms)
    await own_rooms.publish(room)

    after = await own_rooms.read(room, epoch=before.epoch, after=8)
    assert (after.top, after.shared) == (6, 5)
    assert not after.continues(8)
    assert after.continues(5)
    nearest = await own_rooms.read(room, epoch=before.epoch, after=8, nearest=True)
    assert offsets(nearest) == [6]


async def test_what_was_sent_beyond_the_fork_may_be_sent_again_with_its_key(
    own_rooms: Rooms, own_valkey: Valkey, room: str
) -> None:
    await own_rooms.publish(room)
    with own_valkey.older_copy() as put_back:
        await own_rooms.publish(room, key="k")
        put_back()
    await back(own_rooms)

    assert not (await own_rooms.publish(room, key="k")).duplicate


@pytest.mark.parametrize("word", [b"XADD", b"EXEC"])
async def test_a_file_that_was_cut_off_amid_a_publish_leaves_neither_hole_nor_ghost(
    own_rooms: Rooms, own_valkey: Valkey, room: str, word: bytes
) -> None:
    """Redis keeps the half of the transaction that it has, and carries it out when the file is
    loaded once more. "EXEC" leaves a whole publish there, "XADD" the counter alone."""
    silent = room + "-silent"
    for name in (silent, room):
        await own_rooms.fill(name, 3)
    before = await own_rooms.read(room)
    own_valkey.cut_off(word)
    await back(own_rooms)
    if word == b"EXEC":
        instead = [(await own_rooms.publish(room, b'"instead"')).offset for _ in range(2)]
        assert instead == [3, 4]
    own_valkey.restart()
    await back(own_rooms)

    sent = await own_rooms.publish(room)
    after = await own_rooms.read(room, epoch=before.epoch, after=2)
    assert not after.continues(3)
    assert offsets(after) == list(range(3, sent.offset + 1))
    if word == b"EXEC":
        assert [b"instead" in event.payload for event in after.events] == [True, True, False]
    assert offsets(await own_rooms.read(silent)) == [1, 2, 3]


async def test_so_many_earlier_epochs_are_remembered_and_no_more(
    own_rooms: Rooms, own_valkey: Valkey, room: str
) -> None:
    epochs = []
    for _ in range(34):
        epochs.append((await own_rooms.publish(room)).epoch)
        own_valkey.command("DEBUG", "CHANGE-REPL-ID")
    shared = [(await own_rooms.read(room, epoch=epoch, after=0)).shared for epoch in epochs]

    assert len(set(epochs)) == 34
    assert shared == [-1, -1, *range(3, 35)]


# --- age -----------------------------------------------------------------------------------


async def test_events_are_retained_by_age_one_by_one(own_valkey: Valkey, room: str) -> None:
    rooms = Rooms(own_valkey.url, history_seconds=1)
    try:
        for _ in range(20):
            await rooms.publish(room)
        reading = await rooms.read(room)
        async with asyncio.timeout(PATIENCE):
            # What comes later keeps the log, not what is old in it.
            while not 1 < reading.first <= reading.top:
                await rooms.publish(room)
                reading = await rooms.read(room)

        assert (
            offsets(reading) == list(range(reading.first, reading.top + 1))[-len(reading.events) :]
        )
        assert not reading.continues(0)
        async with asyncio.timeout(PATIENCE):
            while reading.events:
                await asyncio.sleep(0.01)
                reading = await rooms.read(room)
        # The place is kept for whoever is there, and keys as long as they must.
        assert (reading.first, reading.shared) == (reading.top + 1, reading.top)
        assert reading.continues(reading.top)
    finally:
        await rooms.close()


# --- reading together ----------------------------------------------------------------------


async def test_readings_of_the_same_that_wait_together_are_one(
    rooms: Rooms, valkey: Valkey, room: str
) -> None:
    await rooms.fill(room, 3)

    def calls() -> int:
        found = re.search(rb"cmdstat_evalsha:calls=(\d+)", valkey.command("INFO", "commandstats"))
        assert found
        return int(found[1])

    before = calls()
    alike = [rooms.read(room, after=1) for _ in range(1000)]
    other = rooms.read(room, after=2)
    readings = await asyncio.gather(*alike, other)

    assert {tuple(offsets(reading)) for reading in readings[:-1]} == {(2, 3)}
    assert offsets(readings[-1]) == [3]
    assert calls() - before < 20


async def test_a_reading_asked_for_after_an_answer_has_all_that_came_before_it(
    rooms: Rooms, room: str
) -> None:
    for place in range(1, 50):
        early = asyncio.ensure_future(rooms.read(room, after=0))
        sent = await rooms.publish(room)
        late = await rooms.read(room, after=0)
        await early
        assert sent.offset == place == late.top

"""Rooms' logs: publish, read, and the names of their keys.

All keys of a room share the hash tag ``{room}``: one slot on a cluster, one script.
"""

from __future__ import annotations

import asyncio
import math
import random
import re
from collections.abc import Callable
from typing import NamedTuple

from chatserver.core.effects import Publish, Published
from chatserver.core.errors import StoreUnavailable
from chatserver.core.room import Event, Reading
from chatserver.settings import Settings
from chatserver.store.link import PUBLISH, READ, Call, Lane, Reply, Store, understood
from chatserver.store.topology import Argument

EMPTY_ROOM_SECONDS = 300
"""A room that was joined and never written to is remembered so long after its last member."""

READ_EVENTS = 256
READ_BYTES = 65_536
"""One read's bounds; whoever wants more reads on."""
ANSWERS = 100
"""Told of a reading they share in one iteration of the loop."""

Answer = Callable[[Reading | StoreUnavailable], None]

SCANS = 50
SCAN_KEYS = 1000
"""A page of rooms takes so many scans of so many keys at most. Most keys are no room's."""

_CHANNEL = "chat:room:{%s}:live"
_EVENT = b'{"type":'
_PREFIX, _SUFFIX = _CHANNEL.split("%s")


def channel(room: str) -> str:
    return _CHANNEL % room


def room_of(channel: str) -> str:
    return channel[len(_PREFIX) : -len(_SUFFIX)]


def parse_live(payload: bytes) -> Event:
    """A message of a room's channel. Raises ValueError on anything else."""
    epoch, offset, origin, event = payload.split(b" ", 3)
    if not event.startswith(_EVENT):
        raise ValueError("not an event")
    return Event(
        epoch.decode(), int(offset), event, None if origin == b"-" else origin.decode("ascii")
    )


class RoomLog:
    """Publishes on one lane and reads on another, so that a long read delays no send."""

    def __init__(
        self,
        publishes: Lane,
        reads: Lane,
        *,
        history: int,
        history_seconds: int,
        key_window: float,
        announce: str = "PUBLISH",
    ) -> None:
        self.lanes = publishes, reads
        """Each to be run by the owner."""
        self._publishes = publishes
        self._reads = reads
        self._history_seconds = history_seconds
        # A key is void when its log is gone, so the room is remembered at least as long.
        remembered = max(history_seconds, math.ceil(key_window), EMPTY_ROOM_SECONDS)
        self._retention: tuple[Argument, ...] = (history, history_seconds, remembered)
        self._announce = announce
        self._key_milliseconds = max(1, int(key_window * 1000))
        self._queued: dict[tuple[Argument, ...], list[Answer]] = {}
        """Readings not yet asked for, by what they ask: one serves all who want the same."""

    @classmethod
    def of(cls, settings: Settings, store: Store) -> RoomLog:
        """As it is configured, on lanes of its own."""
        replicas = settings.replicas if settings.durability == "replica" else 0
        return cls(
            store.lane(replicas=replicas, name="publish"),
            store.lane(batch=64, name="read"),
            history=settings.history,
            history_seconds=settings.history_seconds,
            key_window=settings.key_window,
            announce=store.announce,
        )

    def publish(
        self,
        event: Publish,
        connection: str,
        done: Callable[[Published | StoreUnavailable], None],
        wanted: Callable[[], bool],
    ) -> None:
        """Append and announce, atomically. What fails may have happened: repeat with its key."""
        room = event.room
        keys: list[Argument] = [f"chat:room:{{{room}}}:meta", f"chat:room:{{{room}}}:log"]
        if event.key is not None:
            # A user id holds no control character, so the NUL keeps "a" + "b:c" from "a:b" + "c".
            keys.append(f"chat:room:{{{room}}}:key:{event.user}\0{event.key}")
        arguments: list[Argument] = [
            event.head,
            event.tail,
            _new_epoch(),
            *self._retention,
            self._announce,
            channel(room),
            "-" if event.echo else connection,
            self._key_milliseconds,
        ]
        command = PUBLISH.command(keys, arguments)
        self._publishes.submit(command, understood(_published, done), wanted)

    def read(
        self,
        room: str,
        done: Answer,
        *,
        epoch: str = "",
        after: int | None = None,
        before: int | None = None,
        onwards: int = READ_EVENTS,
        backwards: int = READ_EVENTS,
        size: int = READ_BYTES,
        nearest: bool = False,
        replay: int | None = None,
    ) -> None:
        """Read on after ``after`` if its ``epoch`` and the log allow it, else the latest events.

        ``nearest``: where the log has no such place but the epoch is known, read on from the
        nearest: its oldest event, or the last that the epoch shares with it. ``replay``: this
        opens one, of at most so many events from ``after``. Where there are more it is of the
        latest, and begins with this reading: what does not fit is the last of them.
        """
        asked: tuple[Argument, ...] = (
            EMPTY_ROOM_SECONDS,
            self._history_seconds,
            epoch,
            "" if after is None else after,
            "" if before is None else before,
            onwards,
            backwards,
            size,
            int(nearest),
            "" if replay is None else replay,
        )
        # Not one that is under way: what has happened since must be in it.
        waiting = self._queued.get((room, *asked))
        if waiting is not None:
            waiting.append(done)
            return
        waiting = self._queued[room, *asked] = [done]

        def leave() -> bool:
            self._queued.pop((room, *asked), None)
            return True

        def answer(reading: Reading | StoreUnavailable) -> None:
            if self._queued.get((room, *asked)) is waiting:
                leave()  # it never went out
            _answer(waiting, reading)

        keys = [f"chat:room:{{{room}}}:meta", f"chat:room:{{{room}}}:log"]
        self._reads.submit(
            READ.command(keys, [_new_epoch(), *asked]),
            understood(_reading, answer),
            wanted=leave,
            weight=_weight(after is not None, onwards, backwards, size),
        )


def _answer(waiting: list[Answer], reading: Reading | StoreUnavailable) -> None:
    """Tell those who wait for the reading, so many at a time that the loop stays responsive."""
    for done in waiting[:ANSWERS]:
        done(reading)
    if len(waiting) > ANSWERS:
        asyncio.get_running_loop().call_soon(_answer, waiting[ANSWERS:], reading)


def _weight(onwards_too: bool, onwards: int, backwards: int, size: int) -> int:
    """What a reading may cost a pipeline, in 64ths of 1 MiB."""
    events = max(backwards, onwards if onwards_too else 0)
    return 1 if events == 0 else math.ceil(size / 16_384)


class RoomState(NamedTuple):
    room: str
    epoch: str
    offset: int


async def rooms(call: Call, after: int, limit: int) -> tuple[list[RoomState], str | None]:
    """Some rooms, about ``limit`` or fewer, and where to go on, None at the end.

    In no order. A room that is there all the time is found once at least.
    """
    found: list[str] = []
    count = limit
    for _ in range(SCANS):
        match = "chat:room:{*}:meta"
        cursor, keys = await call(["SCAN", after, "MATCH", match, "COUNT", count])
        after, count = int(cursor), min(2 * count, SCAN_KEYS)
        # What a client chose stands in other keys' names, which may look like this one.
        names = [_META.fullmatch(key.decode(errors="replace")) for key in keys]
        found += [name[1] for name in names if name]
        if after == 0 or len(found) >= limit:
            break
    states = await asyncio.gather(  # one pipeline
        *(call(["HMGET", f"chat:room:{{{room}}}:meta", "epoch", "offset"]) for room in found)
    )
    return [
        RoomState(room, epoch.decode(), int(offset or 0))
        for room, (epoch, offset) in zip(found, states, strict=True)
        if epoch is not None
    ], (str(after) if after else None)


_META = re.compile(r"chat:room:\{([A-Za-z0-9._:@+-]+)\}:meta")


def _published(reply: Reply) -> Published:
    epoch, offset, ts, duplicate = reply
    return Published(epoch.decode(), int(offset), int(ts), duplicate == 1)


def _reading(reply: Reply) -> Reading:
    name, *numbers = reply[:4]
    epoch = name.decode()
    top, first, shared = map(int, numbers)
    offsets, payloads, origins = reply[4::3], reply[5::3], reply[6::3]
    if offsets and offsets != list(range(offsets[0], offsets[0] + len(payloads))):
        raise ValueError("a log has no holes")
    if not all(payload.startswith(_EVENT) for payload in payloads):
        raise ValueError("not an event")
    events = [
        Event(epoch, offset, payload, origin.decode("ascii") if origin else None)
        for offset, payload, origin in zip(offsets, payloads, origins, strict=True)
    ]
    return Reading(epoch, top, first, shared, events)


def _new_epoch() -> str:
    """Used only where one begins; 40 random bits tell a room's epochs apart."""
    return f"{random.getrandbits(40):010x}"

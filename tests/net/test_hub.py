"""The hub in a process that was stopped, and what it had under way then."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable
from typing import Any

import pytest

from chatserver.core.claims import Identity
from chatserver.core.effects import Publish, Published
from chatserver.core.errors import StoreUnavailable
from chatserver.core.flow import Limits
from chatserver.core.protocol import ChatProtocol
from chatserver.core.room import Event, Reading
from chatserver.net.connection import Connection, Phase
from chatserver.net.hub import Hub
from chatserver.store.log import channel
from tests.net.test_fanout import Owner, Subscriptions, Transport, seen, settle

ROOM = "general"


class Mirror:
    def __init__(self) -> None:
        self.current = True

    def fresh(self) -> bool:
        return self.current


class Log:
    """Commands wait until the test has them go out, or answers them."""

    def __init__(self) -> None:
        self.queued: list[tuple[Callable[[Any], None], Callable[[], bool]]] = []
        self.readings: list[Callable[[Reading | StoreUnavailable], None]] = []
        self.stored = 0

    def publish(
        self,
        event: Publish,
        connection: str,
        done: Callable[[Published | StoreUnavailable], None],
        wanted: Callable[[], bool],
    ) -> None:
        self.queued.append((done, wanted))

    def read(
        self, room: str, done: Callable[[Reading | StoreUnavailable], None], **asked: Any
    ) -> None:
        self.readings.append(done)

    def go_out(self) -> None:
        for done, wanted in self.queued:
            if wanted():
                self.stored += 1
                done(Published("e1", self.stored, 0, duplicate=False))
        self.queued.clear()

    def answer(self) -> None:
        secret = b'{"type":"message","room":"general","offset":1,"body":"secret"}'
        for done in self.readings:
            done(Reading("e1", 1, 1, 1, [Event("e1", 1, secret)]))
        self.readings.clear()


class House:
    """A hub with one connection, its surroundings played."""

    def __init__(self) -> None:
        self.log, self.mirror = Log(), Mirror()
        self.hub = Hub(
            keyring=None,  # type: ignore[arg-type]
            room_log=self.log,  # type: ignore[arg-type]
            limits=Limits(),
            ping_timeout=20.0,
            slow_seconds=30.0,
            registry=None,  # type: ignore[arg-type]
            worker="w",
        )
        self.hub.attach(self.mirror)  # type: ignore[arg-type]
        self.hub.fanout.attach(Subscriptions())  # type: ignore[arg-type]
        now = int(time.time())
        self.client = Connection(Owner(self.hub.fanout), 65536)  # type: ignore[arg-type]
        self.client.transport = Transport()
        self.client.phase = Phase.OPEN
        self.client.id = "c"
        self.hub.add(self.client, Identity("alice", "s", "t", ("member",), None, now, now + 900))

    def say(self, **command: Any) -> None:
        self.hub.receive(self.client, json.dumps(command | {"id": 1, "room": ROOM}).encode())

    async def heard(self) -> list[tuple[str, object]]:
        await settle()
        return [(frame["type"], frame.get("code")) for frame in seen(self.client)]


async def test_what_was_queued_goes_out() -> None:
    house = House()
    house.say(type="send", body=1)
    house.log.go_out()

    assert await house.heard() == [("ack", None)]


async def test_what_is_still_queued_in_a_process_that_has_heard_nothing_is_unavailable() -> None:
    """Its sender may have been revoked meanwhile, and the caller told that this is done."""
    house = House()
    house.say(type="send", body=1)
    house.mirror.current = False
    house.log.go_out()

    assert house.log.stored == 0
    assert await house.heard() == [("error", "unavailable")]


@pytest.mark.parametrize("command", ["history", "join"])
async def test_what_was_read_is_not_shown_by_a_process_that_has_heard_nothing(command: str) -> None:
    house = House()
    house.say(type=command)
    house.hub.fanout.confirm(channel(ROOM))
    house.mirror.current = False
    house.log.answer()

    assert await house.heard() == [("error", "unavailable")]


async def test_whoever_leaves_the_only_room_that_is_behind_lags_no_longer() -> None:
    """Nothing is held back from it any more: counted on, that would end it as a slow consumer."""
    house = House()
    house.say(type="join")
    house.hub.fanout.confirm(channel(ROOM))
    house.log.answer()
    house.client.writing_paused = True
    house.hub.stalled(house.client)
    missed = b'{"type":"message","room":"general","offset":2,"body":"missed"}'
    house.hub.fanout.receive_live(channel(ROOM), b"e1 2 - " + missed)
    await settle()
    house.client.memberships[ROOM].room.recent.clear()
    house.client.writing_paused = False
    house.hub.drained(house.client)
    assert house.client.lagging_since is not None

    house.say(type="leave")

    assert house.client.lagging_since is None


async def test_a_bug_met_by_one_connection_does_not_stop_the_timer(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The pings and the expiry of all the others hang on it."""
    house = House()
    failed: list[Connection] = []
    monkeypatch.setattr(house.hub, "_fail", failed.append)
    monkeypatch.setattr(ChatProtocol, "handle_timer", lambda chat, now: 1 // 0)

    house.client.due_at = 0.0
    house.hub.wheel.sweep(asyncio.get_running_loop().time() + 3600)

    assert failed == [house.client]

"""CHATSERVER_DURABILITY: what an ack of a publish promises, with a real replica."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from pydantic import SecretStr

from chatserver.core.effects import Published
from chatserver.core.errors import StoreUnavailable
from chatserver.metrics import OTHER
from chatserver.settings import Settings
from chatserver.store import link
from chatserver.store.link import Lane, Store
from chatserver.store.log import RoomLog
from tests.store.test_log import HISTORY, Rooms
from tests.support.failover import free_ports
from tests.support.tokens import unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE

SOON = 100
"""Milliseconds for a replica that confirms nothing."""


class Pair(NamedTuple):
    primary: Valkey
    replica: Valkey
    port: str
    """The primary's."""


@pytest.fixture
def pair(_short_directory: Path) -> Iterator[Pair]:
    directory = _short_directory / unique("p")
    directory.mkdir()
    stores = []
    first, second = map(str, free_ports(2))
    for name, options in (
        ("p", {"port": first, "repl-diskless-sync-delay": "0"}),
        ("r", {"port": second, "replicaof": f"127.0.0.1 {first}"}),
    ):
        (directory / name).mkdir()
        stores.append(Valkey(directory / name, **options))
    try:
        for store in stores:
            store.start()
        primary, replica = stores
        yield Pair(primary, replica, first)
    finally:
        for store in stores:
            store.stop()


@pytest.fixture
async def rooms(pair: Pair) -> AsyncIterator[Rooms]:
    opened = Rooms(pair.primary.url, replicas=1)
    async with asyncio.timeout(PATIENCE):  # until the replica has attached
        while isinstance(await opened.submit("elsewhere"), StoreUnavailable):
            await asyncio.sleep(0.01)
    yield opened
    await opened.close()


async def test_what_is_acked_is_on_the_replica(rooms: Rooms, pair: Pair, room: str) -> None:
    for place in range(1, HISTORY):
        published = await rooms.publish(room)
        length = pair.replica.command("XLEN", f"chat:room:{{{room}}}:log")
        assert (published.offset, length) == (place, b":%d" % place)


async def test_what_no_replica_confirms_is_unavailable_though_it_may_be_stored(
    rooms: Rooms, pair: Pair, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = await rooms.publish(room)
    pair.replica.freeze()
    monkeypatch.setattr(link, "REPLICA_MILLISECONDS", SOON)
    outcome = await rooms.submit(room, key="k")
    assert isinstance(outcome, StoreUnavailable)
    # Nor is it acked as a duplicate before a replica has it.
    again = await rooms.submit(room, key="k")
    assert isinstance(again, StoreUnavailable)
    pair.replica.thaw()

    outcomes: list[Published] = []
    while not outcomes:
        outcome = await rooms.submit(room, key="k")
        outcomes += [outcome] if isinstance(outcome, Published) else []
    assert (outcomes[0].offset, outcomes[0].duplicate) == (first.offset + 1, True)
    assert pair.replica.command("XLEN", f"chat:room:{{{room}}}:log") == b":2"


async def test_a_repeat_on_another_connection_waits_for_the_replica_too(
    rooms: Rooms, pair: Pair, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A WAIT behind nothing written is content at once, and the original may be lost yet."""
    await rooms.publish(room)
    pair.replica.freeze()
    monkeypatch.setattr(link, "REPLICA_MILLISECONDS", SOON)
    assert isinstance(await rooms.submit(room, key="k"), StoreUnavailable)
    other = Rooms(pair.primary.url, replicas=1)
    try:
        assert isinstance(await other.submit(room, key="k"), StoreUnavailable)
    finally:
        await other.close()
        pair.replica.thaw()


async def test_where_two_may_be_promoted_both_are_waited_for(
    rooms: Rooms, pair: Pair, room: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What one has that was not promoted is gone with its ack."""
    directory = pair.replica.directory.parent / "o"
    directory.mkdir()
    (port,) = map(str, free_ports(1))
    other = Valkey(directory, port=port, replicaof=f"127.0.0.1 {pair.port}")
    both = Rooms(pair.primary.url, replicas=2)
    other.start()
    try:
        async with asyncio.timeout(PATIENCE):  # until it has attached
            while isinstance(await both.submit("elsewhere"), StoreUnavailable):
                await asyncio.sleep(0.01)
        pair.replica.command("REPLICAOF", "NO", "ONE")
        with monkeypatch.context() as brief:
            brief.setattr(link, "REPLICA_MILLISECONDS", SOON)
            outcome = await both.submit(room)
        of_one = await rooms.submit(room)
    finally:
        await both.close()
        other.stop()

    assert isinstance(outcome, StoreUnavailable)
    assert isinstance(of_one, Published)


@pytest.mark.parametrize(
    ("configured", "waited_for"),
    [
        ({}, 0),
        ({"replicas": 2}, 0),
        ({"durability": "replica"}, 1),
        ({"durability": "replica", "replicas": 2}, 2),
    ],
)
async def test_as_many_are_waited_for_as_are_configured(
    configured: dict[str, Any], waited_for: int
) -> None:
    asked: list[int] = []

    class Lanes(Store):
        def lane(self, batch: int = 256, replicas: int = 0, name: str = OTHER) -> Lane:
            asked.append(replicas)
            return super().lane(batch, replicas, name)

    url, secret = "redis://store", SecretStr(secrets.token_urlsafe(40))
    settings = Settings(secret=secret, redis_url=SecretStr(url), **configured)
    RoomLog.of(settings, Lanes(url))

    assert asked == [waited_for, 0]


async def test_primary_promises_no_replica(pair: Pair, room: str) -> None:
    rooms = Rooms(pair.primary.url)
    pair.replica.freeze()
    try:
        assert (await rooms.publish(room)).offset == 1
    finally:
        pair.replica.thaw()
        await rooms.close()

"""CHATSERVER_DURABILITY: what an ack of a publish promises, with a real replica."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from chatserver.core.effects import Published
from chatserver.core.errors import StoreUnavailable
from tests.store.test_log import HISTORY, Rooms
from tests.support.failover import free_ports
from tests.support.tokens import unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE


class Pair(NamedTuple):
    primary: Valkey
    replica: Valkey


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
        yield Pair(*stores)
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
    rooms: Rooms, pair: Pair, room: str
) -> None:
    first = await rooms.publish(room)
    pair.replica.freeze()
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
    rooms: Rooms, pair: Pair, room: str
) -> None:
    """A WAIT behind nothing written is content at once, and the original may be lost yet."""
    await rooms.publish(room)
    pair.replica.freeze()
    assert isinstance(await rooms.submit(room, key="k"), StoreUnavailable)
    other = Rooms(pair.primary.url, replicas=1)
    try:
        assert isinstance(await other.submit(room, key="k"), StoreUnavailable)
    finally:
        await other.close()
        pair.replica.thaw()


async def test_primary_promises_no_replica(pair: Pair, room: str) -> None:
    rooms = Rooms(pair.primary.url)
    pair.replica.freeze()
    try:
        assert (await rooms.publish(room)).offset == 1
    finally:
        pair.replica.thaw()
        await rooms.close()

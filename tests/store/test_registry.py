"""The registry of connections against a real store."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import pytest

from chatserver.core.errors import StoreUnavailable
from chatserver.store import keys, registry
from chatserver.store.link import Store
from chatserver.store.registry import Entry, Full, Registry, connections
from tests.support.mirrors import Street
from tests.support.tokens import unique
from tests.support.valkey import Valkey
from tests.support.worker import end, eventually


class Desk:
    """A worker's registry that runs, and the lease by which its entries count."""

    def __init__(self, url: str, most: int = 3) -> None:
        self.url = url
        self.name = unique("w")
        self.lane = Store(url).lane()
        self.registry = Registry(self.lane, self.name, most)
        self.tasks = [
            asyncio.create_task(self.lane.run()),
            asyncio.create_task(self.registry.run()),
        ]

    def entry(self, user: str, connection: str = "", session: str = "s 1", **other: int) -> Entry:
        return Entry(
            user=user,
            session=session,
            worker=self.name,
            connection=connection or unique("c"),
            since=other.get("since", 1_700_000_000_000),
            address="192.0.2.1",
        )

    async def register(
        self, entry: Entry, *, instead_of: Entry | None = None
    ) -> Full | StoreUnavailable | None:
        future: asyncio.Future[Full | StoreUnavailable | None]
        future = asyncio.get_running_loop().create_future()
        self.registry.register(entry, future.set_result, instead_of=instead_of)
        return await future

    async def renew(self, entry: Entry) -> Full | StoreUnavailable | None:
        future: asyncio.Future[Full | StoreUnavailable | None]
        future = asyncio.get_running_loop().create_future()
        self.registry.renew(entry, future.set_result)
        return await future

    async def lease(self, *, ago: int = -60_000) -> None:
        """As the mirror does with each look, so many milliseconds ago; or to come, for one that
        lives throughout a test."""
        seconds, microseconds = await self.lane.call(["TIME"])
        renewed_at = int(seconds) * 1000 + int(microseconds) // 1000 - ago
        await self.lane.call(["HSET", keys.WORKERS, self.name, f"{renewed_at} 0-0 {{}}"])

    async def listed(self, user: str) -> list[Entry]:
        return await connections(self.lane.call, user)

    async def fields(self, user: str) -> set[str]:
        """Of everyone's, living or not."""
        names = await self.lane.call(["HKEYS", keys.connections(user)])
        return {name.decode() for name in names}


class Desks:
    def __init__(self, valkey: Valkey) -> None:
        self.valkey = valkey
        self.opened: list[Desk] = []

    async def open(self, most: int = 3) -> Desk:
        desk = Desk(self.valkey.url, most)
        self.opened.append(desk)
        await desk.lease()
        return desk

    async def close(self) -> None:
        for desk in self.opened:
            await end(desk.tasks)


@pytest.fixture
async def desks(own_valkey: Valkey) -> AsyncIterator[Desks]:
    opened = Desks(own_valkey)
    yield opened
    await opened.close()


async def test_as_many_as_a_user_may_have_are_registered_and_no_more(
    desks: Desks, user: str
) -> None:
    here, there = await desks.open(), await desks.open()
    entries = [here.entry(user), there.entry(user, session="a"), here.entry(user, session="b c")]
    done = [
        await desk.register(entry) for desk, entry in zip((here, there, here), entries, strict=True)
    ]
    full = await there.register(there.entry(user))
    other = await there.register(there.entry(user + "x"))

    assert done == [None, None, None]
    assert isinstance(full, Full)
    assert set(full.entries) == set(entries)
    assert other is None
    assert set(await here.listed(user)) == set(entries)


async def test_many_at_once_never_exceed_the_cap(desks: Desks, user: str) -> None:
    here, there = await desks.open(), await desks.open()
    outcomes = await asyncio.gather(
        *(desk.register(desk.entry(user)) for _ in range(25) for desk in (here, there))
    )

    assert outcomes.count(None) == 3
    assert len(await here.listed(user)) == 3


async def test_an_unregistered_connection_makes_room(desks: Desks, user: str) -> None:
    desk = await desks.open(most=1)
    first, second = desk.entry(user), desk.entry(user)
    await desk.register(first)
    refused = await desk.register(second)
    desk.registry.unregister(first)

    assert refused == Full([first])
    assert await desk.register(second) is None
    assert await desk.listed(user) == [second]


async def test_of_many_who_want_one_place_one_gets_it(desks: Desks, user: str) -> None:
    here, there = await desks.open(most=1), await desks.open(most=1)
    place = here.entry(user)
    await here.register(place)
    newcomers = [(desk, desk.entry(user)) for _ in range(10) for desk in (here, there)]
    outcomes = await asyncio.gather(
        *(desk.register(entry, instead_of=place) for desk, entry in newcomers)
    )

    [(_, winner)] = [
        newcomer for newcomer, outcome in zip(newcomers, outcomes, strict=True) if outcome is None
    ]
    assert [outcome for outcome in outcomes if outcome] == [Full([winner])] * 19
    assert await here.listed(user) == [winner]


async def test_who_wants_a_place_that_is_gone_takes_any_that_is_free(
    desks: Desks, user: str
) -> None:
    desk = await desks.open(most=1)
    newcomer = desk.entry(user)

    assert await desk.register(newcomer, instead_of=desk.entry(user)) is None
    assert await desk.listed(user) == [newcomer]


async def test_the_same_connection_may_be_unregistered_twice(desks: Desks, user: str) -> None:
    desk = await desks.open()
    entry = desk.entry(user)
    await desk.register(entry)
    desk.registry.unregister(entry)
    desk.registry.unregister(entry)

    assert await desk.listed(user) == []


async def test_what_a_dead_worker_left_is_swept_and_does_not_count(desks: Desks, user: str) -> None:
    living, dead, unknown = [await desks.open() for _ in range(3)]
    kept = living.entry(user)
    await living.register(kept)
    await dead.register(dead.entry(user))
    await unknown.register(unknown.entry(user))
    await dead.lease(ago=3_001)
    await unknown.lane.call(["HDEL", keys.WORKERS, unknown.name])
    newcomer = living.entry(user)

    assert await living.listed(user) == [kept]
    assert await living.register(newcomer) is None
    assert await living.fields(user) == {
        f"{living.name}/{kept.connection}",
        f"{living.name}/{newcomer.connection}",
    }


async def test_the_entries_of_a_worker_that_lives_count_though_it_is_late(
    desks: Desks, user: str
) -> None:
    here, late = await desks.open(most=1), await desks.open(most=1)
    entry = late.entry(user)
    await late.register(entry)
    await late.lease(ago=1_500)

    assert await here.register(here.entry(user)) == Full([entry])


async def test_connections_are_listed_in_a_settled_order(desks: Desks, user: str) -> None:
    desk = await desks.open(most=10)
    entries = [
        desk.entry(user, f"c{since}", session, since=since)
        for session, since in [("b", 3), ("a", 9), ("b", 1), ("a", 4)]
    ]
    for entry in entries:
        await desk.register(entry)

    listed = [(entry.session, entry.since) for entry in await desk.listed(user)]
    assert listed == [("a", 4), ("a", 9), ("b", 1), ("b", 3)]


async def test_what_is_renewed_is_there_again_whatever_the_cap(desks: Desks, user: str) -> None:
    """That others came meanwhile, it is not to blame for."""
    desk = await desks.open(most=1)
    entries = [desk.entry(user, f"c{n}", f"s {n}") for n in range(3)]
    desks.valkey.command("FLUSHALL")
    await desk.lease()

    assert [await desk.renew(entry) for entry in entries] == [None] * 3
    assert await desk.listed(user) == entries
    left = await desk.lane.call(["TTL", keys.connections(user)])
    assert 1_790 <= left <= 1_800


async def test_who_has_its_place_is_renewed_in_a_full_house(desks: Desks, user: str) -> None:
    desk = await desks.open(most=2)
    entries = [desk.entry(user, f"c{n}") for n in range(2)]
    for entry in entries:
        await desk.register(entry)

    assert [await desk.renew(entry) for entry in entries] == [None, None]
    assert await desk.listed(user) == entries


async def test_who_has_lost_its_place_to_one_of_its_session_is_told_so(
    desks: Desks, user: str
) -> None:
    """And gets another when there is one."""
    desk = await desks.open(most=1)
    first, second = desk.entry(user, "c1"), desk.entry(user, "c2")
    await desk.register(first)
    await desk.register(second, instead_of=first)
    without = await desk.renew(first)
    desk.registry.unregister(second)

    assert without == Full([second])
    assert await desk.renew(first) is None
    assert await desk.listed(user) == [first]


async def test_what_nobody_renews_ends_by_itself(desks: Desks, user: str) -> None:
    desk = await desks.open()
    await desk.register(desk.entry(user))

    left = await desk.lane.call(["TTL", keys.connections(user)])
    assert 1_790 <= left <= 1_800


@pytest.mark.parametrize("session", ["s", "a b", " a  b ", "a/b", "é𝒳", "0", "x" * 128])
@pytest.mark.parametrize("address", ["", "2001:db8::/64"])
async def test_a_session_is_read_as_it_was_written(
    desks: Desks, user: str, session: str, address: str
) -> None:
    desk = await desks.open()
    entry = desk.entry(user, session=session)._replace(address=address)
    await desk.register(entry)

    assert await desk.listed(user) == [entry._replace(address=address or "-")]


async def test_a_users_name_may_be_anything(desks: Desks) -> None:
    desk = await desks.open()
    names = ["a", "a:b", "a b", "a/b", "{x}", "é𝒳", "*", "x" * 128]
    for name in names:
        await desk.register(desk.entry(name))

    assert [len(await desk.listed(name)) for name in names] == [1] * 8


# --- the store is away ---------------------------------------------------------------------


@pytest.mark.usefixtures("prompt")
async def test_nothing_is_registered_while_the_store_is_away(desks: Desks, user: str) -> None:
    """It may have happened all the same, so it is taken back."""
    desk = await desks.open()
    desks.valkey.freeze()
    outcome = await desk.register(desk.entry(user))
    desks.valkey.thaw()
    await eventually(lambda: not desk.registry._undone and not desk.lane._down)

    assert isinstance(outcome, StoreUnavailable)
    assert await gone(desk, user)


async def gone(desk: Desk, user: str) -> bool:
    """Sooner or later nobody of the user is there; the store may still be coming back."""
    async with asyncio.timeout(15):
        while True:
            try:
                if not await desk.fields(user):
                    return True
            except StoreUnavailable:
                await asyncio.sleep(0.01)


@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize("how", ["frozen", "killed"])
async def test_a_removal_is_repeated_until_the_store_has_taken_it(
    desks: Desks, user: str, how: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registry, "RETRY_SECONDS", 0.05)
    desk = await desks.open()
    entries = [desk.entry(user), desk.entry(user)]
    for entry in entries:
        await desk.register(entry)
    (desks.valkey.freeze if how == "frozen" else desks.valkey.kill)()
    for entry in entries:
        desk.registry.unregister(entry)
    await eventually(lambda: len(desk.registry._undone) == 2)
    (desks.valkey.thaw if how == "frozen" else desks.valkey.start)()

    assert await gone(desk, user)


# --- with leases that are real -------------------------------------------------------------


async def test_the_lease_of_a_mirror_is_what_makes_entries_count(
    own_valkey: Valkey, desks: Desks, user: str
) -> None:
    street = Street(own_valkey)
    house = await street.open()
    desk = await desks.open()
    entry = desk.entry(user)._replace(worker=house.name)
    await desk.renew(entry)
    with_lease = await desk.listed(user)
    await house.stop_following()
    await house.mirror.resign()
    without = await desk.listed(user)
    await house.close()

    assert with_lease == [entry]
    assert without == []

"""Revocations that return when every worker has applied them, and the leases this stands on."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from chatserver.core.claims import Identity
from chatserver.core.session import Kind
from chatserver.store import keys, revocations
from chatserver.store.link import Store
from chatserver.store.revocations import Outcome, living_leases, revoke
from tests.support.mirrors import Street
from tests.support.sessions import office
from tests.support.tokens import Issuer
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, eventually


def identity(
    *, user: str = "someone", session: str = "any", token_id: str = "one", issued_at: int = 0
) -> Identity:
    return Identity(
        user=user,
        session=session,
        token_id=token_id,
        roles=("member",),
        rooms=None,
        issued_at=issued_at,
        expires_at=issued_at + 900,
    )


@pytest.fixture
async def street(own_valkey: Valkey) -> AsyncIterator[Street]:
    opened = Street(own_valkey)
    yield opened
    for house in opened.houses:
        await house.close()


# --- waiting for workers -------------------------------------------------------------------


async def test_a_revocation_with_nobody_to_wait_for_is_complete(street: Street) -> None:
    outcome, seconds = await street.revoke(Kind.SESSION, "s")

    assert outcome == Outcome(closed=0, complete=True)
    assert seconds < 1.0


@pytest.mark.parametrize("kind", list(Kind))
async def test_a_revocation_returns_when_all_have_applied_it(street: Street, kind: Kind) -> None:
    houses = [await street.open(connections) for connections in (2, 0, 3)]
    outcome, seconds = await street.revoke(kind, "x")

    assert [len(house.told) for house in houses] == [1, 1, 1]
    who = identity(user="x", session="x", token_id="x")
    assert [house.mirror.covers(who) for house in houses] == [True] * 3
    assert outcome == Outcome(closed=5, complete=True)
    assert seconds < 1.0


async def test_many_at_once_are_each_counted_on_their_own(street: Street) -> None:
    houses = [await street.open(1), await street.open(2)]
    async with Store(street.valkey.url) as store:
        outcomes = await asyncio.gather(
            *(revoke(store.call, Kind.SESSION, f"s{n}") for n in range(50))
        )

    assert outcomes == [Outcome(closed=3, complete=True)] * 50
    assert [len(house.told) for house in houses] == [50, 50]


async def test_what_was_revoked_before_closes_nothing_again(street: Street) -> None:
    house = await street.open(4)
    first, _ = await street.revoke(Kind.SESSION, "s")
    house.connections = 0
    second, _ = await street.revoke(Kind.SESSION, "s")

    assert first == Outcome(closed=4, complete=True)
    assert second == Outcome(closed=0, complete=True)


async def test_a_worker_that_follows_no_more_is_waited_for_as_long_as_its_lease(
    street: Street,
) -> None:
    following, silent = await street.open(2), await street.open(7)
    await silent.stop_following()
    # As if it had looked at this very moment: there is all of its lease to wait for.
    lease = f"{int(time.time() * 1000)} 0-0 {{}}"
    street.valkey.command("HSET", keys.WORKERS, silent.name, lease)
    outcome, seconds = await street.revoke(Kind.SESSION, "s")

    assert following.mirror.covers(identity(session="s"))
    assert not silent.mirror.covers(identity(session="s"))
    assert not silent.mirror.fresh()  # it accepts nobody by now
    assert outcome == Outcome(closed=2, complete=False)
    assert seconds < 3.8


async def test_a_worker_whose_lease_has_ended_is_not_waited_for(street: Street) -> None:
    following, silent = await street.open(2), await street.open(7)
    await silent.stop_following()
    async with Store(street.valkey.url) as store, asyncio.timeout(PATIENCE):
        while silent.name in {lease.worker for lease in await living_leases(store.call)}:
            await asyncio.sleep(0.01)
    outcome, seconds = await street.revoke(Kind.SESSION, "s")

    assert following.mirror.covers(identity(session="s"))
    assert not silent.mirror.fresh()
    assert outcome == Outcome(closed=2, complete=True)
    assert seconds < 1.0


async def test_a_worker_that_has_resigned_is_not_waited_for(street: Street) -> None:
    staying, leaving = await street.open(1), await street.open(9)
    await leaving.stop_following()
    await leaving.mirror.resign()
    outcome, seconds = await street.revoke(Kind.SESSION, "s")
    async with Store(street.valkey.url) as store:
        leases = await living_leases(store.call)

    assert outcome == Outcome(closed=1, complete=True)
    assert seconds < 1.0
    assert [lease.worker for lease in leases] == [staying.name]
    assert leases[0].about == {"connections": 1}


async def test_a_mirror_that_is_started_later_covers_it(street: Street) -> None:
    await street.revoke(Kind.SESSION, "s")
    late = await street.open(5)

    assert late.mirror.covers(identity(session="s"))


async def test_a_mirror_that_is_started_amid_revocations_misses_none(street: Street) -> None:
    names = [f"s{n}" for n in range(30)]
    async with Store(street.valkey.url) as store:
        done = asyncio.gather(*(revoke(store.call, Kind.SESSION, name) for name in names))
        houses = [await street.open() for _ in range(3)]
        await done

    for house in houses:
        assert [name for name in names if not house.mirror.covers(identity(session=name))] == []


# --- what a follower is told ---------------------------------------------------------------


async def test_changed_rights_reach_every_follower_and_revoke_nothing(
    street: Street, issuer: Issuer
) -> None:
    houses = [await street.open(), await street.open()]
    async with office(street.valkey.url, issuer) as opened:
        pair = await opened.begin()
        await opened.sessions.entitle(pair.session, roles=["guest"])
        await eventually(lambda: all(house.rights for house in houses))

    assert [house.rights for house in houses] == [[pair.session]] * 2
    assert [house.told for house in houses] == [[], []]
    assert not houses[0].mirror.covers(identity(session=pair.session))


async def test_a_lease_that_is_renewed_has_not_lapsed(street: Street) -> None:
    house = await street.open()
    lapses = house.lapses
    for n in range(5):
        await street.revoke(Kind.SESSION, f"s{n}")

    assert lapses == 1  # the first look of all
    assert house.lapses == 1


async def test_an_emptied_store_lets_the_lease_lapse(street: Street) -> None:
    house = await street.open()
    street.valkey.command("FLUSHALL")
    house.mirror.wake()

    await eventually(lambda: house.lapses == 2)


async def test_a_lease_that_others_saw_end_has_lapsed(street: Street) -> None:
    house = await street.open()
    street.valkey.command("HSET", keys.WORKERS, house.name, "1700000000000 0-0 {}")
    house.mirror.wake()

    await eventually(lambda: house.lapses == 2)


class Shifted:
    """The time module, with clocks that are some seconds on."""

    def __init__(self, *, wall: float = 0.0, monotonic: float = 0.0) -> None:
        self._wall = wall
        self._monotonic = monotonic

    def time(self) -> float:
        return time.time() + self._wall

    def monotonic(self) -> float:
        return time.monotonic() + self._monotonic


async def test_after_a_long_gap_the_lease_has_lapsed(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await street.open()
    monkeypatch.setattr(revocations, "time", Shifted(monotonic=4.0))
    house.mirror.wake()

    await eventually(lambda: house.lapses == 2)
    await eventually(house.mirror.fresh)


@pytest.mark.parametrize("seconds", [1200.0, -1200.0, 86_400.0])
async def test_a_clock_that_steps_away_and_back_forgets_no_revocation(
    street: Street, monkeypatch: pytest.MonkeyPatch, seconds: float
) -> None:
    house = await street.open(1)
    await street.revoke(Kind.SESSION, "s")
    await street.revoke(Kind.USER, "u")
    at = house.told[-1].cutoff

    monkeypatch.setattr(revocations, "time", Shifted(wall=seconds))
    house.mirror.wake()
    await eventually(lambda: not house.mirror.fresh())
    await street.revoke(Kind.SESSION, "amid")
    monkeypatch.setattr(revocations, "time", Shifted())
    house.mirror.wake()
    await eventually(house.mirror.fresh)

    assert house.mirror.covers(identity(session="s"))
    assert house.mirror.covers(identity(session="amid"))
    assert house.mirror.covers(identity(user="u", issued_at=at))
    assert len(house.told) == 3


async def test_a_store_emptied_while_the_clock_is_away_gets_everything_back(
    street: Street, monkeypatch: pytest.MonkeyPatch
) -> None:
    house = await street.open()
    await street.revoke(Kind.SESSION, "s")
    monkeypatch.setattr(revocations, "time", Shifted(wall=1200.0))
    street.valkey.command("FLUSHALL")
    house.mirror.wake()

    record = "chat:{auth}:revoked:session:s"
    await eventually(lambda: street.valkey.command("EXISTS", record) == b":1")
    assert 800 < int(street.valkey.command("TTL", record)[1:]) <= 910

"""Mirrors of one store that run, as those of so many workers."""

from __future__ import annotations

import asyncio

from chatserver.core.session import Kind, Revocation
from chatserver.store.keys import CHANNEL
from chatserver.store.link import Store
from chatserver.store.revocations import Mirror, Outcome, revoke
from tests.support.stopwatch import Stopwatch
from tests.support.tokens import unique
from tests.support.valkey import Valkey
from tests.support.worker import end, eventually


class House:
    """A worker's mirror that runs, of which each revocation ends so many connections."""

    def __init__(self, url: str, connections: int = 0) -> None:
        self.connections = connections
        self.told: list[Revocation] = []
        self.rights: list[str] = []
        self.lapses = 0
        store = Store(url)
        self.lane = store.lane()
        self.name = unique("w")
        self.mirror = Mirror(self.lane, self.name, self)
        subscription = store.subscription(
            lambda name, payload: self.mirror.wake(), lambda name: self.mirror.wake()
        )
        subscription.subscribe(CHANNEL)
        self.following = asyncio.create_task(self.mirror.run())
        self.tasks = [asyncio.create_task(run()) for run in (self.lane.run, subscription.run)]

    def revoke(self, revocation: Revocation) -> int:
        self.told.append(revocation)
        return self.connections

    def rights_changed(self, session: str) -> None:
        self.rights.append(session)

    def lease_lapsed(self) -> None:
        self.lapses += 1

    def about(self) -> dict[str, object]:
        return {"connections": self.connections}

    async def stop_following(self) -> None:
        await end([self.following])

    async def close(self) -> None:
        await end([self.following, *self.tasks])


class Street:
    """Mirrors of one store."""

    def __init__(self, valkey: Valkey) -> None:
        self.valkey = valkey
        self.houses: list[House] = []

    async def open(self, connections: int = 0) -> House:
        house = House(self.valkey.url, connections)
        self.houses.append(house)
        await eventually(house.mirror.fresh)
        return house

    async def revoke(self, kind: Kind, value: str) -> tuple[Outcome, float]:
        """What came of it, and how many seconds it took, as a stopwatch has them."""
        async with Store(self.valkey.url) as store:
            with Stopwatch() as watch:
                outcome = await revoke(store.call, kind, value)
            return outcome, watch.seconds

"""The clients of a run together: who is where, who sends what, and when all have everything."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Coroutine, Sequence
from typing import Any

from tests.faults.clients import POLL_SECONDS, Client, World, now
from tests.faults.history import Final, History
from tests.faults.member import Member
from tests.support.tokens import Issuer
from tests.support.worker import end


class Fleet(World):
    """All clients of a run, of one kind, and who sends what to which room."""

    def __init__(
        self,
        history: History,
        issuer: Issuer,
        urls: Sequence[str],
        seed: int = 0,
        kind: Callable[..., Member] = Client,
    ) -> None:
        super().__init__(history, issuer, urls, seed)
        self.clients: dict[str, Member] = {}
        self._kind = kind
        self._tasks: set[asyncio.Task[None]] = set()

    def enlist(self, name: str, rooms: Sequence[str], rights: dict[str, str], **o: Any) -> Member:
        """One more client, which begins at once."""
        client = self.clients[name] = self._kind(self, name, rooms, rights, **o)
        self._start(client.run())
        return client

    def _start(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        return task

    def populate(self, rooms: int, members: int) -> None:
        """Members of some rooms each. Some may only read here or there, some may read nothing;
        some let their tokens expire."""
        names = [f"room-{n}" for n in range(rooms)]
        for n in range(members):
            mine = self.random.sample(names, min(rooms, self.random.randint(2, 8)))
            rights = {room: "r" if self.random.random() < 0.1 else "rw" for room in mine}
            if n % 20 == 19:  # A spy: it asks for what it may not have.
                rights = {mine[0]: "w", "*": ""}
            self.enlist(
                f"member-{n}",
                mine,
                rights,
                lazy=n % 7 == 3,
                lifetime=self.random.randint(20, 60),
            )

    def publish(self, rate: float) -> asyncio.Task[None]:
        """So many messages a second, from anybody to anywhere, until it is cancelled."""
        return self._start(self._publish(rate))

    async def _publish(self, rate: float) -> None:
        rng, clients = self.random, list(self.clients.values())
        while True:
            await asyncio.sleep(rng.expovariate(rate))
            client = rng.choice(clients)
            rooms = client.rooms
            several = rng.randint(2, 4) if rng.random() < 0.05 else 1
            client.publish(
                rng.sample(rooms, min(several, len(rooms))),
                echo=rng.random() < 0.8,
                stubborn=rng.random() < 0.9,
                padding=20_000 if rng.random() < 0.02 else rng.choice((0, 0, 0, 500, 4000)),
            )
            if rng.random() < 0.01:
                client.wander(rng.choice(rooms))

    async def ready(self, within: float) -> None:
        """All are in their rooms. Raises TimeoutError."""
        async with asyncio.timeout(within):
            while not all(client.joined for client in self.clients.values()):
                await asyncio.sleep(POLL_SECONDS)

    async def settle(self, within: float) -> None:
        """Wait for what is under way; what is not answered by then is unknown."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while not all(client.settled for client in self.clients.values()):
                    await asyncio.sleep(POLL_SECONDS)
        for client in self.clients.values():
            client.abandon()

    async def finals(self, within: float) -> dict[str, Final]:
        """Where each room's log ends, as the server tells it. Raises TimeoutError."""
        rooms = {
            room
            for client in self.clients.values()
            for room in client.rooms
            if client.may(room, "r")
        }
        found: dict[str, Final] = {}
        async with asyncio.timeout(within):
            while missing := rooms - set(found):
                for room in missing:
                    if (final := await self._final(room)) is not None:
                        found[room] = final
                await asyncio.sleep(POLL_SECONDS)
        for final in found.values():
            self.add(final)
        return found

    async def _final(self, room: str) -> Final | None:
        able = [c for c in self.clients.values() if c.connected and c.may(room, "r")]
        if not able:
            return None
        end = await self.random.choice(able).end_of(room)
        if end is None:
            return None
        return Final(at=now(), room=room, epoch=end.epoch, offset=end.offset)

    def behind(self, finals: dict[str, Final]) -> list[str]:
        """Who has not got everything, or is not there."""
        return [
            client.name
            for client in self.clients.values()
            if not client.joined
            or any(
                client.may(room, "r") and client.reached(room) < finals[room].offset
                for room in client.rooms
            )
        ]

    async def catch_up(self, finals: dict[str, Final], within: float) -> list[str]:
        """Wait until everybody has everything; returns who has not by then."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(within):
                while self.behind(finals):
                    await asyncio.sleep(POLL_SECONDS)
        return self.behind(finals)

    async def stop(self) -> None:
        """Everybody leaves. Raises what a client failed of."""
        await asyncio.gather(*(client.leave() for client in self.clients.values()))
        failed = [
            task
            for task in self._tasks
            if task.done() and not task.cancelled() and task.exception() is not None
        ]
        await end(self._tasks)
        for task in failed:
            task.result()

"""Does harm, by a plan that a seed gives: the same seed, the same faults at the same times.

Each fault says in the history when it begins and ends, and undoes itself whatever happens. Faults
on one resource do not overlap; those on different ones may.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import signal
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from typing import NamedTuple

from tests.faults.clients import now
from tests.faults.fleet import Fleet
from tests.faults.history import Fault, History, Revoked
from tests.faults.member import Member
from tests.faults.server import Server, tell
from tests.faults.story import LOSSY
from tests.support.proxy import Link, Proxy, Weather
from tests.support.valkey import Valkey

EVERY_SECONDS = 3.0
QUIET_SECONDS = 1.0
"""At the beginning and the end of a plan."""


class Theatre(NamedTuple):
    """All that can be harmed."""

    server: Server
    valkey: Valkey
    store_link: Proxy
    client_link: Proxy
    dirty_link: Proxy
    """Of clients that nobody relies on: bits are flipped on it."""
    fleet: Fleet
    history: History


class Planned(NamedTuple):
    at: float
    """Seconds from the beginning."""
    name: str
    seconds: float
    seed: float


class Kind(NamedTuple):
    """One fault: what it touches, how long it may last, and how it is done."""

    resource: str
    shortest: float
    longest: float
    act: Callable[[Nemesis, float, random.Random], Awaitable[None]]


class Nemesis:
    """Carries a plan out."""

    def __init__(self, theatre: Theatre) -> None:
        self.theatre = theatre
        self.skipped: list[str] = []
        """What could not be done, for nobody was there to do it to."""
        self._ids = 0

    async def run(self, plan: Sequence[Planned]) -> None:
        """Returns when the last fault is over."""
        loop = asyncio.get_running_loop()
        start = loop.time()
        async with asyncio.TaskGroup() as tasks:
            for planned in plan:
                await asyncio.sleep(max(0, start + planned.at - loop.time()))
                tasks.create_task(self.do(planned))

    async def do(self, planned: Planned) -> None:
        await FAULTS[planned.name].act(self, planned.seconds, random.Random(planned.seed))

    @asynccontextmanager
    async def window(
        self, name: str, detail: str = "", members: Sequence[str] = ()
    ) -> AsyncIterator[None]:
        """To be entered when the fault has taken effect, and left before it is undone."""
        self._ids += 1
        fault = Fault(
            at=now(),
            id=self._ids,
            name=name,
            phase="begin",
            detail=detail,
            members=tuple(members),
        )
        self.theatre.history.add(fault)
        try:
            yield
        finally:
            over = Fault(at=now(), id=fault.id, name=name, phase="end")
            self.theatre.history.add(over)

    # Workers.

    def _victim(self, rng: random.Random) -> tuple[int, int] | None:
        """The slot and the process of a worker."""
        slot = rng.randrange(2)
        pid = self.theatre.server.worker(slot)
        return None if pid is None else (slot, pid)

    async def kill_worker(self, seconds: float, rng: random.Random) -> None:
        victim = self._victim(rng)
        if victim is None or not self.theatre.server.mortal(victim[0]):
            self.skipped.append("worker_killed")
            return
        async with self.window("worker_killed", f"slot {victim[0]}"):
            tell(victim[1], signal.SIGKILL)
            await self.theatre.server.replaced(*victim)

    async def stop_worker(self, seconds: float, rng: random.Random) -> None:
        """After five seconds and a little the supervisor kills it, which is as good."""
        victim = self._victim(rng)
        if victim is None:
            self.skipped.append("worker_stopped")
            return
        tell(victim[1], signal.SIGSTOP)
        try:
            async with self.window("worker_stopped", f"slot {victim[0]}"):
                await asyncio.sleep(seconds)
        finally:
            tell(victim[1], signal.SIGCONT)

    async def roll_workers(self, seconds: float, rng: random.Random) -> None:
        """One after the other, each when the next one serves, as a deployment does."""
        async with self.window("rolling_restart"):
            await self.theatre.server.roll()

    async def drain_workers(self, seconds: float, rng: random.Random) -> None:
        """One after the other, as somebody does who knows no better."""
        async with self.window("workers_drained"):
            for slot in range(2):
                pid = self.theatre.server.worker(slot)
                if pid is None or not self.theatre.server.mortal(slot):
                    self.skipped.append("workers_drained")
                    continue
                tell(pid, signal.SIGTERM)
                await self.theatre.server.replaced(slot, pid)

    # The store.

    async def kill_store(self, seconds: float, rng: random.Random) -> None:
        valkey = self.theatre.valkey
        await asyncio.to_thread(valkey.kill)
        try:
            async with self.window("store_killed"):
                await asyncio.sleep(seconds)
        finally:
            await asyncio.to_thread(valkey.start)

    async def freeze_store(self, seconds: float, rng: random.Random) -> None:
        self.theatre.valkey.freeze()
        try:
            async with self.window("store_frozen"):
                await asyncio.sleep(seconds)
        finally:
            self.theatre.valkey.thaw()

    async def slow_store(self, seconds: float, rng: random.Random) -> None:
        link = self.theatre.store_link
        delay = rng.choice((0.01, 0.05, 0.1, 0.25))
        link.up.delay, link.down.jitter = delay, delay / 2
        try:
            async with self.window("store_slow", f"{delay} s"):
                await asyncio.sleep(seconds)
        finally:
            link.calm()

    async def fill_store(self, seconds: float, rng: random.Random) -> None:
        await self.command("CONFIG", "SET", "maxmemory", "1")
        try:
            async with self.window("store_full"):
                await asyncio.sleep(seconds)
        finally:
            await self.command("CONFIG", "SET", "maxmemory", "0")

    async def reset_store_links(self, seconds: float, rng: random.Random) -> None:
        async with self.window("store_links_reset"):
            for _ in range(max(1, int(seconds / 0.3))):
                await self.command("CLIENT", "KILL", "TYPE", "normal")
                await asyncio.sleep(0.3)

    async def lose_answers(self, seconds: float, rng: random.Random) -> None:
        """What has been stored is not answered: the answers are on their way when the link ends."""
        link = self.theatre.store_link
        async with self.window("store_answers_lost"):
            for _ in range(max(1, int(seconds / 0.8))):
                link.down.delay = 0.3
                await asyncio.sleep(0.3)
                link.reset()
                link.calm()
                await asyncio.sleep(0.5)

    async def kill_pubsub(self, seconds: float, rng: random.Random) -> None:
        async with self.window("pubsub_killed"):
            for _ in range(max(1, int(seconds / 0.5))):
                await self.command("CLIENT", "KILL", "TYPE", "pubsub")
                await asyncio.sleep(0.5)

    async def overrun_pubsub(self, seconds: float, rng: random.Random) -> None:
        """Whatever is longer than this ends the subscription to which it was to go."""
        name = "client-output-buffer-limit"
        await self.command("CONFIG", "SET", name, "pubsub 2kb 2kb 1")
        try:
            async with self.window("pubsub_overrun"):
                await asyncio.sleep(seconds)
        finally:
            await self.command("CONFIG", "SET", name, "pubsub 32mb 8mb 60")

    async def empty_store(self, seconds: float, rng: random.Random) -> None:
        async with self.window("store_emptied"):
            await self.command("FLUSHALL")

    async def cut_store_off(self, seconds: float, rng: random.Random) -> None:
        """Its file ends somewhere amid the latest commands."""
        lost = int(rng.lognormvariate(6, 2))
        async with self.window("store_older", f"by {lost} bytes"):
            await asyncio.to_thread(self.theatre.valkey.shorten, lambda written: lost)

    async def command(self, *words: str) -> None:
        await asyncio.to_thread(self.theatre.valkey.command, *words)

    # Clients.

    def _some(self, rng: random.Random, share: float = 0.4) -> tuple[list[Member], list[Link]]:
        """Clients that are connected, and their links."""
        links = {link.port: link for link in self.theatre.client_link.links}
        clients = [c for c in self.theatre.fleet.clients.values() if c.port in links]
        chosen = [client for client in clients if rng.random() < share]
        return chosen, [links[client.port] for client in chosen]

    async def reset_links(self, seconds: float, rng: random.Random) -> None:
        clients, links = self._some(rng)
        async with self.window("links_reset", members=[client.name for client in clients]):
            self.theatre.client_link.reset(links)

    async def end_links(self, seconds: float, rng: random.Random) -> None:
        """Some are closed on one side only, some in the middle of a frame."""
        clients, links = self._some(rng, 0.3)
        async with self.window("links_ended", members=[client.name for client in clients]):
            for link in links:
                if rng.random() < 0.5:
                    link.half_close(upwards=rng.random() < 0.5)
                else:
                    link.up, link.down = Weather(truncate=True), Weather(truncate=True)

    async def freeze_links(self, seconds: float, rng: random.Random) -> None:
        clients, links = self._some(rng)
        await self._weather("links_frozen", clients, links, Weather(frozen=True), seconds)

    async def slow_links(self, seconds: float, rng: random.Random) -> None:
        clients, links = self._some(rng)
        weather = Weather(
            delay=rng.choice((0.02, 0.1, 0.4)),
            jitter=rng.choice((0.0, 0.1)),
            rate=rng.choice((0.0, 2_000.0, 20_000.0)),
        )
        await self._weather("links_slow", clients, links, weather, seconds)

    async def _weather(
        self,
        name: str,
        clients: list[Member],
        links: list[Link],
        weather: Weather,
        seconds: float,
    ) -> None:
        for link in links:
            link.up = link.down = weather
        try:
            async with self.window(name, members=[client.name for client in clients]):
                await asyncio.sleep(seconds)
        finally:
            proxy = self.theatre.client_link
            for link in links:
                link.up, link.down = proxy.up, proxy.down

    async def flip_bits(self, seconds: float, rng: random.Random) -> None:
        link = self.theatre.dirty_link
        link.up.flip = link.down.flip = rng.choice((0.02, 0.2))
        try:
            async with self.window("bits_flipped"):
                await asyncio.sleep(seconds)
        finally:
            link.calm()

    async def pause_readers(self, seconds: float, rng: random.Random) -> None:
        clients, _ = self._some(rng)
        async with self.window("slow_readers", members=[client.name for client in clients]):
            await asyncio.gather(*(client.pause(seconds) for client in clients))

    async def revoke_sessions(self, seconds: float, rng: random.Random) -> None:
        clients, _ = self._some(rng, 0.1)
        async with self.window("revocations", members=[client.name for client in clients]):
            await asyncio.gather(*(self.revoke(client.session) for client in clients))

    async def revoke(self, session: str, within: float = 20.0) -> None:
        """Insist until the server says that it is done."""
        self.theatre.fleet.revoked.add(session)
        async with asyncio.timeout(within):
            while True:
                with contextlib.suppress(OSError, TimeoutError, ValueError):
                    await self.theatre.server.control("/v1/revocations", {"session": session})
                    break
                await asyncio.sleep(0.2)
        self.theatre.history.add(Revoked(at=now(), session=session))


FAULTS = {
    "worker_killed": Kind("worker", 0, 0, Nemesis.kill_worker),
    "worker_stopped": Kind("worker", 1, 7, Nemesis.stop_worker),
    "workers_drained": Kind("worker", 4, 6, Nemesis.drain_workers),
    "rolling_restart": Kind("worker", 6, 9, Nemesis.roll_workers),
    "store_killed": Kind("store", 0.2, 2, Nemesis.kill_store),
    "store_frozen": Kind("store", 0.3, 3, Nemesis.freeze_store),
    "store_slow": Kind("store", 1, 4, Nemesis.slow_store),
    "store_full": Kind("store", 0.5, 3, Nemesis.fill_store),
    "store_links_reset": Kind("store", 0.3, 2, Nemesis.reset_store_links),
    "store_answers_lost": Kind("store", 0.8, 3, Nemesis.lose_answers),
    "pubsub_killed": Kind("store", 1, 4, Nemesis.kill_pubsub),
    "pubsub_overrun": Kind("store", 1, 3, Nemesis.overrun_pubsub),
    "links_reset": Kind("links", 0, 0, Nemesis.reset_links),
    "links_ended": Kind("links", 0, 0, Nemesis.end_links),
    "links_frozen": Kind("links", 1, 5, Nemesis.freeze_links),
    "links_slow": Kind("links", 1, 5, Nemesis.slow_links),
    "bits_flipped": Kind("dirty", 1, 5, Nemesis.flip_bits),
    "slow_readers": Kind("readers", 1, 5, Nemesis.pause_readers),
    "revocations": Kind("sessions", 0, 0, Nemesis.revoke_sessions),
    "store_older": Kind("store", 0, 0, Nemesis.cut_store_off),
    "store_emptied": Kind("store", 0, 0, Nemesis.empty_store),
}
USUAL = tuple(name for name in FAULTS if name not in LOSSY)
"""Faults of a random run."""


def plan(
    seed: int,
    seconds: float,
    names: Sequence[str] = USUAL,
    every: float = EVERY_SECONDS,
    lead: float = QUIET_SECONDS,
) -> list[Planned]:
    """Faults for so many seconds, one ``every`` so many or less, some of them at once; the first
    when ``lead`` seconds are over."""
    if not names:
        return []
    rng = random.Random(seed)
    free: dict[str, float] = {}
    found: list[Planned] = []
    at = lead
    while at < seconds - QUIET_SECONDS:
        name = rng.choice(names)
        kind = FAULTS[name]
        lasting = rng.uniform(kind.shortest, kind.longest)
        if free.get(kind.resource, 0.0) <= at and at + lasting < seconds - QUIET_SECONDS:
            found.append(Planned(round(at, 2), name, round(lasting, 2), rng.random()))
            free[kind.resource] = at + lasting + 0.5
        at += rng.uniform(every / 6, every * 4 / 3)
    return found

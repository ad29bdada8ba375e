"""One run: a store, the server, a fleet and a nemesis; then everything is healed, waited for, and
checked.

The fleet's clients are of one of these ``KINDS``. Each is a class, or whatever makes one, that
keeps to `member.Member`: it takes its orders from the fleet, and writes what it sees into
``world.history``. Those of a client that people use write down what an application sees of it.
"""

from __future__ import annotations

import asyncio
import json
import shutil
import tempfile
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from typing import NamedTuple

import redis

from tests.faults import javascript, python
from tests.faults.checker import LIVENESS_SECONDS, Invariant, Report, Violation, check
from tests.faults.clients import GIVE_UP_SECONDS, Client, now
from tests.faults.fleet import Fleet
from tests.faults.history import History, Logged, Mark
from tests.faults.member import Member
from tests.faults.nemesis import (
    EVERY_SECONDS,
    QUIET_SECONDS,
    USUAL,
    Nemesis,
    Planned,
    Theatre,
    plan,
)
from tests.faults.server import Server, until
from tests.support.proxy import Proxy
from tests.support.tokens import Issuer
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE

MEMORY_BYTES = 128 * 2**20
"""What a worker may hold more than at the beginning."""
DESCRIPTORS_MORE = 8
"""What it may have open more, when all clients are gone: a request of the moment."""
DIRTY_CLIENTS = 4

KINDS: dict[str, Callable[..., Member]] = {
    "own": Client,  # Shares no code with any client that people use.
    "python": python.Member,
    "javascript": javascript.Member,
}

Say = Callable[[str], None]


class Shape(NamedTuple):
    """How much of everything."""

    rooms: int = 20
    members: int = 60
    rate: float = 60.0


class Verdict(NamedTuple):
    seed: int
    seconds: float
    plan: list[Planned]
    skipped: list[str]
    report: Report
    told: dict[str, int]
    """What clients were told beside acks."""
    violations: list[Violation]

    def __str__(self) -> str:
        told = ", ".join(f"{what} x {n}" for what, n in sorted(self.told.items()))
        lines = [
            f"seed        {self.seed}, {self.seconds:g} s",
            str(self.report),
            f"refused     {told or 'nothing'}",
            f"not done    {', '.join(self.skipped) or 'nothing'}",
        ]
        if not self.violations:
            return "\n".join([*lines, "verdict     every promise was kept"])
        shown = [f"  {violation}" for violation in self.violations[:40]]
        return "\n".join([*lines, f"verdict     {len(self.violations)} VIOLATIONS", *shown])


@asynccontextmanager
async def theatre(
    settings: Mapping[str, object],
    *,
    seed: int = 0,
    history: History | None = None,
    clients: str = "own",
) -> AsyncIterator[Theatre]:
    """A store, two proxies and the server; nobody is there yet. Everything ends with it."""
    directory = Path(tempfile.mkdtemp(prefix="cf"))
    history = History() if history is None else history
    issuer = Issuer()
    valkey = Valkey(directory)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        stack.callback(history.close)
        stack.push_async_callback(asyncio.to_thread, valkey.stop)
        await asyncio.to_thread(valkey.start)
        store_link = Proxy(valkey.socket, seed=seed)
        await store_link.start(directory / "p")
        stack.push_async_callback(store_link.close)
        server = Server(directory / "server.log", f"unix://{directory}/p", issuer, **settings)
        stack.push_async_callback(asyncio.to_thread, server.stop)
        await server.start()
        client_link = Proxy(("127.0.0.1", server.port), seed=seed + 1)
        dirty_link = Proxy(("127.0.0.1", server.port), seed=seed + 2)
        for proxy in (client_link, dirty_link):
            await proxy.start()
            stack.push_async_callback(proxy.close)
        url = f"ws://127.0.0.1:{client_link.port}/v1/ws"
        fleet = Fleet(history, issuer, [url], seed, KINDS[clients])
        stack.push_async_callback(fleet.stop)
        yield Theatre(server, valkey, store_link, client_link, dirty_link, fleet, history)


class Run:
    """Faults at random on a server under load."""

    def __init__(
        self,
        seed: int,
        seconds: float,
        shape: Shape | None = None,
        *,
        faults: Sequence[str] = USUAL,
        every: float = EVERY_SECONDS,
        lead: float = QUIET_SECONDS,
        clients: str = "own",
        history: Path | None = None,
        say: Say = lambda text: None,
    ) -> None:
        self.seed = seed
        self.seconds = seconds
        self.shape = shape or Shape()
        self.plan = plan(seed, seconds, faults, every, lead)
        self.history = History(history)
        self._clients = clients
        self._say = say
        self._violations: list[Violation] = []

    async def run(self) -> Verdict:
        """The whole of it takes the seconds given, and half a minute more at most."""
        history, clients = self.history, self._clients
        async with theatre({}, seed=self.seed, history=history, clients=clients) as stage:
            nemesis = Nemesis(stage)
            baseline = (stage.server.memory(), stage.server.descriptors())
            dirty = dirty_fleet(stage, "dirty-room")
            try:
                await self._perform(stage, nemesis, dirty)
                self._check_memory(stage, *baseline)
                await dirty.stop()
                await stage.fleet.stop()
                await self._check_descriptors(stage, max(baseline[1].values()))
                await asyncio.to_thread(read_logs, stage.valkey, stage.fleet)
            finally:
                await dirty.stop()
            exit_code = await asyncio.to_thread(stage.server.stop)
            for text in stage.server.untidy(exit_code):
                self._violated(Invariant.HYGIENE, text)
            strange = [text for c in stage.fleet.clients.values() for text in c.strange]
            for text in strange:
                self._violated(Invariant.HYGIENE, f"a frame that makes no sense: {text}")
            counts = dict(stage.fleet.counts)
        self._say(f"checking {len(self.history)} records")
        violations = await asyncio.to_thread(check, self.history)
        report = Report.of(self.history)
        violations = self._violations + violations
        return Verdict(
            self.seed, self.seconds, self.plan, nemesis.skipped, report, counts, violations
        )

    async def _perform(self, stage: Theatre, nemesis: Nemesis, dirty: Fleet) -> None:
        fleet, shape = stage.fleet, self.shape
        fleet.populate(shape.rooms, shape.members)
        await fleet.ready(4 * PATIENCE)
        self._say(f"{shape.members} members are in {shape.rooms} rooms; {len(self.plan)} faults")
        publishing = [fleet.publish(shape.rate), dirty.publish(5)]
        progress = asyncio.create_task(self._progress(stage))
        started = time.monotonic()
        await nemesis.run(self.plan)
        await asyncio.sleep(max(1.0, started + self.seconds - time.monotonic()))
        progress.cancel()
        await heal(stage, publishing, self._say)

    async def _progress(self, stage: Theatre) -> None:
        start = time.monotonic()
        while True:
            await asyncio.sleep(10)
            there = sum(client.joined for client in stage.fleet.clients.values())
            self._say(
                f"{time.monotonic() - start:.0f} s: {len(self.history)} records, {there} of "
                f"{len(stage.fleet.clients)} members in their rooms"
            )

    def _violated(self, invariant: Invariant, text: str) -> None:
        self._violations.append(Violation(invariant, text))

    def _check_memory(
        self, stage: Theatre, memory: dict[int, int], descriptors: dict[int, int]
    ) -> None:
        first = max(memory.values())
        for pid, size in stage.server.memory().items():
            if size > first + MEMORY_BYTES:
                self._violated(
                    Invariant.BOUNDED,
                    f"worker {pid} has {size >> 20} MiB; they began with {first >> 20}",
                )

    async def _check_descriptors(self, stage: Theatre, baseline: int) -> None:
        def most() -> int:
            return max(stage.server.descriptors().values(), default=0)

        if not await until(lambda: most() <= baseline + DESCRIPTORS_MORE, LIVENESS_SECONDS):
            self._violated(
                Invariant.BOUNDED,
                f"{most()} descriptors without any client; they began with {baseline}",
            )


def dirty_fleet(stage: Theatre, room: str, url: str = "") -> Fleet:
    """Clients on a link that flips bits: what they see is no evidence, but they must harm
    nobody."""
    url = url or f"ws://127.0.0.1:{stage.dirty_link.port}/v1/ws"
    fleet = Fleet(History(), stage.fleet.issuer, [url])
    fleet.undaunted = True
    for n in range(DIRTY_CLIENTS):
        fleet.enlist(f"{room}-{n}", [room], {room: "rw"})
    return fleet


async def heal(
    stage: Theatre, publishing: Sequence[asyncio.Task[None]], say: Say = lambda text: None
) -> None:
    """All faults are over: publish a little more, then wait until everybody has everything."""
    stage.history.add(Mark(at=now(), name="healed"))
    say("healed")
    await asyncio.sleep(1)
    for task in publishing:
        task.cancel()
    stage.history.add(Mark(at=now(), name="quiet"))
    await stage.fleet.settle(GIVE_UP_SECONDS + 1)
    finals = await stage.fleet.finals(2 * PATIENCE)
    # Longer than is allowed, to tell what is late from what is lost.
    behind = await stage.fleet.catch_up(finals, 2 * LIVENESS_SECONDS)
    say(f"still behind: {behind}" if behind else "everybody has everything")
    stage.history.add(Mark(at=now(), name="end"))


def read_logs(valkey: Valkey, fleet: Fleet) -> None:
    """Every room's log, as the store has it."""
    rooms = sorted({room for client in fleet.clients.values() for room in client.rooms})
    at = now()
    with redis.Redis(unix_socket_path=str(valkey.socket)) as store:
        history = store.info("replication")["master_replid"].encode()
        for room in rooms:
            epoch, began = store.hmget(f"chat:room:{{{room}}}:meta", "epoch", "history")
            if began != history:
                # As of a failover a moment ago: who comes next is told of another epoch.
                epoch = b""
            for place, fields in store.xrange(f"chat:room:{{{room}}}:log"):
                fleet.add(
                    Logged(
                        at=at,
                        room=room,
                        epoch=epoch.decode(),
                        offset=int(place.split(b"-")[0]),
                        key=json.loads(fields[b"e"]).get("key", ""),
                    )
                )

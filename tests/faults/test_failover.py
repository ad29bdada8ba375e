"""A primary dies while its replica is behind: who loses what, and who is told."""

from __future__ import annotations

import asyncio
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

from tests.conftest import AMPLE
from tests.faults.checker import Report, check
from tests.faults.fleet import Fleet
from tests.faults.history import History, Logged, Sent
from tests.faults.nemesis import Nemesis, Theatre
from tests.faults.run import heal, read_logs
from tests.faults.server import Server, until
from tests.support.failover import Failover
from tests.support.proxy import Proxy
from tests.support.tokens import Issuer
from tests.support.worker import PATIENCE

ROOMS = ["room-0", "room-1"]


@asynccontextmanager
async def behind_sentinels(**settings: object) -> AsyncIterator[tuple[Failover, Theatre]]:
    directory = Path(tempfile.mkdtemp(prefix="cf"))
    history, issuer = History(), Issuer()
    failover = Failover(directory)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        stack.push_async_callback(asyncio.to_thread, failover.stop)
        await asyncio.to_thread(failover.start)
        server = Server(directory / "log", failover.url, issuer, **AMPLE, **settings)
        stack.push_async_callback(asyncio.to_thread, server.stop)
        await server.start()
        fleet = Fleet(history, issuer, [server.url])
        stack.push_async_callback(fleet.stop)
        nowhere = Proxy(("127.0.0.1", 9))
        store = failover.stores[0]
        yield failover, Theatre(server, store, nowhere, nowhere, nowhere, fleet, history)
        assert server.untidy(await asyncio.to_thread(server.stop)) == []


async def fail_over(failover: Failover, stage: Theatre) -> None:
    """With messages that the replica has not got."""
    primary, replica = failover.stores
    # Not frozen: what is on its way would still reach it.
    replica.command("REPLICAOF", "127.0.0.1", "9")
    sent = count(stage.history)
    assert await until(lambda: count(stage.history) > sent + 20, 4 * PATIENCE)
    async with Nemesis(stage).window("failover"):
        await asyncio.to_thread(primary.kill)

        port = failover.ports[1]
        assert await until(lambda: failover.sentinels.agree_on(port), 4 * PATIENCE)
        # Back as a replica at once; the sentinels would take their time.
        await asyncio.to_thread(primary.start)
        failover.follow(0, 1)
        acked = outcomes(stage.history, "ok")
        assert await until(lambda: outcomes(stage.history, "ok") > acked + 20, 4 * PATIENCE)


def count(history: History) -> int:
    return sum(isinstance(record, Sent) for record in history)


def outcomes(history: History, outcome: str) -> int:
    return sum(isinstance(record, Sent) and record.outcome == outcome for record in history)


async def conclude(failover: Failover, stage: Theatre, publishing: asyncio.Task[None]) -> Report:
    await heal(stage, [publishing])
    await stage.fleet.stop()
    await asyncio.to_thread(read_logs, failover.primary, stage.fleet)
    assert check(stage.history) == []
    return Report.of(stage.history)


async def test_with_durability_primary_those_are_told_who_have_seen_what_is_gone() -> None:
    async with behind_sentinels() as (failover, stage):
        for n in range(6):
            stage.fleet.enlist(f"member-{n}", ROOMS, dict.fromkeys(ROOMS, "rw"))
        await stage.fleet.ready(2 * PATIENCE)
        publishing = stage.fleet.publish(60)
        await fail_over(failover, stage)
        report = await conclude(failover, stage, publishing)

    assert report.resets + report.not_recovered > 0


async def test_with_durability_replica_nothing_that_was_acked_is_gone() -> None:
    async with behind_sentinels(durability="replica") as (failover, stage):
        for n in range(6):
            stage.fleet.enlist(f"member-{n}", ROOMS, dict.fromkeys(ROOMS, "rw"))
        await stage.fleet.ready(2 * PATIENCE)
        publishing = stage.fleet.publish(60)
        await fail_over(failover, stage)
        report = await conclude(failover, stage, publishing)

    assert report.outcomes["ok"] > 0
    gone = acked_keys(stage.history) - stored_keys(stage.history)
    assert gone == set()


def acked_keys(history: History) -> set[str]:
    return {r.key for r in history if isinstance(r, Sent) and r.outcome == "ok"}


def stored_keys(history: History) -> set[str]:
    return {r.key for r in history if isinstance(r, Logged)}

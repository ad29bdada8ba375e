"""Hosts that cannot reach each other, in one direction or in both: what clients see meanwhile, and
what is left of it when the link is whole again.

Nothing is closed when a link is cut like this: packets are lost, connections stay half open, and
only deadlines tell.
"""

from __future__ import annotations

import asyncio
import shutil
import statistics
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import pytest
import pytest_asyncio

from tests.conftest import AMPLE
from tests.faults.checker import Report, check
from tests.faults.clients import ANSWER_SECONDS, LATE_SECONDS, Client
from tests.faults.fleet import Fleet
from tests.faults.history import Closed, History, Logged, Sent
from tests.faults.nemesis import Nemesis, Theatre
from tests.faults.run import heal, read_logs
from tests.faults.server import Server, until
from tests.support.failover import Failover, free_ports
from tests.support.network import HERE, Network, why_not
from tests.support.proxy import Proxy
from tests.support.stopwatch import Stopwatch
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE

pytestmark = [
    pytest.mark.skipif(bool(why_not()), reason=why_not()),
    pytest.mark.asyncio(loop_scope="module"),
]

TURNED_AWAY = "handshake 503 unavailable"
NOWHERE = Proxy(("127.0.0.1", 9))

Cut = Callable[[Network], None]


@asynccontextmanager
async def hosts(*names: str) -> AsyncIterator[tuple[AsyncExitStack, Path, Network]]:
    """Whatever is put on the stack goes before the hosts do."""
    directory = Path(tempfile.mkdtemp(prefix="cf"))
    network = Network(*names)
    async with AsyncExitStack() as stack:
        stack.callback(shutil.rmtree, directory, ignore_errors=True)
        stack.callback(network.stop)
        await asyncio.to_thread(network.start)
        yield stack, directory, network


async def join_two_rooms(fleet: Fleet, members: int = 8) -> list[str]:
    rooms = [unique("room") for _ in range(2)]
    for n in range(members):
        fleet.enlist(f"{unique('member')}-{n}", rooms, dict.fromkeys(rooms, "rw"))
    await fleet.ready(2 * PATIENCE)
    return rooms


def acked(history: History) -> set[str]:
    return {r.key for r in history if isinstance(r, Sent) and r.outcome == "ok"}


async def more_are_acked(stage: Theatre, count: int) -> bool:
    before = len(acked(stage.history))
    return await until(lambda: len(acked(stage.history)) > before + count, 2 * PATIENCE)


async def conclude(stage: Theatre, valkey: Valkey, publishing: asyncio.Task[None]) -> Report:
    await heal(stage, [publishing])
    await stage.fleet.stop()
    await asyncio.to_thread(read_logs, valkey, stage.fleet)
    assert check(stage.history) == []
    return Report.of(stage.history)


# --- a server, its store and its clients -----------------------------------------------------


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house() -> AsyncIterator[tuple[Theatre, Network]]:
    """Store and server on a host each, clients on this one."""
    issuer, history = Issuer(), History()
    async with hosts("server", "store") as (stack, directory, network):
        [port] = free_ports(1)
        site = network.site("store")
        options = {"port": str(port), "bind": site.address, "protected-mode": "no"}
        valkey = Valkey(directory, site.within, **options)
        stack.push_async_callback(asyncio.to_thread, valkey.stop)
        await asyncio.to_thread(valkey.start)
        url = f"redis://{site.address}:{port}/0"
        server = Server(directory / "log", url, issuer, network.site("server"), **AMPLE)
        stack.push_async_callback(asyncio.to_thread, server.stop)
        await server.start()
        fleet = Fleet(history, issuer, [server.url])
        yield Theatre(server, valkey, NOWHERE, NOWHERE, NOWHERE, fleet, history), network
        assert server.untidy(await asyncio.to_thread(server.stop)) == []


@pytest_asyncio.fixture(loop_scope="module")
async def stage(house: tuple[Theatre, Network]) -> AsyncIterator[Theatre]:
    """With clients and a history of one's own."""
    history = History()
    fleet = Fleet(history, house[0].fleet.issuer, house[0].fleet.urls)
    yield house[0]._replace(fleet=fleet, history=history)
    house[1].heal()
    await fleet.stop()


@pytest.fixture
def network(house: tuple[Theatre, Network]) -> Network:
    return house[1]


@pytest.mark.parametrize(
    ("cut", "seconds"),
    [
        # Longer than three seconds, and nobody is served any more.
        (lambda network: network.drop("server", "store"), 3.5),
        (lambda network: network.drop("store", "server"), 1.5),
        (lambda network: network.reject("server", "store"), 1.0),
        (lambda network: network.blackhole("server", "store"), 1.0),
    ],
    ids=["to the store", "from the store", "refused", "no way"],
)
async def test_workers_cut_off_from_the_store_say_so_and_catch_up_on_the_same_sockets(
    stage: Theatre, network: Network, cut: Cut, seconds: float
) -> None:
    await join_two_rooms(stage.fleet)
    others = Fleet(History(), stage.fleet.issuer, stage.fleet.urls)
    asking = others.enlist(unique("asking"), [], {"elsewhere": "rw"})
    assert isinstance(asking, Client)
    await others.ready(PATIENCE)
    publishing = stage.fleet.publish(60)
    assert await more_are_acked(stage, 10)
    refused: list[float] = []
    cut(network)
    async with Nemesis(stage).window("store_cut_off"), asyncio.timeout(seconds + PATIENCE):
        others.enlist(unique("newcomer"), [], {})
        over = time.monotonic() + seconds
        while time.monotonic() < over or len(refused) < 2 or not others.counts[TURNED_AWAY]:
            with Stopwatch() as watch:
                answer = await asking.ask("send", room="elsewhere", body="?")
            if answer["type"] == "error":
                assert answer["code"] == "unavailable"
                refused.append(watch.seconds)
            await asyncio.sleep(0.1)
    network.heal()
    assert await more_are_acked(stage, 10)
    await conclude(stage, stage.valkey, publishing)
    await others.stop()

    assert statistics.median_low(refused) < ANSWER_SECONDS
    assert max(refused) < LATE_SECONDS
    assert [r.code for r in stage.history if isinstance(r, Closed) and r.code != 1000] == []


async def test_over_a_lossy_and_slow_link_everything_arrives_once_and_in_order(
    stage: Theatre, network: Network
) -> None:
    await join_two_rooms(stage.fleet)
    publishing = stage.fleet.publish(60)
    network.lose(HERE, "server", 0.1)
    network.lose("server", HERE, 0.1)
    network.narrow(HERE, "500kbit")
    async with Nemesis(stage).window("links_slow", members=[*stage.fleet.clients]):
        await asyncio.sleep(3)
    network.heal()
    report = await conclude(stage, stage.valkey, publishing)

    assert report.not_recovered == 0


# --- a primary, its replica, and a server beside each ----------------------------------------


@asynccontextmanager
async def two_sites(**settings: object) -> AsyncIterator[tuple[Failover, Theatre, Network]]:
    """The primary and a server on one host; replica, sentinels and a server on another."""
    history, issuer = History(), Issuer()
    async with hosts("old", "new") as (stack, directory, network):
        old, new = network.site("old"), network.site("new")
        failover = Failover(directory, old, new, new)
        stack.push_async_callback(asyncio.to_thread, failover.stop)
        await asyncio.to_thread(failover.start)
        settings = AMPLE | {"workers": 1} | settings
        servers = [
            Server(directory / f"{n}.log", failover.url, issuer, site, **settings)
            for n, site in enumerate((old, new))
        ]
        for server in servers:
            stack.push_async_callback(asyncio.to_thread, server.stop)
        await asyncio.gather(*(server.start() for server in servers))
        fleet = Fleet(history, issuer, [server.url for server in servers])
        stack.push_async_callback(fleet.stop)
        store = failover.stores[0]
        yield (
            failover,
            Theatre(servers[0], store, NOWHERE, NOWHERE, NOWHERE, fleet, history),
            network,
        )
        for server in servers:
            assert server.untidy(await asyncio.to_thread(server.stop)) == []


async def split(
    failover: Failover, stage: Theatre, network: Network, cut: Cut, *, more: int
) -> Report:
    """Cut them off from each other until the sentinels have promoted the replica and both sides
    have written so many more messages."""
    primary, replica = failover.stores
    rooms = await join_two_rooms(stage.fleet)

    def written(store: Valkey) -> int:
        return sum(int(store.command("XLEN", f"chat:room:{{{room}}}:log")[1:]) for room in rooms)

    publishing = stage.fleet.publish(60)
    assert await more_are_acked(stage, 10)
    before = written(primary)
    cut(network)
    async with Nemesis(stage).window("failover"):
        promoted = failover.ports[1]
        assert await until(lambda: failover.sentinels.agree_on(promoted), 2 * PATIENCE)
        then = written(replica)
        assert await until(lambda: written(primary) >= before + more, PATIENCE)
        assert await until(lambda: written(replica) >= then + more, PATIENCE)
        network.heal()
        # A replica at once; the sentinels would take their eight seconds.
        failover.follow(0, 1)
        assert await more_are_acked(stage, 20)
    return await conclude(stage, replica, publishing)


def gone(history: History) -> set[str]:
    """Keys that were acked, and are not in the log in the end."""
    return acked(history) - {r.key for r in history if isinstance(r, Logged)}


async def test_in_a_split_with_durability_primary_all_that_it_hurts_are_told() -> None:
    """Workers beside the old primary go on with it: what it acks meanwhile is gone."""
    async with two_sites() as (failover, stage, network):
        report = await split(failover, stage, network, lambda net: net.cut("old", "new"), more=20)

    assert gone(stage.history)
    assert report.resets + report.not_recovered > 0


async def test_in_a_split_with_durability_replica_nothing_that_was_acked_is_gone() -> None:
    """In one direction alone, so that the replica goes on to get what is not acked. Of that there
    is little, for senders wait for their acks."""
    async with two_sites(durability="replica") as (failover, stage, network):
        await split(failover, stage, network, lambda net: net.drop("new", "old"), more=3)

    assert gone(stage.history) == set()

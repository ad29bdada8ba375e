"""Each fault by itself, on a server under load: what every promise means while it lasts.

Everything is said by the checker, which reads the whole history of each test; the tests add what
only their fault is about.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import statistics
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import pytest_asyncio

from tests.conftest import AMPLE
from tests.faults.checker import Report, check
from tests.faults.clients import ANSWER_SECONDS, LATE_SECONDS, Client
from tests.faults.fleet import Fleet
from tests.faults.history import Closed, History, Joined, Reset, Sent
from tests.faults.nemesis import Nemesis, Theatre
from tests.faults.run import dirty_fleet, heal, read_logs, theatre
from tests.faults.server import until
from tests.support.proxy import Weather
from tests.support.stopwatch import Stopwatch
from tests.support.tokens import unique
from tests.support.worker import PATIENCE

pytestmark = pytest.mark.asyncio(loop_scope="module")

KILLS = int(os.environ.get("FAULTS_KILLS", "3"))
"""Twenty by hand."""
LAST_SECONDS = 5.0
"""A third of the round of comparisons; it takes a tenth of a second on a free machine."""
DICE = random.Random(7)
"""Only which worker or link it hits."""


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def house() -> AsyncIterator[Theatre]:
    """One server for all that do not kill it."""
    async with theatre({**AMPLE, "slow_seconds": 1}) as stage:
        yield stage
        exit_code = await asyncio.to_thread(stage.server.stop)
        assert stage.server.untidy(exit_code) == []


@pytest_asyncio.fixture(loop_scope="module")
async def stage(house: Theatre) -> AsyncIterator[Theatre]:
    """The same with rooms, clients and a history of one's own."""
    async with _own(house) as mine:
        yield mine


@asynccontextmanager
async def _own(house: Theatre, urls: list[str] | None = None) -> AsyncIterator[Theatre]:
    history = History()
    fleet = Fleet(history, house.fleet.issuer, urls or house.fleet.urls)
    try:
        yield house._replace(fleet=fleet, history=history)
    finally:
        await fleet.stop()


async def gather(stage: Theatre, members: int = 8, **options: object) -> list[str]:
    """Members in two rooms, who all may write; returns when they are in."""
    rooms = [unique("room") for _ in range(2)]
    for n in range(members):
        name = f"{unique('member')}-{n}"
        stage.fleet.enlist(name, rooms, dict.fromkeys(rooms, "rw"), **options)
    await stage.fleet.ready(2 * PATIENCE)
    return rooms


async def conclude(stage: Theatre, *publishing: asyncio.Task[None]) -> Report:
    """Everybody catches up, and nothing is found."""
    await heal(stage, publishing)
    await stage.fleet.stop()
    await asyncio.to_thread(read_logs, stage.valkey, stage.fleet)
    assert check(stage.history) == []
    assert [client.strange for client in stage.fleet.clients.values() if client.strange] == []
    report = Report.of(stage.history)
    assert report.outcomes["ok"] > 0
    return report


def acked(stage: Theatre) -> int:
    return sum(isinstance(r, Sent) and r.outcome == "ok" for r in stage.history)


def stored(stage: Theatre) -> int:
    """Messages in the logs; of none of these rooms is the log full yet."""
    rooms = {room for client in stage.fleet.clients.values() for room in client.rooms}
    lengths = [stage.valkey.command("XLEN", f"chat:room:{{{room}}}:log") for room in rooms]
    return sum(int(length[1:]) for length in lengths)


def closes(stage: Theatre) -> list[int]:
    """Codes of connections that ended before the run did."""
    return [r.code for r in stage.history if isinstance(r, Closed) and r.code != 1000]


# --- the store -------------------------------------------------------------------------------


async def test_a_frozen_store_is_unavailable_within_a_second_and_nobody_reconnects(
    stage: Theatre,
) -> None:
    await gather(stage)
    publishing = stage.fleet.publish(30)
    async with _own(stage) as asking:
        [room, _] = await gather(asking, 1)
        [client] = asking.fleet.clients.values()
        assert isinstance(client, Client)
        freezing = asyncio.create_task(Nemesis(stage).freeze_store(3.0, DICE))
        answers = []
        while not freezing.done():
            with Stopwatch() as watch:
                answer = await client.ask("send", room=room, body="?", key=unique("key"))
            answers.append((answer.get("code"), watch.seconds))
            await asyncio.sleep(0.1)
        await freezing
    report = await conclude(stage, publishing)

    refused = [(code, seconds) for code, seconds in answers if code is not None]
    assert {code for code, _ in refused} == {"unavailable"}
    assert statistics.median_low(seconds for _, seconds in refused) < ANSWER_SECONDS
    assert max(seconds for _, seconds in answers) < LATE_SECONDS
    assert len(refused) >= 2
    assert closes(stage) == []
    assert report.connections == len(stage.fleet.clients)


async def test_a_store_that_is_killed_and_comes_back_has_everything(stage: Theatre) -> None:
    await gather(stage)
    publishing = stage.fleet.publish(60)
    await asyncio.sleep(0.5)
    await Nemesis(stage).kill_store(0.7, DICE)
    report = await conclude(stage, publishing)

    assert closes(stage) == []
    assert report.resets == report.not_recovered == 0


async def test_a_store_that_is_full_says_so_and_loses_nobody(stage: Theatre) -> None:
    await gather(stage)
    publishing = stage.fleet.publish(30)
    await Nemesis(stage).fill_store(1.0, DICE)
    await conclude(stage, publishing)

    assert closes(stage) == []


async def test_a_store_that_is_emptied_resets_everybody(stage: Theatre) -> None:
    """What was acked is gone; that cannot be helped, but everyone is told."""
    rooms = await gather(stage)
    publishing = stage.fleet.publish(60)
    await asyncio.sleep(0.5)
    await Nemesis(stage).empty_store(0, DICE)
    await conclude(stage, publishing)

    told = {
        (record.member, record.room)
        for record in stage.history
        if isinstance(record, Reset) or (isinstance(record, Joined) and record.recovered is False)
    }
    assert told == {(name, room) for name in stage.fleet.clients for room in rooms}


async def test_a_store_whose_file_was_cut_off_tells_those_who_had_seen_more(
    stage: Theatre,
) -> None:
    """Again and again, for what is left of a command at the end of such a file is there still when
    it is loaded the next time."""
    await gather(stage)
    publishing = stage.fleet.publish(60)
    for _ in range(5):
        before = acked(stage)
        assert await until(lambda before=before: acked(stage) > before + 10, PATIENCE)  # type: ignore[misc]
        await Nemesis(stage).cut_store_off(0, DICE)
    report = await conclude(stage, publishing)

    assert closes(stage) == []
    assert report.epochs > 0
    assert report.resets > 0


async def test_pubsub_that_is_killed_every_half_second_loses_nothing(stage: Theatre) -> None:
    await gather(stage)
    publishing = stage.fleet.publish(60)
    await Nemesis(stage).kill_pubsub(2.0, DICE)
    await conclude(stage, publishing)

    assert closes(stage) == []


async def test_what_is_said_last_comes_though_pubsub_was_killed_in_that_moment(
    stage: Theatre,
) -> None:
    """Nothing later gives away that it is missing, and the round in which positions are compared
    is not waited for."""
    rooms = await gather(stage)
    senders = [*stage.fleet.clients.values()]
    for _ in range(8):
        for room in rooms:
            DICE.choice(senders).publish([room])
        await Nemesis(stage).command("CLIENT", "KILL", "TYPE", "pubsub")
        for room in rooms:
            DICE.choice(senders).publish([room])
        await stage.fleet.settle(PATIENCE)
        finals = await stage.fleet.finals(PATIENCE)
        assert await stage.fleet.catch_up(finals, LAST_SECONDS) == []
    await conclude(stage)


async def test_pubsub_that_is_cut_off_for_its_buffer_loses_nothing(stage: Theatre) -> None:
    rooms = await gather(stage)
    before = _killed_for_output(stage)
    publishing = stage.fleet.publish(60)
    overrunning = asyncio.create_task(Nemesis(stage).overrun_pubsub(2.0, DICE))
    while not overrunning.done():
        # Longer than the 16 KiB that each of the store's clients has anyway.
        DICE.choice([*stage.fleet.clients.values()]).publish(rooms[:1], padding=20_000)
        await asyncio.sleep(0.1)
    await overrunning
    await conclude(stage, publishing)

    assert _killed_for_output(stage) > before
    assert closes(stage) == []


def _killed_for_output(stage: Theatre) -> int:
    """Not from INFO, which tells it from Redis 7.4 and Valkey 8 on."""
    return (stage.valkey.directory / "log").read_text().count("overcoming of output buffer limits")


async def test_connections_to_the_store_that_are_reset_store_nothing_twice(
    stage: Theatre,
) -> None:
    """Amid publishes: answers are lost, and what is repeated has been stored already."""
    await gather(stage)
    publishing = stage.fleet.publish(100)
    for _ in range(3):
        await unacked(stage)
        stage.store_link.reset()
        stage.store_link.calm()
        await Nemesis(stage).reset_store_links(0.3, DICE)
    report = await conclude(stage, publishing)

    assert report.duplicates > 0


async def unacked(stage: Theatre) -> None:
    """Several sends have reached the store, and their answers have not reached a worker."""
    stage.store_link.down.delay = 0.2
    assert await until(lambda: _busy(stage) > 3 and stored(stage) > acked(stage) + 3, PATIENCE)


# --- links and readers -----------------------------------------------------------------------


async def test_readers_that_stop_are_sent_away_and_recover(house: Theatre) -> None:
    async with _own(house, [house.server.url]) as stage:
        rooms = await gather(stage, receive_buffer=4096)
        slow = [*stage.fleet.clients.values()][:3]
        others = [*stage.fleet.clients.values()][3:]
        paused = asyncio.gather(*(client.pause(3.0) for client in slow))
        while not paused.done():
            for client in others:
                client.publish(rooms[:1], padding=6000)
            await asyncio.sleep(0.05)
        await paused
        report = await conclude(stage)

    assert report.closes.get(4430, 0) > 0
    assert report.not_recovered == 0


async def test_links_that_break_at_the_worst_moment_cost_a_reconnect(stage: Theatre) -> None:
    await gather(stage, 12)
    publishing = stage.fleet.publish(60)
    nemesis = Nemesis(stage)
    for fault in (nemesis.end_links, nemesis.reset_links, nemesis.freeze_links):
        await fault(1.0, DICE)
    report = await conclude(stage, publishing)

    assert report.recovered > 0
    assert report.not_recovered == 0


async def test_flipped_bits_on_one_link_harm_nobody_else(stage: Theatre) -> None:
    """To the server a flipped bit is a client that talks nonsense; to the client, the opposite."""
    dirty = dirty_fleet(stage, unique("dirty"))
    try:
        await gather(stage)
        publishing = [stage.fleet.publish(30), dirty.publish(30)]
        await dirty.ready(2 * PATIENCE)
        stage.dirty_link.up.flip = stage.dirty_link.down.flip = 0.2
        assert await until(lambda: stage.dirty_link.flipped > 50, 4 * PATIENCE)
        stage.dirty_link.calm()
        await conclude(stage, *publishing)
    finally:
        stage.dirty_link.calm()
        await dirty.stop()

    assert closes(stage) == []


# --- workers ---------------------------------------------------------------------------------


async def test_a_worker_that_was_stopped_goes_on_where_it_was(stage: Theatre) -> None:
    """Longer than it may believe in what it knows of revocations."""
    await gather(stage, 12)
    publishing = stage.fleet.publish(60)
    nemesis = Nemesis(stage)
    stopping = asyncio.create_task(nemesis.stop_worker(3.5, DICE))
    await asyncio.sleep(0.2)
    revoked = [client.session for client in stage.fleet.clients.values()][:4]
    await asyncio.gather(*(nemesis.revoke(session) for session in revoked))
    await stopping
    await conclude(stage, publishing)


async def test_workers_that_are_killed_amid_publishes_lose_nothing(house: Theatre) -> None:
    """The store's answers are slow, so that some have been stored and not been acked."""
    async with _own(house) as stage:
        await gather(stage, 12)
        publishing = stage.fleet.publish(100)
        for kill in range(KILLS):
            slot = kill % 2
            pid = stage.server.worker(slot)
            assert pid is not None
            await unacked(stage)
            os.kill(pid, signal.SIGKILL)
            stage.store_link.calm()
            await stage.server.replaced(slot, pid)
        report = await conclude(stage, publishing)

    assert report.duplicates > 0
    assert report.not_recovered == 0


def _busy(stage: Theatre) -> int:
    """Clients that wait for an ack."""
    return sum(c.connected and not c.settled for c in stage.fleet.clients.values())


# --- nothing to believe in -------------------------------------------------------------------


async def test_flipped_bits_between_worker_and_store_crash_nothing() -> None:
    """On a plain link the store's bytes are believed, as TCP's checksum gives them; ``rediss://``
    is for links that lie. So what was said meanwhile may be wrong. But the server lives, it says
    no secret, and rooms that begin afterwards keep every promise."""
    async with theatre(AMPLE) as house:
        dirty = dirty_fleet(house, unique("dirty"), house.fleet.urls[0])
        try:
            publishing = dirty.publish(60)
            await dirty.ready(2 * PATIENCE)
            flips = Weather(flip=0.02)
            house.store_link.up = house.store_link.down = flips
            house.store_link.reset()
            # Some two a second: whoever has heard nonsense connects anew, and says little then.
            assert await until(lambda: house.store_link.flipped > 20, 4 * PATIENCE)
            house.store_link.calm()
            house.store_link.reset()
            publishing.cancel()
        finally:
            await dirty.stop()
        async with _own(house) as stage:
            await gather(stage)
            await conclude(stage, stage.fleet.publish(30))
        exit_code = await asyncio.to_thread(house.server.stop)
        assert house.server.untidy(exit_code) == []

"""Lanes and subscriptions against a real store, and against one that freezes, dies, forgets."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from typing import Any

import pytest
import uvloop
from hypothesis import given
from hypothesis import strategies as st
from redis.asyncio.connection import Connection as RedisConnection

from chatserver.core.effects import Publish
from chatserver.core.errors import StoreUnavailable
from chatserver.store import link
from chatserver.store.link import READ, Lane, Store, Subscription, understood
from chatserver.store.log import RoomLog, channel
from chatserver.store.topology import Argument, packed
from tests.support.proxy import Proxy
from tests.support.tokens import unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, end, eventually

UNAVAILABLE_WITHIN = 3.0
"""The protocol promises a second; a loaded machine gets three."""


class Running:
    """Starts lanes and subscriptions, and ends them."""

    def __init__(self) -> None:
        self.tasks: list[asyncio.Task[None]] = []

    def lane(self, url: str, batch: int = 256) -> Lane:
        lane = Store(url).lane(batch)
        self.tasks.append(asyncio.create_task(lane.run()))
        return lane

    def subscription(self, url: str) -> Heard:
        heard = Heard()
        heard.subscription = Store(url).subscription(
            lambda name, payload: heard.messages.append((name, payload)), heard.confirmed.append
        )
        self.tasks.append(asyncio.create_task(heard.subscription.run()))
        return heard


class Heard:
    def __init__(self) -> None:
        self.subscription: Subscription
        self.messages: list[tuple[str, bytes]] = []
        self.confirmed: list[str] = []


ARGUMENTS = st.one_of(
    st.binary(max_size=1100),
    st.text(st.characters(exclude_categories=["Cs"])),
    st.integers(),
    st.floats(),
)


@given(st.lists(st.lists(ARGUMENTS, max_size=20), min_size=1, max_size=5))
def test_commands_are_packed_as_redis_py_packs_them(many: list[list[Argument]]) -> None:
    commands = [["EVALSHA", *arguments] for arguments in many]
    theirs = RedisConnection().pack_commands(commands)
    assert packed(commands) == b"".join(theirs)


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    started = Running()
    yield started
    # None of them may have ended by itself.
    ended = [task for task in started.tasks if task.done()]
    await end(started.tasks)
    assert not ended, ended


def submitted(lane: Lane, *words: Any) -> asyncio.Future[Any]:
    """As ``Lane.call``, queued now; a refusal is a result."""
    future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
    lane.submit(list(words), future.set_result)
    return future


async def answers(lane: Lane) -> bool:
    try:
        return bool(await lane.call(["PING"]) == b"PONG")
    except StoreUnavailable:
        return False


async def until_it_answers(lane: Lane) -> None:
    async with asyncio.timeout(PATIENCE):
        while not await answers(lane):
            await asyncio.sleep(0.02)


# --- lanes ---------------------------------------------------------------------------------


async def test_a_lane_answers_each_command_with_its_own_reply(
    running: Running, valkey: Valkey
) -> None:
    lane = running.lane(valkey.url)

    replies = await asyncio.gather(*[lane.call(["ECHO", str(n)]) for n in range(1000)])

    assert replies == [b"%d" % n for n in range(1000)]


async def test_commands_go_out_in_the_order_submitted(running: Running, valkey: Valkey) -> None:
    lane = running.lane(valkey.url, batch=7)
    name = unique("list")

    for n in range(100):
        lane.submit(["RPUSH", name, n], lambda reply: None)
    stored = await lane.call(["LRANGE", name, 0, -1])

    assert stored == [b"%d" % n for n in range(100)]


async def test_many_commands_become_few_round_trips(running: Running, own_valkey: Valkey) -> None:
    """Of a thousand submitted at once, a pipeline takes as many as fit: each is one read there."""
    lane = running.lane(own_valkey.url, batch=100)
    await lane.call(["PING"])

    def reads_of_the_store() -> int:
        info = own_valkey.command("INFO", "stats").decode()
        return int(info.split("total_reads_processed:")[1].split()[0])

    before = reads_of_the_store()
    await asyncio.gather(*[lane.call(["PING"]) for _ in range(1000)])
    reads = reads_of_the_store() - before

    assert reads <= 40, reads


async def test_an_error_of_the_store_fails_its_command_and_no_other(
    running: Running, valkey: Valkey
) -> None:
    lane = running.lane(valkey.url)
    name = unique("text")

    first, wrong, last = (
        submitted(lane, "SET", name, "x"),
        submitted(lane, "LPUSH", name, "y"),
        submitted(lane, "GET", name),
    )

    assert await first == b"OK"
    assert isinstance(await wrong, StoreUnavailable)
    assert await last == b"x"


async def test_an_unwanted_command_is_dropped_without_an_answer(
    running: Running, valkey: Valkey
) -> None:
    lane = running.lane(valkey.url)
    name = unique("set")
    answered: list[int] = []

    for n in range(10):
        lane.submit(
            ["SADD", name, n],
            lambda reply, n=n: answered.append(n),  # type: ignore[misc]
            wanted=lambda n=n: n % 2 == 0,  # type: ignore[misc]
        )
    members = await lane.call(["SMEMBERS", name])

    assert sorted(members) == [b"0", b"2", b"4", b"6", b"8"]
    assert answered == [0, 2, 4, 6, 8]


def unexpected(reply: object) -> None:
    pytest.fail(f"a reply to an unwanted command: {reply!r}")


async def test_a_queue_of_unwanted_commands_does_not_hold_up_the_next(
    running: Running, valkey: Valkey
) -> None:
    lane = running.lane(valkey.url, batch=4)

    for _ in range(50):
        lane.submit(["PING"], unexpected, wanted=lambda: False)

    assert await lane.call(["ECHO", "x"]) == b"x"


@pytest.mark.usefixtures("prompt")
async def test_a_frozen_store_is_unavailable_soon_and_the_lane_recovers(
    running: Running, own_valkey: Valkey
) -> None:
    lane = running.lane(own_valkey.url)
    await lane.call(["PING"])

    own_valkey.freeze()
    asked = time.monotonic()
    first = submitted(lane, "INCR", "n")
    # Under way when the first fails, so that it waits for two deadlines.
    await eventually(lambda: not lane._queue)
    second = submitted(lane, "INCR", "n")
    outcomes = await asyncio.gather(first, second)
    took = time.monotonic() - asked
    own_valkey.thaw()
    await until_it_answers(lane)

    assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes)
    assert took < UNAVAILABLE_WITHIN


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_process_that_stood_still_does_not_take_it_for_the_stores_silence(
    own_valkey: Valkey,
    run: Callable[[Coroutine[Any, Any, None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The store may have stood still as well: its answer comes soon after."""

    async def main() -> None:
        running = Running()
        lane = running.lane(own_valkey.url)
        try:
            await lane.call(["PING"])
            monkeypatch.setattr(link, "ROUND_TRIP_SECONDS", 1.0)
            asked = submitted(lane, "DEBUG", "SLEEP", 1.5)
            while lane._queue:
                await asyncio.sleep(0)
            time.sleep(1.1)  # noqa: ASYNC251  As if it was not running.
            assert await asked == b"OK"
        finally:
            await end(running.tasks)

    run(main())


async def test_a_process_that_stood_still_while_it_connected_does_not_call_the_store_away(
    running: Running, valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(link, "ROUND_TRIP_SECONDS", 1.0)
    lanes: list[Lane] = []
    asked: list[asyncio.Future[Any]] = []
    # Whatever a connection is made of, one of them is at it.
    for _ in range(12):
        lanes.append(running.lane(valkey.url))
        asked.append(submitted(lanes[-1], "PING"))
        await asyncio.sleep(0)
    time.sleep(1.1)  # noqa: ASYNC251

    assert await asyncio.gather(*asked) == [b"PONG"] * 12


async def test_while_the_store_is_away_commands_are_refused_at_once(
    running: Running, own_valkey: Valkey
) -> None:
    lane = running.lane(own_valkey.url)
    await lane.call(["PING"])

    own_valkey.kill()
    await asyncio.gather(*[submitted(lane, "PING") for _ in range(3)])
    await eventually(lambda: lane._down)
    refused = [submitted(lane, "PING") for _ in range(100)]
    await asyncio.sleep(0)
    at_once = [future.done() for future in refused]
    own_valkey.start()
    await until_it_answers(lane)

    assert all(at_once)
    assert all(isinstance(future.result(), StoreUnavailable) for future in refused)


async def test_a_killed_connection_fails_what_was_under_way_and_no_more(
    running: Running, own_valkey: Valkey
) -> None:
    lane = running.lane(own_valkey.url)
    own = await lane.call(["CLIENT", "ID"])

    assert own_valkey.command("CLIENT", "KILL", "ID", str(own)) == b":1"
    await until_it_answers(lane)

    assert await lane.call(["CLIENT", "ID"]) != own


async def test_nothing_is_ever_carried_out_twice(running: Running, own_valkey: Valkey) -> None:
    """Whatever is answered happened once; what is not may have, at most once."""
    lane = running.lane(own_valkey.url, batch=8)
    outcomes: list[Any] = []

    for round in range(20):
        asked = [submitted(lane, "INCR", "n") for _ in range(50)]
        if round % 3 == 0:
            own_valkey.command("CLIENT", "KILL", "TYPE", "normal", "SKIPME", "yes")
        outcomes += await asyncio.gather(*asked)
        await until_it_answers(lane)
    counted = int(await lane.call(["GET", "n"]))
    done = [outcome for outcome in outcomes if not isinstance(outcome, StoreUnavailable)]

    assert len(set(done)) == len(done)
    assert done == sorted(done)
    assert len(done) <= counted <= len(outcomes)
    assert len(done) >= 500


async def test_a_store_at_some_distance_can_be_connected_to(
    running: Running, valkey: Valkey
) -> None:
    """At 100 ms a round trip each, eight scripts were never loaded within the deadline."""
    proxy = Proxy(valkey.socket)
    await proxy.start()
    try:
        proxy.down.delay = 0.1
        lane = running.lane(f"redis://127.0.0.1:{proxy.port}")
        await until_it_answers(lane)
    finally:
        await proxy.close()


async def test_flushed_scripts_are_loaded_again(running: Running, own_valkey: Valkey) -> None:
    lane = running.lane(own_valkey.url)
    command = READ.command(["m", "l"], ["epoch", 300, 600, "", "", "", 10, 10, 1000, 0])
    await lane.call(command)

    own_valkey.command("SCRIPT", "FLUSH")
    failed, queued = await asyncio.gather(submitted(lane, *command), submitted(lane, *command))
    reply = await lane.call(command)

    assert isinstance(failed, StoreUnavailable)
    assert isinstance(queued, StoreUnavailable)
    assert reply[0] == b"epoch"


async def test_a_lane_started_before_its_store_finds_it(
    running: Running, own_valkey: Valkey
) -> None:
    own_valkey.kill()
    lane = running.lane(own_valkey.url)
    refused = await submitted(lane, "PING")
    own_valkey.start()
    await until_it_answers(lane)

    assert isinstance(refused, StoreUnavailable)


async def test_a_lane_that_ends_answers_what_is_queued(own_valkey: Valkey) -> None:
    lane = Store(own_valkey.url).lane(batch=1)
    task = asyncio.create_task(lane.run())
    await lane.call(["PING"])
    own_valkey.freeze()
    lane.submit(["PING"], lambda reply: None)
    await eventually(lambda: not lane._queue)
    queued = submitted(lane, "PING")

    task.cancel()
    await asyncio.gather(task, return_exceptions=True)

    assert isinstance(await queued, StoreUnavailable)


async def test_a_store_opened_for_a_command_line_describes_itself(valkey: Valkey) -> None:
    async with Store(valkey.url) as store:
        assert await store.call(["ECHO", "x"]) == b"x"
        described = await store.describe()

    assert described["policy"] == "noeviction"
    assert described["version"][0].isdigit()


async def test_a_store_that_is_not_there_is_unavailable_at_once(own_valkey: Valkey) -> None:
    own_valkey.kill()

    with pytest.raises(StoreUnavailable):
        async with Store(own_valkey.url):
            pytest.fail("it is not there")


# --- subscriptions -------------------------------------------------------------------------


async def test_a_channel_is_confirmed_before_anything_is_missed(
    running: Running, valkey: Valkey
) -> None:
    heard = running.subscription(valkey.url)
    name = unique("channel")

    heard.subscription.subscribe(name)
    await eventually(lambda: heard.confirmed == [name])
    valkey.command("PUBLISH", name, b"a \xff b")
    await eventually(lambda: heard.messages)

    assert heard.messages == [(name, b"a \xff b")]


async def test_an_unsubscribed_channel_is_silent(running: Running, valkey: Valkey) -> None:
    heard = running.subscription(valkey.url)
    left, kept = unique("left"), unique("kept")
    heard.subscription.subscribe(left)
    heard.subscription.subscribe(kept)
    await eventually(lambda: sorted(heard.confirmed) == sorted([left, kept]))

    heard.subscription.unsubscribe(left)
    await eventually(lambda: valkey.command("PUBLISH", left, "x") == b":0")
    heard.messages.clear()
    valkey.command("PUBLISH", kept, "y")
    await eventually(lambda: heard.messages)

    assert heard.messages == [(kept, b"y")]


async def test_channels_are_subscribed_and_confirmed_again_after_the_connection_is_killed(
    running: Running, own_valkey: Valkey
) -> None:
    heard = running.subscription(own_valkey.url)
    for name in "ab":
        heard.subscription.subscribe(name)
    await eventually(lambda: len(heard.confirmed) == 2)

    for round in range(2, 5):
        own_valkey.command("CLIENT", "KILL", "TYPE", "pubsub")
        await eventually(lambda round=round: len(heard.confirmed) == 2 * round)  # type: ignore[misc]
    own_valkey.command("PUBLISH", "b", "still here")
    await eventually(lambda: heard.messages)

    assert sorted(heard.confirmed) == ["a"] * 4 + ["b"] * 4
    assert heard.messages == [("b", b"still here")]
    # With a cancellation left over, Python 3.11.2 would take its next timeout for the end.
    assert running.tasks[0].cancelling() == 0


async def test_a_store_that_was_restarted_is_listened_to_again(
    running: Running, own_valkey: Valkey
) -> None:
    heard = running.subscription(own_valkey.url)
    heard.subscription.subscribe("a")
    await eventually(lambda: heard.confirmed)

    own_valkey.restart()
    await eventually(lambda: len(heard.confirmed) == 2)


async def test_a_channel_left_and_taken_up_again_in_one_go_is_heard(
    running: Running, valkey: Valkey
) -> None:
    heard = running.subscription(valkey.url)
    name = unique("channel")

    heard.subscription.subscribe(name)
    heard.subscription.unsubscribe(name)
    heard.subscription.subscribe(name)
    await eventually(lambda: heard.confirmed)
    valkey.command("PUBLISH", name, "x")
    await eventually(lambda: heard.messages)

    assert heard.confirmed == [name]


async def test_a_channel_left_and_taken_up_again_on_the_wire_is_heard(
    running: Running, valkey: Valkey
) -> None:
    """Each step is sent for itself: a confirmation counts only when nothing is to follow it."""
    heard = running.subscription(valkey.url)
    name = unique("channel")

    for _ in range(20):
        heard.subscription.subscribe(name)
        await eventually(lambda: not heard.subscription._unsent)
        heard.subscription.unsubscribe(name)
        await eventually(lambda: not heard.subscription._unsent)
    heard.subscription.subscribe(name)
    before = len(heard.confirmed)
    await eventually(lambda: len(heard.confirmed) > before)
    valkey.command("PUBLISH", name, "x")
    await eventually(lambda: heard.messages)


async def test_a_channel_left_before_it_was_confirmed_is_not_confirmed(
    running: Running, valkey: Valkey
) -> None:
    heard = running.subscription(valkey.url)
    left, kept = unique("left"), unique("kept")

    heard.subscription.subscribe(left)
    heard.subscription.unsubscribe(left)
    heard.subscription.subscribe(kept)
    await eventually(lambda: heard.confirmed)

    assert heard.confirmed == [kept]


async def test_a_burst_of_messages_is_heard_whole_and_in_order(
    running: Running, valkey: Valkey
) -> None:
    heard = running.subscription(valkey.url)
    lane = running.lane(valkey.url)
    name = unique("channel")
    heard.subscription.subscribe(name)
    await eventually(lambda: heard.confirmed)

    for n in range(3000):
        lane.submit(["PUBLISH", name, n], lambda reply: None)
    await eventually(lambda: len(heard.messages) >= 3000)

    assert [int(payload) for _, payload in heard.messages] == list(range(3000))


async def test_a_subscription_that_hears_nothing_any_more_connects_anew(
    running: Running, own_valkey: Valkey
) -> None:
    """Also while it has something to write again and again: writing to the deaf succeeds."""
    heard = running.subscription(own_valkey.url)
    heard.subscription.subscribe("a")
    await eventually(lambda: heard.confirmed)
    first = heard.subscription._connection._reader

    own_valkey.freeze()
    loop = asyncio.get_running_loop()
    busy_at = loop.time()

    def given_up() -> bool:
        nonlocal busy_at
        if loop.time() > busy_at:
            busy_at = loop.time() + 0.2
            heard.subscription.subscribe("busy")
        return heard.subscription._connection._reader is not first

    await eventually(given_up)
    own_valkey.thaw()
    await eventually(lambda: heard.confirmed.count("a") == 2)


@pytest.mark.parametrize("run", [asyncio.run, uvloop.run])
def test_a_subscription_that_stood_still_does_not_take_it_for_the_stores_silence(
    valkey: Valkey,
    run: Callable[[Coroutine[Any, Any, None]], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What was said meanwhile is there to be read; connected anew, it would be lost."""
    monkeypatch.setattr(link, "PING_SECONDS", 0.1)

    async def main() -> None:
        running = Running()
        heard, name = running.subscription(valkey.url), unique("channel")
        try:
            heard.subscription.subscribe(name)
            await eventually(lambda: heard.confirmed)
            for said in range(1, 4):
                valkey.command("PUBLISH", name, "said meanwhile")
                time.sleep(0.5)  # noqa: ASYNC251  As if it was not running.
                await eventually(lambda: len(heard.messages) == said)  # noqa: B023
            assert heard.confirmed == [name]
        finally:
            await end(running.tasks)

    run(main())


# --- bytes that change on the way ----------------------------------------------------------


async def test_replies_that_make_no_sense_are_unavailable_and_the_lane_connects_anew(
    running: Running, valkey: Valkey
) -> None:
    lane = running.lane(valkey.url)
    outcomes: list[object] = []

    def number(reply: Any) -> int:
        return int(reply)

    before = await lane.call(["CLIENT", "ID"])
    lane.submit(["ECHO", "7"], understood(number, outcomes.append))
    lane.submit(["ECHO", "x"], understood(number, outcomes.append))
    lane.submit(["ECHO", "8"], understood(number, outcomes.append))
    await eventually(lambda: len(outcomes) == 3)

    assert outcomes[0] == 7
    assert all(isinstance(outcome, StoreUnavailable) for outcome in outcomes[1:])
    await until_it_answers(lane)
    assert await lane.call(["CLIENT", "ID"]) != before


@pytest.mark.usefixtures("prompt")
@pytest.mark.parametrize("seed", range(3))
async def test_flipped_bits_end_no_lane_and_no_subscription(
    running: Running, valkey: Valkey, seed: int
) -> None:
    """Between worker and store, in both directions; each ended a worker."""
    proxy = Proxy(valkey.socket, seed=seed)
    await proxy.start()
    try:
        url = f"redis://127.0.0.1:{proxy.port}"
        heard = running.subscription(url)
        lanes = [running.lane(url), running.lane(url)]
        log = RoomLog(*lanes, history=10, history_seconds=60, key_window=60)
        heard.subscription.subscribe(channel("general"))
        await eventually(lambda: heard.confirmed)
        proxy.up.flip = proxy.down.flip = 0.1
        send = Publish(0, "general", b'{"type":"message","offset":', b"}", "alice", None, True)
        while proxy.flipped < 200:
            for _ in range(5):
                log.publish(send, "c", lambda outcome: None, lambda: True)
                log.read("general", lambda outcome: None, after=0)
            await asyncio.sleep(0.005)
        proxy.calm()
        await until_it_answers(lanes[0])
        await until_it_answers(lanes[1])
    finally:
        await proxy.close()


def test_a_connection_that_is_reset_in_the_moment_of_writing_ends_neither(
    own_valkey: Valkey,
) -> None:
    """On uvloop, whose transports then raise what is no OSError."""

    async def main() -> None:
        proxy = Proxy(own_valkey.socket)
        await proxy.start()
        running = Running()
        url = f"redis://127.0.0.1:{proxy.port}/0"
        lane, heard = running.lane(url), running.subscription(url)
        try:
            async with asyncio.timeout(PATIENCE):
                for n in range(5):
                    await write_amid_a_reset(lane, heard, proxy, n)
            assert not any(task.done() for task in running.tasks), running.tasks
        finally:
            await end(running.tasks)
            await proxy.close()

    uvloop.run(main())


async def write_amid_a_reset(lane: Lane, heard: Heard, proxy: Proxy, n: int) -> None:
    await until_it_answers(lane)
    heard.subscription.subscribe(f"before-{n}")
    await eventually(lambda: f"before-{n}" in heard.confirmed)
    connections: list[Any] = [lane._connection, heard.subscription._connection]
    transports = [connection._writer.transport for connection in connections]
    proxy.reset()
    while not any(transport.is_closing() for transport in transports):
        await asyncio.sleep(0)
    heard.subscription.subscribe(f"after-{n}")
    await answers(lane)
    await eventually(lambda: f"after-{n}" in heard.confirmed)

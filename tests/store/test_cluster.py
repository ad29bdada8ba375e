"""On a cluster: commands and channels find their nodes, in order, while slots and nodes go."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from chatserver.core.effects import Publish, Published
from chatserver.core.errors import StoreUnavailable
from chatserver.core.frames import message_parts
from chatserver.core.room import Reading
from chatserver.core.session import Kind
from chatserver.store import keys
from chatserver.store.cluster import slot_of, store_at
from chatserver.store.link import ANNOUNCE, SCRIPTS, Lane, Store
from chatserver.store.log import RoomLog, channel, parse_live, room_of, rooms
from chatserver.store.revocations import revoke
from tests.conftest import AMPLE
from tests.store.test_sentinel import answered, tell
from tests.support.client import Client, http
from tests.support.cluster import NODES, KeyCluster
from tests.support.failover import free_ports
from tests.support.tokens import Issuer, unique
from tests.support.worker import PATIENCE, Worker, end, eventually

UNDER_WAY = 100
UNAVAILABLE_WITHIN = 3.0
"""The protocol promises a second; a loaded machine gets three."""


def _started(directory: Path, replicas: int) -> Iterator[KeyCluster]:
    directory.mkdir()
    cluster = KeyCluster(directory, replicas=replicas)
    try:
        cluster.start()
        yield cluster
    finally:
        cluster.stop()


@pytest.fixture(scope="module")
def cluster(_short_directory: Path) -> Iterator[KeyCluster]:
    """Whose slots a test may move, and whose nodes stay."""
    yield from _started(_short_directory / unique("c"), replicas=0)


@pytest.fixture
def own_cluster(_short_directory: Path) -> Iterator[KeyCluster]:
    """With a replica for each; its nodes may be killed."""
    yield from _started(_short_directory / unique("c"), replicas=1)


@asynccontextmanager
async def used(*parts: Any) -> AsyncIterator[None]:
    tasks = [asyncio.create_task(part.run()) for part in parts]
    try:
        yield
        assert not any(task.done() for task in tasks), tasks
    finally:
        await end(tasks)


class Chat:
    """A store with its lanes, its rooms' logs, and what is heard of their channels."""

    def __init__(self, url: str) -> None:
        self.store = store_at(url)
        self.lane = self.store.lane()
        self.log = RoomLog(
            self.store.lane(),
            self.store.lane(batch=64),
            history=100_000,
            history_seconds=600,
            key_window=600,
            announce=self.store.announce,
        )
        self.heard: dict[str, list[int]] = {}
        self.confirmed: list[str] = []
        self.subscription = self.store.subscription(
            self._hear, lambda name: self.confirmed.append(room_of(name))
        )
        self.parts = [self.store, self.lane, *self.log.lanes, self.subscription]

    def _hear(self, name: str, payload: bytes) -> None:
        self.heard.setdefault(room_of(name), []).append(parse_live(payload).offset)

    def submit(self, room: str, body: object = None, key: str | None = None) -> asyncio.Future[Any]:
        head, tail = message_parts(room, "alice", str(body).encode(), key)  # type: ignore[arg-type]
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        event = Publish(0, room, head, tail, "alice", key, True)
        self.log.publish(event, "connection-1", future.set_result, lambda: True)
        return future

    async def publish(self, room: str, body: object = None) -> Published:
        """Again and again until it is done."""
        key = unique("k")
        async with asyncio.timeout(2 * PATIENCE):
            while isinstance(published := await self.submit(room, body, key), StoreUnavailable):
                await asyncio.sleep(0.01)
        assert isinstance(published, Published)
        return published

    async def read(self, room: str) -> list[int]:
        """What the room's messages say, in their order."""
        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        self.log.read(room, future.set_result, after=0, size=10_000_000, onwards=100_000)
        reading = await future
        assert isinstance(reading, Reading), reading
        return [int(event.payload.split(b'"body":')[1].split(b"}")[0]) for event in reading.events]

    async def hear(self, *names: str) -> None:
        for name in names:
            self.subscription.subscribe(channel(name))
        await eventually(lambda: set(names) <= set(self.confirmed))


@pytest.fixture
async def chat(cluster: KeyCluster) -> AsyncIterator[Chat]:
    chat = Chat(cluster.url)
    async with used(*chat.parts):
        yield chat


def on_each_node(cluster: KeyCluster) -> list[str]:
    """Rooms, one for each node."""
    found: dict[int, str] = {}
    while len(found) < NODES:
        name = unique("room")
        found.setdefault(cluster.node_of(channel(name)), name)
    return [found[n] for n in range(NODES)]


# --- where things are ----------------------------------------------------------------------


@pytest.mark.parametrize(
    "key", ["a", "{a}b", "x{a}y{b}", "{}a", "a{", "a{}{b}", "chat:room:{r-1}:log", "\u20ac", ""]
)
def test_slots_are_those_of_the_store(cluster: KeyCluster, key: str) -> None:
    assert slot_of(key) == cluster.ask(0, "CLUSTER", "KEYSLOT", key)


def test_all_names_of_sessions_are_in_one_slot() -> None:
    names = [
        *(keys.STREAM, keys.INCARNATION, keys.WORKERS, keys.CHANNEL),
        *(keys.record(kind, "a{b}") for kind in Kind),
        *(each("a}{b}") for each in (keys.family, keys.ended, keys.connections, keys.closed)),
    ]

    assert len({slot_of(name) for name in names}) == 1


def test_every_script_that_announces_is_told_how() -> None:
    """PUBLISH on a cluster reaches nobody who listens on a sharded channel."""
    assert not [script.name for script in SCRIPTS if b"PUBLISH'" in script.source]


async def test_commands_find_the_nodes_of_their_keys(chat: Chat, cluster: KeyCluster) -> None:
    names = [unique("key") for _ in range(60)]

    replies = await asyncio.gather(*[chat.lane.call(["SET", name, name]) for name in names])
    stored = await asyncio.gather(*[chat.lane.call(["GET", name]) for name in names])

    assert replies == [b"OK"] * 60
    assert stored == [name.encode() for name in names]
    assert {cluster.node_of(name) for name in names} == set(range(NODES))


async def test_the_time_is_that_of_the_node_that_has_the_leases(
    chat: Chat, cluster: KeyCluster
) -> None:
    (port,) = {
        line.split(":")[1]
        for line in (await chat.lane.call(["INFO", "server"])).decode().splitlines()
        if line.startswith("tcp_port:")
    }

    assert int(port) == cluster.ports[cluster.node_of(keys.WORKERS)]
    assert len(await chat.lane.call(["TIME"])) == 2


async def test_rooms_on_all_nodes_are_published_to_read_and_heard(
    chat: Chat, cluster: KeyCluster
) -> None:
    names = on_each_node(cluster)
    await chat.hear(*names)

    places = [await asyncio.gather(*[chat.submit(name, n) for name in names]) for n in range(20)]
    await eventually(lambda: all(len(chat.heard.get(name, ())) == 20 for name in names))

    assert [[place.offset for place in row] for row in places] == [[n] * 3 for n in range(1, 21)]
    assert all(chat.heard[name] == list(range(1, 21)) for name in names)
    assert [await chat.read(name) for name in names] == [list(range(20))] * 3


async def test_what_is_said_to_all_workers_is_heard(chat: Chat) -> None:
    """With the marker that a lane replaces, and with nothing that looks like it."""
    heard: list[bytes] = []
    confirmed: list[str] = []
    listening = chat.store.subscription(lambda _, said: heard.append(said), confirmed.append)
    listening.subscribe(keys.CHANNEL)
    async with used(listening):
        await eventually(lambda: confirmed)
        await chat.lane.call([ANNOUNCE, keys.CHANNEL, "PUBLISH"])
        await eventually(lambda: heard)
        await revoke_something(chat.lane)
        await eventually(lambda: len(heard) == 2)

    assert heard[0] == b"PUBLISH"


async def revoke_something(lane: Lane) -> None:
    outcome = await revoke(lane.call, Kind.SESSION, unique("s"))
    assert outcome.complete


async def test_all_rooms_are_listed_page_by_page(chat: Chat, cluster: KeyCluster) -> None:
    names = {unique("listed") for _ in range(40)}
    await asyncio.gather(*[chat.publish(name, 1) for name in names])

    found: list[str] = []
    after, pages = 0, 0
    while True:
        page, following = await rooms(chat.lane.call, after, 5)
        found += [state.room for state in page]
        pages += 1
        if following is None:
            break
        after = int(following)
        assert after < 2**64

    assert names <= set(found)
    assert len(found) == len(set(found))
    assert pages > NODES


async def test_an_unsubscribed_channel_is_silent(chat: Chat, cluster: KeyCluster) -> None:
    left, kept, _ = on_each_node(cluster)
    await chat.hear(left, kept)

    chat.subscription.unsubscribe(channel(left))
    node = cluster.node_of(channel(left))
    await eventually(lambda: cluster.ask(node, "PUBSUB", "SHARDNUMSUB", channel(left))[1] == 0)
    await chat.publish(left, 1)
    await chat.publish(kept, 1)
    await eventually(lambda: chat.heard.get(kept))

    assert left not in chat.heard


async def test_a_cluster_describes_itself(cluster: KeyCluster) -> None:
    async with store_at(cluster.url) as store:
        found = await store.describe()
    async with Store(f"redis://127.0.0.1:{cluster.ports[0]}") as node:
        alone = await node.describe()

    assert (found["policy"], found["mode"], found["wanted"]) == ("noeviction", "cluster", "cluster")
    assert found["place"] == "a cluster of 3 primaries"
    assert (alone["mode"], alone["wanted"]) == ("cluster", "standalone")


async def test_a_cluster_that_is_not_there_is_unavailable_at_once() -> None:
    asked = time.monotonic()
    with pytest.raises(StoreUnavailable, match="no node of the cluster answers"):
        async with store_at(f"redis+cluster://127.0.0.1:{free_ports(1)[0]}"):
            pytest.fail("it is not there")

    assert time.monotonic() - asked < UNAVAILABLE_WITHIN


# --- slots that move -----------------------------------------------------------------------


class Sender:
    """Sends numbers to a room, one after the other, with many under way."""

    def __init__(self, chat: Chat, room: str) -> None:
        self.room = room
        self.sent = 0
        self.refused: list[Any] = []
        self.confirmed: list[tuple[int, int]] = []
        """What was sent, and where it is; in the order of the answers."""
        self._chat = chat

    async def run(self) -> None:
        while True:
            if self.sent - len(self.confirmed) - len(self.refused) < UNDER_WAY:
                asked = self._chat.submit(self.room, self.sent)
                asked.add_done_callback(partial(self._answered, self.sent))
                self.sent += 1
            await asyncio.sleep(0)

    def _answered(self, number: int, asked: asyncio.Future[Any]) -> None:
        done = asked.result()
        if isinstance(done, Published):
            self.confirmed.append((number, done.offset))
        else:
            self.refused.append(done)


def in_order(sender: Sender, stored: list[int]) -> None:
    """All that was confirmed is there, in its place; what is there was sent in this order."""
    assert stored == sorted(set(stored))
    assert [stored[offset - 1] for _, offset in sender.confirmed] == [
        number for number, _ in sender.confirmed
    ]


async def amid(sender: Sender, count: int) -> None:
    """Until so many more are confirmed."""
    before = len(sender.confirmed)
    await eventually(lambda: len(sender.confirmed) >= before + count)


async def test_a_slot_that_moves_amid_traffic_keeps_the_order_and_loses_nothing(
    chat: Chat, cluster: KeyCluster
) -> None:
    name = on_each_node(cluster)[0]
    slot = slot_of(channel(name))
    await chat.hear(name)
    sender = Sender(chat, name)
    async with used(sender):
        await amid(sender, 200)
        for source, target in ((0, 1), (1, 2), (2, 0)):
            await asyncio.to_thread(cluster.begin_to_move, slot, source, target)
            await amid(sender, 200)
            while await asyncio.to_thread(cluster.move_keys, slot, source, target):
                pass
            await amid(sender, 200)  # its keys are there, and the slot is not
            before = chat.confirmed.count(name)
            await asyncio.to_thread(cluster.finish_to_move, slot, source, target)
            await amid(sender, 200)
            await eventually(lambda before=before: chat.confirmed.count(name) > before)  # type: ignore[misc]
    await eventually(lambda: sender.sent == len(sender.confirmed) + len(sender.refused))
    stored = await chat.read(name)
    last = await chat.publish(name, 10**9)
    await eventually(lambda: last.offset in chat.heard[name])

    assert sender.refused == []
    assert len(stored) == sender.sent
    in_order(sender, stored)


async def test_a_keyed_send_to_a_slot_that_is_on_its_way_is_unavailable_and_can_be_repeated(
    chat: Chat, cluster: KeyCluster
) -> None:
    """The store cannot know then whether the key is new: TRYAGAIN."""
    name = on_each_node(cluster)[1]
    slot = slot_of(channel(name))
    await chat.publish(name, 0)

    cluster.begin_to_move(slot, 1, 2)
    refused = await chat.submit(name, 1, "k")
    while cluster.move_keys(slot, 1, 2):
        pass
    cluster.finish_to_move(slot, 1, 2)
    repeated = await chat.submit(name, 1, "k")
    again = await chat.submit(name, 1, "k")
    cluster.move(slot, 2, 1)

    assert isinstance(refused, StoreUnavailable)
    assert "TRYAGAIN" in str(refused)
    assert isinstance(repeated, Published)
    assert (again.offset, again.duplicate) == (repeated.offset, True)
    assert await chat.read(name) == [0, 1]


async def test_a_command_that_two_nodes_send_to_each_other_is_unavailable(
    chat: Chat, cluster: KeyCluster
) -> None:
    # A slot without a key, of whatever other tests have left: a node gives up no other.
    names = (f"{{to and fro {n}}}" for n in range(100))
    name = next(name for name in names if not cluster.keys_beside(name))
    slot, owner = slot_of(name), cluster.node_of(name)
    other = (owner + 1) % NODES
    await chat.lane.call(["GET", name])

    cluster.tell(owner, "CLUSTER", "SETSLOT", slot, "NODE", cluster.name(other))
    try:
        with pytest.raises(StoreUnavailable, match="the key is kept at"):
            await chat.lane.call(["GET", name])
    finally:
        cluster.tell(owner, "CLUSTER", "SETSLOT", slot, "NODE", cluster.name(owner))

    assert await answered(chat.lane, "GET", name) is None


# --- nodes that go -------------------------------------------------------------------------


async def test_a_node_that_is_killed_takes_only_its_rooms_and_its_replica_takes_over(
    own_cluster: KeyCluster,
) -> None:
    chat = Chat(own_cluster.url)
    names = on_each_node(own_cluster)
    lost = (own_cluster.node_of(keys.CHANNEL) + 1) % NODES
    gone, others = names[lost], [name for name in names if name != names[lost]]
    async with used(*chat.parts):
        await chat.hear(*names)
        await asyncio.gather(*[chat.publish(name, 0) for name in names])

        await asyncio.to_thread(own_cluster.stores[lost].kill)
        killed_at = time.monotonic()
        refused, *fine = await asyncio.gather(*[chat.submit(name, 1) for name in (gone, *others)])
        told = time.monotonic() - killed_at
        await chat.publish(gone, 2)
        acked = time.monotonic() - killed_at
        await eventually(lambda: chat.confirmed.count(gone) == 2)
        confirmed = time.monotonic() - killed_at
        before = len(chat.heard[gone])
        await chat.publish(gone, 3)
        await eventually(lambda: len(chat.heard[gone]) > before)
        await asyncio.gather(*[chat.submit(name, 4) for name in others])

    tell(f"a node killed: refused {told:.2f} s, ack {acked:.2f} s, subscribed {confirmed:.2f} s")
    assert isinstance(refused, StoreUnavailable)
    assert all(isinstance(each, Published) for each in fine)
    assert told < UNAVAILABLE_WITHIN
    assert [chat.confirmed.count(name) for name in others] == [1, 1]


async def test_while_a_node_without_a_replica_is_away_the_others_serve(
    chat: Chat, cluster: KeyCluster
) -> None:
    """And its channels are confirmed again when it is back."""
    names = on_each_node(cluster)
    await chat.hear(*names)
    slowest = 0.0

    await asyncio.to_thread(cluster.stores[0].kill)
    try:
        for n in range(100):
            asked = time.monotonic()
            gone, *there = await asyncio.gather(*[chat.submit(name, n) for name in names])
            slowest = max(slowest, time.monotonic() - asked)
            assert isinstance(gone, StoreUnavailable)
            assert all(isinstance(each, Published) for each in there), there
    finally:
        await asyncio.to_thread(cluster.stores[0].start)
    await chat.publish(names[0], 100)
    await eventually(lambda: chat.confirmed.count(names[0]) == 2)

    assert slowest < UNAVAILABLE_WITHIN


# --- the server ----------------------------------------------------------------------------


async def test_a_worker_serves_on_a_cluster(
    cluster: KeyCluster, issuer: Issuer, tmp_path: Path, user: str
) -> None:
    worker = Worker(tmp_path / "log", cluster.url, issuer, **AMPLE)
    session = unique("s")
    token = issuer.token(user, session=session)
    names = on_each_node(cluster)
    try:
        worker.start()
        async with (
            await Client.connect(worker.url, token) as alice,
            await Client.connect(worker.url, issuer.token("bob")) as bob,
        ):
            for name in names:
                for client in (alice, bob):
                    await client.join(name)
                for n in range(5):
                    await alice.publish(name, n, key=f"k{n}")
                bodies = [event["body"] for event in await bob.messages(5, name)]
                assert bodies == list(range(5))
            slot = slot_of(channel(names[0]))
            await asyncio.to_thread(cluster.move, slot, 0, 1)
            await alice.publish(names[0], "moved")
            event = await bob.expect(lambda frame: frame.get("body") == "moved")
            await asyncio.to_thread(cluster.move, slot, 1, 0)
            async with store_at(cluster.url) as store:
                outcome = await revoke(store.call, Kind.SESSION, session)
            _, code = await alice.until_closed()
        answer = await http(worker.url, headers={"Authorization": f"Bearer {token}"})
    finally:
        worker.stop()

    assert event["offset"] == 6
    assert (outcome, code) == ((1, True), 4503)
    assert (answer.status, answer.code) == (401, "token_revoked")

"""Behind sentinels: who is believed, and how a lane, a subscription and a worker follow."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from chatserver.core.errors import StoreRefused, StoreUnavailable
from chatserver.core.session import Kind
from chatserver.settings import store_place
from chatserver.store.link import Lane, Store
from chatserver.store.revocations import living_leases, revoke
from chatserver.store.topology import Address, Sentinel
from tests.conftest import AMPLE
from tests.support.client import Client, http
from tests.support.failover import SERVICE, Failover, address, free_ports
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, Worker, end, eventually

FOLLOWED_WITHIN = 2 * PATIENCE
"""The sentinels alone take two to three seconds here; one of their elections may have no winner."""


@pytest.fixture
def failover(_short_directory: Path) -> Iterator[Failover]:
    directory = _short_directory / unique("f")
    directory.mkdir()
    started = Failover(directory)
    try:
        started.start()
        yield started
    finally:
        started.stop()


@asynccontextmanager
async def used(store: Store, *others: Any) -> AsyncIterator[None]:
    """The store's own task, and its lanes and subscriptions."""
    tasks = [asyncio.create_task(part.run()) for part in (store, *others)]
    try:
        yield
        # None of them may have ended by itself, but for a store that has nothing to follow.
        assert not any(task.done() for task in tasks[1:]), tasks
    finally:
        await end(tasks)


def tell(measured: str) -> None:
    """For who runs it with -s."""
    sys.stdout.write(f"{measured}\n")


async def answered(lane: Lane, *words: str | int) -> Any:
    """Ask again until there is an answer."""
    async with asyncio.timeout(FOLLOWED_WITHIN):
        while True:
            try:
                return await lane.call(list(words))
            except StoreUnavailable:
                await asyncio.sleep(0.01)


# --- a real failover -----------------------------------------------------------------------


async def test_lane_and_subscription_follow_when_the_primary_is_killed(failover: Failover) -> None:
    store = Store(failover.url)
    messages: list[bytes] = []
    confirmed: list[str] = []
    lane = store.lane()
    listening = store.subscription(lambda _, payload: messages.append(payload), confirmed.append)
    listening.subscribe("live")
    async with used(store, lane, listening):
        assert await answered(lane, "SET", "n", 1) == b"OK"
        await eventually(lambda: confirmed == ["live"])

        killed = failover.primary
        killed.kill()
        killed_at = time.monotonic()
        assert await answered(lane, "INCR", "m") == 1
        acked = time.monotonic() - killed_at
        await eventually(lambda: confirmed == ["live", "live"])
        confirmed_after = time.monotonic() - killed_at
        await lane.call(["PUBLISH", "live", "from the new one"])
        await eventually(lambda: messages == [b"from the new one"])

    assert failover.primary is not killed
    tell(f"after the kill: first ack {acked:.2f} s, subscription {confirmed_after:.2f} s")
    assert acked < FOLLOWED_WITHIN


async def test_a_lane_follows_a_failover_by_hand_and_keeps_the_order(failover: Failover) -> None:
    """The old one lives, and takes itself for the primary until it is told, seconds later."""
    store = Store(failover.url)
    lane = store.lane()
    asked = 0
    async with used(store, lane):
        port = await answered(lane, "CONFIG", "GET", "port")
        failover.fail_over()
        async with asyncio.timeout(FOLLOWED_WITHIN):
            while port == await answered(lane, "CONFIG", "GET", "port"):
                asked += 1
                lane.submit(["RPUSH", "list", asked], lambda reply: None)
        await answered(lane, "RPUSH", "list", asked + 1)
        stored = [int(value) for value in await lane.call(["LRANGE", "list", 0, -1])]

    assert stored == sorted(set(stored))
    assert stored[-1] == asked + 1


async def renewed_since(store: Store, then: float) -> bool:
    """A worker has told the store that it serves."""
    return any(lease.renewed_at > then * 1000 for lease in await living_leases(store.call))


async def test_a_worker_goes_on_behind_its_sentinels(
    failover: Failover, issuer: Issuer, tmp_path: Path, user: str, room: str
) -> None:
    worker = Worker(tmp_path / "log", failover.url, issuer, **AMPLE)
    session = unique("s")
    token = issuer.token(user, session=session)
    try:
        worker.start()
        async with (
            await Client.connect(worker.url, token) as alice,
            await Client.connect(worker.url, issuer.token("bob")) as bob,
        ):
            for client in (alice, bob):
                await client.join(room)
            await alice.publish(room, "before")
            replicated = failover.stores[1].command
            await eventually(lambda: replicated("XLEN", f"chat:room:{{{room}}}:log") == b":1")
            failover.primary.kill()
            killed, killed_at = time.time(), time.monotonic()
            async with asyncio.timeout(FOLLOWED_WITHIN):
                while (await alice.ask("send", room=room, body="after", key="k"))["type"] != "ack":
                    await asyncio.sleep(0.01)
            tell(f"after the kill: first ack of a worker {time.monotonic() - killed_at:.2f} s")
            bodies = [event["body"] for event in await bob.messages(2)]
            async with Store(failover.url) as store:
                # Who revokes earlier is told that this worker has not confirmed it.
                async with asyncio.timeout(PATIENCE):
                    while not await renewed_since(store, killed):
                        await asyncio.sleep(0.01)
                outcome = await revoke(store.call, Kind.SESSION, session)
            _, code = await alice.until_closed()
        answer = await http(worker.url, headers={"Authorization": f"Bearer {token}"})
    finally:
        worker.stop()

    assert bodies == ["before", "after"]
    assert (outcome, code) == ((1, True), 4503)
    assert (answer.status, answer.code) == (401, "token_revoked")


# --- who is believed -----------------------------------------------------------------------


class Witness:
    """A sentinel that says what it is told to say."""

    def __init__(self, port: int, primary: int, epoch: int) -> None:
        self.port = port
        self.primary = primary
        self.epoch = epoch
        self.password: str | None = None
        self.silent = False
        self._server: asyncio.Server | None = None
        self._answering: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", self.port)

    async def stop(self) -> None:
        assert self._server is not None
        self._server.close()
        await end(self._answering)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._answering.add(task)
        admitted = self.password is None
        try:
            while line := await reader.readline():
                words = []
                for _ in range(int(line[1:])):
                    size = int((await reader.readline())[1:])
                    words.append((await reader.readexactly(size + 2))[:-2].decode().upper())
                if words[0] == "AUTH":
                    admitted = words[-1] == (self.password or "").upper()
                if not self.silent:
                    writer.write(self._answer(words) if admitted else b"-NOAUTH first\r\n")
        except (asyncio.CancelledError, ConnectionError, asyncio.IncompleteReadError):
            pass
        finally:
            self._answering.discard(task)
            writer.transport.abort()

    def _answer(self, words: list[str]) -> bytes:
        match words[:2]:
            case ["SENTINEL", "MASTER"]:
                return b"*2\r\n$12\r\nconfig-epoch\r\n$%d\r\n%d\r\n" % (
                    len(str(self.epoch)),
                    self.epoch,
                )
            case ["SENTINEL", _]:
                port = str(self.primary).encode()
                return b"*2\r\n$9\r\n127.0.0.1\r\n$%d\r\n%b\r\n" % (len(port), port)
            case _:
                return b"+OK\r\n"


def url_of(*witnesses: Witness, login: str = "") -> str:
    hosts = ",".join(address(witness.port) for witness in witnesses)
    return f"redis+sentinel://{login}{hosts}/{SERVICE}"


@pytest.fixture
async def witnesses() -> AsyncIterator[list[Witness]]:
    found = [Witness(port, 7000, epoch=1) for port in free_ports(3)]
    for witness in found:
        await witness.start()
    yield found
    for witness in found:
        await witness.stop()


async def found_by(*witnesses: Witness, login: str = "") -> int:
    place = Sentinel(store_place(url_of(*witnesses, login=login)))
    assert await place.find() == place.primary
    assert place.primary is not None
    return place.primary.port


async def test_the_newest_configuration_of_a_majority_counts(witnesses: list[Witness]) -> None:
    """One that was cut off with the old primary goes on to praise it."""
    for witness in witnesses[1:]:
        witness.primary, witness.epoch = 7001, 2

    # Whoever answers first, of any two one knows.
    found = [await found_by(*witnesses) for _ in range(20)]

    assert set(found) == {7001}


async def test_a_majority_need_not_be_waited_for_longer_than_the_deadline(
    witnesses: list[Witness],
) -> None:
    witnesses[0].silent = witnesses[1].silent = True

    assert await found_by(*witnesses) == 7000


@pytest.mark.usefixtures("prompt")
async def test_when_no_sentinel_answers_the_store_is_unavailable(witnesses: list[Witness]) -> None:
    store = Store(url_of(*witnesses))
    for witness in witnesses:
        witness.silent = True
    lane = store.lane()
    asked = time.monotonic()

    async with used(store, lane):
        with pytest.raises(StoreUnavailable, match=f"no sentinel says where {SERVICE} is"):
            await lane.call(["PING"])
        took = time.monotonic() - asked

    assert took < 3.0


async def test_sentinels_that_want_a_login_get_that_of_the_store(witnesses: list[Witness]) -> None:
    for witness in witnesses:
        witness.password = "tomato"

    assert await found_by(*witnesses, login="alice:tomato@") == 7000


@pytest.fixture
def two(_short_directory: Path) -> Iterator[tuple[Valkey, Valkey, int, int]]:
    """Two stores that know nothing of each other, and their ports."""
    started = []
    ports = free_ports(2)
    try:
        for port in ports:
            directory = _short_directory / unique("t")
            directory.mkdir()
            started.append(Valkey(directory, port=str(port), bind="127.0.0.1"))
            started[-1].start()
        yield started[0], started[1], ports[0], ports[1]
    finally:
        for store in started:
            store.stop()


async def test_a_primary_that_answers_is_left_when_the_sentinels_name_another(
    witnesses: list[Witness], two: tuple[Valkey, Valkey, int, int]
) -> None:
    """It was cut off from them and not from here: nothing on the connection itself tells."""
    _, new, old_port, new_port = two
    for witness in witnesses:
        witness.primary = old_port
    store = Store(url_of(*witnesses))
    lane, idle = store.lane(), store.lane()
    confirmed: list[str] = []
    listening = store.subscription(lambda *_: None, confirmed.append)
    listening.subscribe("live")
    async with used(store, lane, idle, listening):
        await answered(lane, "SET", "at", "old")
        await answered(idle, "PING")
        await eventually(lambda: confirmed)

        for witness in witnesses:
            witness.primary, witness.epoch = new_port, 2
        await eventually(lambda: len(confirmed) == 2)
        await answered(lane, "SET", "at", "new")
        # At once: it finds its connection ended, and makes another.
        assert await idle.call(["GET", "at"]) == b"new"

    assert new.command("GET", "at") == b"new"


async def test_a_stale_answer_leads_to_no_write_on_an_ex_primary(
    witnesses: list[Witness], two: tuple[Valkey, Valkey, int, int]
) -> None:
    old, new, old_port, new_port = two
    old.command("REPLICAOF", "127.0.0.1", str(new_port))
    for witness in witnesses:
        witness.primary = old_port
    store = Store(url_of(*witnesses))
    lane = store.lane()
    async with used(store, lane):
        with pytest.raises(StoreUnavailable, match="it is a replica"):
            await lane.call(["SET", "x", "1"])
        for witness in witnesses:
            witness.primary, witness.epoch = new_port, 2
        assert await answered(lane, "SET", "x", "2") == b"OK"

    assert new.command("GET", "x") == b"2"


@pytest.mark.parametrize("behind_sentinels", [True, False])
async def test_readonly_ends_the_connection_and_never_loops(
    witnesses: list[Witness], two: tuple[Valkey, Valkey, int, int], behind_sentinels: bool
) -> None:
    old, _, old_port, new_port = two
    for witness in witnesses:
        witness.primary = old_port
    store = Store(url_of(*witnesses) if behind_sentinels else f"redis://127.0.0.1:{old_port}")
    lane = store.lane()

    def connections() -> int:
        info = old.command("INFO", "stats").decode()
        return int(info.split("total_connections_received:")[1].split()[0])

    async with used(store, lane):
        await answered(lane, "PING")
        old.command("REPLICAOF", "127.0.0.1", str(new_port))
        with pytest.raises(StoreRefused, match="READONLY"):
            await lane.call(["SET", "x", "1"])
        await eventually(lambda: lane.down)
        before, since = connections(), time.monotonic()
        refused = 0
        while time.monotonic() - since < 1.0 or refused <= 100:
            with pytest.raises(StoreUnavailable):
                await lane.call(["SET", "x", "1"])
            refused += 1
        tries, seconds = connections() - before, time.monotonic() - since

        old.command("REPLICAOF", "NO", "ONE")
        assert await answered(lane, "SET", "x", "2") == b"OK"

    assert refused > 100
    assert tries < 30 * seconds, tries


def test_an_address_is_written_as_in_a_url() -> None:
    assert [str(Address("h", 1)), str(Address("::1", 2))] == ["h:1", "[::1]:2"]

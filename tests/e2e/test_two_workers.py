"""Two workers that meet only in the store."""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import Iterator

import pytest
from websockets.exceptions import InvalidStatus

from chatserver.core.session import STALE_SECONDS, Kind
from chatserver.store.link import Store
from chatserver.store.revocations import revoke
from tests.conftest import AMPLE, StartWorker
from tests.support.client import Client, http
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey
from tests.support.worker import Worker, end, eventually


@pytest.fixture(scope="module")
def second(
    valkey: Valkey, issuer: Issuer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """A neighbour of ``worker``."""
    started = Worker(
        tmp_path_factory.mktemp("second") / "log",
        valkey.url,
        issuer,
        **AMPLE,
    )
    started.start()
    yield started
    started.stop()


async def test_a_room_spans_workers_and_everyone_sees_the_same(
    worker: Worker, second: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with (
        await Client.connect(worker.url, issuer.token(user)) as here,
        await Client.connect(second.url, issuer.token("bob")) as there,
    ):
        epochs = {(await client.join(room))["epoch"] for client in (here, there)}
        for n in range(200):
            await here.command("send", room=room, body=["here", n])
            await there.command("send", room=room, body=["there", n])
        seen = await asyncio.gather(here.messages(400), there.messages(400))

    assert len(epochs) == 1
    assert seen[0] == seen[1]
    assert [event["offset"] for event in seen[0]] == list(range(1, 401))
    for side in ("here", "there"):
        assert [e["body"][1] for e in seen[0] if e["body"][0] == side] == list(range(200))


async def test_the_same_key_on_both_gets_the_same_place(
    worker: Worker, second: Worker, issuer: Issuer, user: str, room: str
) -> None:
    token = issuer.token(user)
    async with (
        await Client.connect(worker.url, token) as here,
        await Client.connect(second.url, token) as there,
    ):
        await there.join(room)
        for n in range(20):
            one, other = await asyncio.gather(
                here.publish(room, n, key=f"k{n}"), there.publish(room, n, key=f"k{n}")
            )
            assert (one["epoch"], one["offset"], one["ts"]) == (
                other["epoch"],
                other["offset"],
                other["ts"],
            )
            assert [ack.get("duplicate") for ack in (one, other)].count(True) == 1
        events = await there.messages(20)
        await there.ping()

    assert [event["body"] for event in events] == list(range(20))
    assert len(there.seen_in(room)) == 20


async def test_a_client_recovers_on_the_other_worker(
    worker: Worker, second: Worker, issuer: Issuer, user: str, room: str
) -> None:
    token = issuer.token(user)
    async with await Client.connect(worker.url, token) as here:
        epoch = (await here.join(room))["epoch"]
        await here.publish(room, 1)
        [event] = await here.messages(1)
    async with await Client.connect(second.url, token) as there:
        await there.publish(room, 2)
        since = {"epoch": epoch, "offset": event["offset"]}
        ack = await there.join(room, since=since)
        [missed] = await there.messages(1)

    assert ack["recovered"] is True
    assert (missed["offset"], missed["body"]) == (2, 2)


async def test_a_skip_is_shown_to_the_connection_that_sent_and_to_no_other(
    worker: Worker, second: Worker, issuer: Issuer, user: str, room: str
) -> None:
    token = issuer.token(user)
    async with (
        await Client.connect(worker.url, token) as here,
        await Client.connect(second.url, token) as there,
    ):
        await here.join(room)
        await there.join(room)
        await here.publish(room, "x", echo=False)
        skip = await here.expect("skip")
        [event] = await there.messages(1)

    assert (skip["offset"], event["offset"]) == (1, 1)


async def test_a_revocation_closes_on_both(
    worker: Worker, second: Worker, issuer: Issuer, user: str, valkey: Valkey
) -> None:
    session = unique("s")
    token = issuer.token(user, session=session)
    async with (
        await Client.connect(worker.url, token) as here,
        await Client.connect(second.url, token) as there,
    ):
        async with Store(valkey.url) as store:
            await revoke(store.call, Kind.SESSION, session)
        ends = await asyncio.gather(here.until_closed(), there.until_closed())
    answers = [
        await http(each.url, headers={"Authorization": f"Bearer {token}"})
        for each in (worker, second)
    ]

    assert [code for _, code in ends] == [4503, 4503]
    assert [(answer.status, answer.code) for answer in answers] == [(401, "token_revoked")] * 2


async def test_a_worker_that_was_stopped_does_not_serve_what_was_revoked_meanwhile(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str, room: str
) -> None:
    """It wakes up with sockets, commands and messages waiting for it, and an old list."""
    zombie, healthy = start_worker(own_valkey), start_worker(own_valkey)
    session = unique("s")
    token = issuer.token(user, session=session)
    async with (
        await Client.connect(zombie.url, token) as revoked,
        await Client.connect(zombie.url, issuer.token("carol")) as carol,
        await Client.connect(healthy.url, issuer.token("bob")) as bob,
    ):
        for client in (revoked, carol, bob):
            await client.join(room)
        zombie.signal(signal.SIGSTOP)
        stopped_at = time.monotonic()
        async with Store(own_valkey.url) as store:
            await revoke(store.call, Kind.SESSION, session)
        await revoked.send({"type": "send", "room": room, "body": "from a revoked one"})
        waiting = asyncio.create_task(
            http(zombie.url, headers={"Authorization": f"Bearer {token}"})
        )
        await bob.publish(room, "secret")
        await eventually(lambda: time.monotonic() - stopped_at > STALE_SECONDS + 0.2)
        zombie.signal(signal.SIGCONT)
        # To its send it may be told that nothing is accepted now; nothing is delivered to it.
        frames, code = await revoked.until_closed()
        answer = await waiting
        await bob.publish(room, "end")
        await bob.messages(2)
        later = await carol.messages(2)

    assert code == 4503
    assert frames[-1]["type"] == "bye"
    assert [frame["code"] for frame in frames[:-1]] in ([], ["unavailable"])
    assert answer.status in (401, 503)
    assert [event["body"] for event in later] == ["secret", "end"]
    assert [event["body"] for event in bob.seen_in(room)] == ["secret", "end"]


async def test_what_was_acked_survives_the_kill_of_a_worker(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str, second: Worker
) -> None:
    """Its client repeats with the same keys elsewhere: each is there once."""
    victim = start_worker(**AMPLE)
    token = issuer.token(user)
    async with await Client.connect(second.url, issuer.token("bob")) as bob:
        await bob.join(room)
        async with await Client.connect(victim.url, token) as sender:
            for n in range(200):
                await sender.command("send", room=room, body=n, key=f"k{n}")
            await sender.expect(lambda frame: frame["type"] == "ack")
            victim.signal(signal.SIGKILL)
            frames, code = await sender.until_closed()
        acked = {f["offset"] for f in sender.seen if f["type"] == "ack"}
        async with await Client.connect(second.url, token) as sender:
            for n in range(200):
                await sender.publish(room, n, key=f"k{n}")
        events = await bob.messages(200)
        await bob.ping()

    assert code == 1006
    assert frames is not None
    assert sorted(event["body"] for event in events) == list(range(200))
    assert [event["offset"] for event in events] == list(range(1, 201))
    assert acked <= set(range(1, 201))
    assert len(bob.seen_in(room)) == 200


async def test_a_drain_of_one_sends_its_clients_to_the_other_without_loss(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str, second: Worker
) -> None:
    leaving = start_worker()
    token = issuer.token(user)
    async with await Client.connect(second.url, issuer.token("bob")) as bob:
        await bob.publish(room, 0)
        async with await Client.connect(leaving.url, token) as client:
            epoch = (await client.join(room, last=1))["epoch"]
            [first] = await client.messages(1)
            await bob.publish(room, 1)
            leaving.terminate()
            await bob.publish(room, 2)
            frames, code = await client.until_closed()
        received = [first, *(frame for frame in frames if frame["type"] == "message")]
        async with await Client.connect(second.url, token) as client:
            since = {"epoch": epoch, "offset": received[-1]["offset"]}
            ack = await client.join(room, since=since)
            received += await client.messages(3 - len(received))
        code_of_exit = await leaving.exit_code()

    assert (code, code_of_exit) == (1012, 0)
    assert ack["recovered"] is True
    assert [event["body"] for event in received] == [0, 1, 2]


@pytest.mark.parametrize("quiet", ["here", "there"])
async def test_of_a_users_connections_on_both_the_one_silent_longest_makes_room(
    start_worker: StartWorker, issuer: Issuer, user: str, quiet: str
) -> None:
    one, other = start_worker(user_connections=2), start_worker(user_connections=2)
    token = issuer.token(user, session="s 1")
    async with (
        await Client.connect(one.url, token) as here,
        await Client.connect(other.url, token) as there,
    ):
        silent, talking = (here, there) if quiet == "here" else (there, here)
        await silent.ping()
        await talking.ping()
        async with await Client.connect(one.url, token) as newcomer:
            frames, code = await silent.until_closed()
            await newcomer.ping()
            await talking.ping()

    assert code == 4505
    assert (frames[-1]["type"], frames[-1]["reconnect"]) == ("bye", False)


async def test_a_users_cap_holds_however_many_of_a_session_come_at_once(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    """They make room for each other, and three are left."""
    workers = [start_worker(user_connections=3) for _ in range(2)]
    token = issuer.token(user)

    async def come(url: str) -> int:
        """How it ended."""
        try:
            client = await Client.connect(url, token)
        except InvalidStatus as refused:
            return refused.response.status_code
        async with client:
            _, code = await client.until_closed()
            return code

    visits = [asyncio.create_task(come(each.url)) for _ in range(20) for each in workers]
    await eventually(lambda: sum(visit.done() for visit in visits) >= 37)
    async with await Client.connect(workers[0].url, token):
        await eventually(lambda: sum(visit.done() for visit in visits) >= 38)
        ended = [visit.result() for visit in visits if visit.done()]
    await end([visit for visit in visits if not visit.done()])

    # Where two workers want the same place for too long, somebody is refused.
    assert set(ended) <= {4505, 429}
    assert ended.count(4505) > 30
    assert len(ended) == 38

"""A token's life on a live socket: refresh, expiry, revocation; over one worker and over two."""

from __future__ import annotations

import asyncio
import json
import time

import pytest

from chatserver.core.session import Kind
from chatserver.store import sessions
from chatserver.store.link import Store
from tests.conftest import StartWorker
from tests.support.client import Client, refused
from tests.support.tokens import Issuer
from tests.support.valkey import Valkey
from tests.support.worker import Worker


async def revoke(valkey: Valkey, kind: Kind, value: str) -> None:
    async with Store(valkey.url) as store:
        await sessions.revoke(store, kind, value)


async def test_a_refresh_goes_on_with_the_new_tokens_rights(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await client.join(room)
        await client.join(f"{room}-other")
        token = issuer.token(user, rooms={room: "r"}, lifetime=600)
        ack = await client.ask("refresh", token=token)
        sent = await client.ask("send", room=room, body=1)
        history = await client.ask("history", room=f"{room}-other")

    assert ack["left"] == [f"{room}-other"]
    assert ack["roles"] == ["member"]
    assert ack["expires_at"] < client.welcome["expires_at"]
    assert sent["code"] == history["code"] == "forbidden"


async def test_nothing_of_a_room_comes_after_the_right_to_it_was_lost(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with (
        await Client.connect(worker.url, issuer.token(user)) as loser,
        await Client.connect(worker.url, issuer.token("talker")) as talker,
    ):
        await loser.join(room)
        for n in range(50):
            await talker.command("send", room=room, body=n)
        await loser.ask("refresh", token=issuer.token(user, rooms={}))
        loser.forget()
        await talker.publish(room, "secret")
        await loser.ping()
        await loser.ping()

    assert [f for f in loser._unasked if f["type"] == "message"] == []


@pytest.mark.parametrize(
    ("change", "code"),
    [
        ({"session": "another"}, "identity_mismatch"),
        ({"issued_at": int(time.time()) - 300}, "identity_mismatch"),
        ({"issued_at": int(time.time()) - 2000}, "token_expired"),
    ],
)
async def test_a_refresh_that_is_refused_changes_nothing(
    worker: Worker, issuer: Issuer, user: str, room: str, change: dict[str, object], code: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        error = await client.ask("refresh", token=issuer.token(user, **change))
        garbage = await client.ask("refresh", token="abc")
        other = await client.ask("refresh", token=issuer.token("somebody else"))
        ack = await client.publish(room, "still here")

    assert error["code"] == code
    assert garbage["code"] == "token_invalid"
    assert other["code"] == "identity_mismatch"
    assert ack["offset"] == 1


async def test_an_expired_socket_gets_nothing_and_a_refresh_brings_all_of_it(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    soon = int(time.time()) - 897
    async with (
        await Client.connect(worker.url, issuer.token(user, issued_at=soon)) as client,
        await Client.connect(worker.url, issuer.token("talker")) as talker,
    ):
        await client.join(room)
        await client.expect("expiring")
        while time.time() < soon + 900:
            await asyncio.sleep(0.02)
        await talker.publish(room, "withheld")
        refused_send = await client.ask("send", room=room, body=1)
        ping = await client.ping()
        before = [f for f in client._unasked if f["type"] == "message"]
        await client.ask("refresh", token=issuer.token(user))
        [event] = await client.messages(1)
        await talker.publish(room, "live")
        [live] = await client.messages(1)

    assert refused_send["code"] == "token_expired"
    assert ping["type"] == "ack"
    assert before == []
    assert (event["body"], event["offset"]) == ("withheld", 1)
    assert (live["body"], live["offset"]) == ("live", 2)


async def test_without_a_refresh_the_socket_closes_within_a_second_of_expiry(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    expires_at = int(time.time()) + 2
    token = issuer.token(user, issued_at=expires_at - 900)
    async with await Client.connect(worker.url, token) as client:
        frames, code = await client.until_closed()
        late = time.time() - expires_at

    assert [frame["type"] for frame in frames] == ["expiring", "bye"]
    assert (frames[-1]["code"], frames[-1]["reconnect"], code) == (4401, True, 4401)
    assert 0 <= late < 2


@pytest.mark.parametrize("kind", list(Kind))
async def test_a_revocation_ends_the_sockets_on_every_worker_and_no_handshake_succeeds(
    start_worker: StartWorker, valkey: Valkey, issuer: Issuer, user: str, room: str, kind: Kind
) -> None:
    workers = [start_worker(), start_worker()]
    session, token_id = f"session-{user}", f"token-{user}"
    token = issuer.token(user, session=session, token_id=token_id)
    value = {Kind.SESSION: session, Kind.USER: user, Kind.TOKEN: token_id}[kind]
    clients = [await Client.connect(worker.url, token) for worker in workers]
    bystander = await Client.connect(workers[0].url, issuer.token("bystander"))
    async with bystander:
        await bystander.join(room)
        await revoke(valkey, kind, value)
        ends = await asyncio.gather(*[client.until_closed() for client in clients])
        answers = [await refused(worker.url, token) for worker in workers]
        await bystander.publish(room, "still here")

    assert [code for _, code in ends] == [4503, 4503]
    assert all(frames[-1]["reason"] == "session_revoked" for frames, _ in ends)
    assert [answer.status for answer in answers] == [401, 401]
    assert [json.loads(answer.body)["error"]["code"] for answer in answers] == [
        "token_revoked",
        "token_revoked",
    ]


async def test_who_logs_in_after_a_revocation_of_the_user_is_let_in(
    worker: Worker, valkey: Valkey, issuer: Issuer, user: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await revoke(valkey, Kind.USER, user)
        _, code = await client.until_closed()
    async with Store(valkey.url) as store:
        cutoff = await sessions.cutoff(store, user)
    async with await Client.connect(worker.url, issuer.token(user, issued_at=cutoff + 1)) as again:
        await again.ping()

    assert code == 4503


async def test_a_revoked_token_offered_for_refresh_ends_the_socket(
    worker: Worker, valkey: Valkey, issuer: Issuer, user: str
) -> None:
    newer = issuer.token(user, token_id=f"newer-{user}")
    await revoke(valkey, Kind.TOKEN, f"newer-{user}")
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        while (error := await client.ask("refresh", token=newer))["type"] == "ack":
            pass  # the worker has not heard of it yet
        _, code = await client.until_closed()

    assert error["code"] == "token_revoked"
    assert code == 4503


async def test_rooms_span_workers_and_a_key_is_one_message_on_both(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    first, second = start_worker(), start_worker()
    async with (
        await Client.connect(first.url, issuer.token(user)) as here,
        await Client.connect(second.url, issuer.token(user)) as there,
    ):
        await here.join(room)
        await there.join(room)
        ack = await here.publish(room, "once", key="k")
        again = await there.publish(room, "twice", key="k")
        after = await there.publish(room, "after")
        events = [[e["body"] for e in await who.messages(2)] for who in (here, there)]

    assert again["duplicate"] is True
    assert (again["epoch"], again["offset"]) == (ack["epoch"], ack["offset"])
    assert after["offset"] == ack["offset"] + 1
    assert events == [["once", "after"]] * 2


async def test_a_reader_that_stops_bothers_nobody_and_misses_nothing(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(send_rate=10**6, send_burst=10**6, history=10**5)
    async with (
        await Client.connect(worker.url, issuer.token(user)) as slow,
        await Client.connect(worker.url, issuer.token("talker")) as talker,
    ):
        await slow.join(room)
        before = worker.memory()
        slow.socket.transport.pause_reading()
        for n in range(3000):
            await talker.command("send", room=room, body=f"{n:05}" + "x" * 2000)
            if n % 100 == 99:
                await talker.ping()
                talker.forget()
        grown = worker.memory() - before
        slow.socket.transport.resume_reading()
        events = await slow.messages(3000)

    assert [event["offset"] for event in events] == list(range(1, 3001))
    assert grown < 20_000_000


async def test_a_flood_is_refused_and_then_disconnected(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(send_rate=1, send_burst=5)
    async with await Client.connect(worker.url, issuer.token(user)) as client:

        async def flood() -> None:
            while True:
                await client.command("send", room=room, body=1)
                await asyncio.sleep(0)  # or it would never read

        flooding = asyncio.create_task(flood())
        frames, code = await client.until_closed()
        flooding.cancel()
        await asyncio.gather(flooding, return_exceptions=True)

    assert frames[-1]["type"] == "bye"
    assert (frames[-1]["code"], code) == (4429, 4429)
    assert frames[-1]["after"] > 0
    assert any(frame.get("code") == "rate_limited" for frame in frames)

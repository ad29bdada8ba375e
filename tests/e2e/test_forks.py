"""A store that was restarted, or came back older: who is told what."""

from __future__ import annotations

import time

from tests.conftest import AMPLE, StartWorker
from tests.support.client import Client, Frame
from tests.support.tokens import Issuer
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE


async def publish_again(client: Client, room: str, body: str) -> Frame:
    """As a client does while the store is away: with one key, until it is acked."""
    deadline = time.monotonic() + PATIENCE
    while (ack := await client.ask("send", room=room, body=body, key=body))["type"] != "ack":
        assert ack["code"] == "unavailable"
        assert time.monotonic() < deadline
    return ack


def told(client: Client, room: str) -> list[tuple[str, object]]:
    frames = [f for f in client.seen if f.get("room") == room and f["type"] != "ack"]
    return [(f["type"], f["body"] if f["type"] == "message" else f["epoch"]) for f in frames]


async def test_a_plain_restart_of_the_store_costs_nobody_a_position(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(own_valkey, **AMPLE)
    async with (
        await Client.connect(worker.url, issuer.token(user)) as client,
        await Client.connect(worker.url, issuer.token("bob")) as bob,
    ):
        joined = await bob.join(room)
        await client.publish(room, "1")
        await bob.messages(1)
        own_valkey.restart()
        ack = await publish_again(client, room, "2")
        await bob.expect(lambda f: f.get("body") == "2")
        # Who was away at the time, with a position of the old epoch.
        carol = await Client.connect(worker.url, issuer.token("carol"))
        recovery = await carol.join(room, since={"epoch": joined["epoch"], "offset": 1})
        [missed] = await carol.messages(1)
        await carol.drop()

    assert told(bob, room) == [("message", "1"), ("epoch", ack["epoch"]), ("message", "2")]
    assert (ack["offset"], missed["offset"], missed["body"]) == (2, 2, "2")
    assert (recovery["recovered"], recovery["epoch"]) == (True, ack["epoch"])
    assert recovery["epoch"] != joined["epoch"]


async def test_a_store_that_comes_back_older_is_told_to_exactly_those_it_hurts(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str, room: str
) -> None:
    """As after a failover to a replica that had not got everything."""
    worker = start_worker(own_valkey, **AMPLE)
    untouched = room + "-untouched"
    async with (
        await Client.connect(worker.url, issuer.token(user)) as client,
        await Client.connect(worker.url, issuer.token("bob")) as bob,
    ):
        for name in (room, untouched):
            joined = await bob.join(name)
        old = (await client.publish(room, "1"))["epoch"]
        await client.publish(untouched, "a")
        with own_valkey.older_copy() as put_back:
            await client.publish(room, "lost")
            await bob.messages(3)
            put_back()
        ack = await publish_again(client, room, "2")
        other = await publish_again(client, untouched, "b")
        await bob.expect(lambda f: f.get("body") == "2")
        await bob.expect(lambda f: f.get("body") == "b")
        carol = await Client.connect(worker.url, issuer.token("carol"))
        hurt = await carol.join(room, since={"epoch": old, "offset": 2})
        safe = await carol.join(room, since={"epoch": old, "offset": 1})
        await carol.drop()

    assert joined["epoch"] != other["epoch"]
    assert told(bob, untouched) == [("message", "a"), ("epoch", other["epoch"]), ("message", "b")]
    assert told(bob, room) == [
        ("message", "1"),
        ("message", "lost"),
        ("reset", ack["epoch"]),
        ("message", "2"),
    ]
    assert [f["offset"] for f in bob.seen if f["type"] == "reset"] == [1]
    assert ack["offset"] == 2
    assert (hurt["recovered"], safe["recovered"], safe["replay"]) == (False, True, 1)

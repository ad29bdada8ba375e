"""Clients that want too much, read too little, or vanish: the others do not notice."""

from __future__ import annotations

import asyncio
import json
import resource
import time

from websockets.frames import Opcode

from tests.conftest import AMPLE, StartWorker
from tests.support.client import Client, Frame, Raw, masked
from tests.support.tokens import Issuer
from tests.support.worker import PATIENCE, Worker, eventually

MEGABYTE = 2**20
SMALL = 4096
"""A receive buffer that fills up at once."""


def bodies(frames: list[Frame]) -> list[object]:
    return [frame["body"] for frame in frames if frame["type"] == "message"]


async def test_a_reader_that_stops_disturbs_nobody_and_recovers_everything(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    count, size = 400, 20_000
    async with (
        await Raw.upgraded(worker.url, issuer.token(user), receive_buffer=SMALL) as stalled,
        await Client.connect(worker.url, issuer.token(user)) as member,
        await Client.connect(worker.url, issuer.token(user)) as sender,
    ):
        stalled.text({"type": "join", "id": 1, "room": room})
        assert (await stalled.json())["type"] == "ack"
        await member.join(room)
        before = worker.memory()
        for n in range(count):
            await sender.publish(room, [n, "x" * size])
        others = await member.messages(count)
        grown = worker.memory() - before
        own = [await stalled.json() for _ in range(count)]
        await sender.publish(room, "live")
        live = await stalled.json()

    assert [event["offset"] for event in others] == list(range(1, count + 1))
    assert own == others
    assert live["body"] == "live"
    assert grown < 10 * MEGABYTE, grown


async def test_a_reader_that_stays_behind_is_let_go_and_comes_back_without_loss(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(slow_seconds=0.5, **AMPLE)
    token = issuer.token(user)
    async with (
        await Raw.upgraded(worker.url, token, receive_buffer=SMALL) as stalled,
        await Client.connect(worker.url, issuer.token("bob")) as sender,
    ):
        stalled.text({"type": "join", "id": 1, "room": room})
        ack = await stalled.json()
        before = len(worker.descriptors())
        for n in range(100):
            await sender.publish(room, [n, "x" * 20_000])
        await eventually(lambda: len(worker.descriptors()) < before)
        frames, code = await stalled.until_closed()
        place = frames[-1]["offset"] if code == 1006 else frames[-2]["offset"]
        async with await Client.connect(worker.url, token) as back:
            since = {"epoch": ack["epoch"], "offset": place}
            recovery = await back.join(room, since=since)
            events = await back.messages(100 - place)
        await sender.ping()

    # Its buffers are full: whether the close frame still fits is not for the server to say.
    assert code in (4430, 1006)
    assert recovery["recovered"] is True
    assert [event["body"][0] for event in events] == list(range(place, 100))


async def test_a_flood_of_pings_from_one_who_does_not_read_is_cut_off(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker(slow_seconds=0.5, **AMPLE)
    async with (
        await Raw.upgraded(worker.url, issuer.token(user), receive_buffer=SMALL) as rogue,
        await Client.connect(worker.url, issuer.token(user)) as bystander,
    ):
        before, most = worker.memory(), 0
        flood = masked(Opcode.PING, b"x" * 125) * 500
        deadline = time.monotonic() + PATIENCE
        while not rogue.closed():
            if rogue.unsent() < MEGABYTE:
                rogue.write(flood)
            await bystander.ping()
            most = max(most, worker.memory() - before)
            assert time.monotonic() < deadline, "it was not cut off"

    assert most < 10 * MEGABYTE, most


async def test_a_flood_of_pings_from_one_who_reads_is_no_trouble(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    async with (
        await Raw.upgraded(worker.url, issuer.token(user)) as raw,
        await Client.connect(worker.url, issuer.token(user)) as bystander,
    ):
        raw.write(masked(Opcode.PING, b"x") * 20_000)
        pongs = [await raw.frame() for _ in range(20_000)]
        await bystander.ping()

    assert set(pongs) == {(Opcode.PONG, b"x")}


async def test_answers_that_nobody_reads_are_bounded(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    """A page of history is 256 KiB, and a hundred may be asked for in one segment."""
    async with (
        await Raw.upgraded(worker.url, issuer.token(user), receive_buffer=SMALL) as rogue,
        await Client.connect(worker.url, issuer.token(user)) as bystander,
    ):
        for _ in range(20):
            await bystander.publish(room, "x" * 60_000)
        before, most = worker.memory(), 0
        history = json.dumps({"type": "history", "id": 1, "room": room}).encode()
        for _ in range(20):
            rogue.write(masked(Opcode.TEXT, history) * 100)
            await bystander.ping()
            most = max(most, worker.memory() - before)

    # What is under way when the reader is found to have stopped: 128 pages at most.
    assert most < 64 * MEGABYTE, most


async def test_sends_beyond_the_rate_are_refused_with_a_time_to_wait(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(send_rate=50, send_burst=10)
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        ids = [await client.command("send", room=room, body=n) for n in range(60)]
        answers = [await client.expect(lambda f: "id" in f) for _ in ids]
        refused = [answer for answer in answers if answer["type"] == "error"]
        cross = await client.ask("send", rooms=[f"{room}-{n}" for n in range(16)], body=1)
        deadline = time.monotonic() + PATIENCE
        while (ack := await client.ask("send", room=room, body="later"))["type"] == "error":
            assert time.monotonic() < deadline

    assert [answer["id"] for answer in answers] == ids
    assert 10 <= len(answers) - len(refused) < 60
    assert {answer["code"] for answer in refused} == {"rate_limited"}
    assert all(0 < answer["retry_after"] <= 1000 for answer in refused)
    limited = [result["error"] for result in cross["results"] if "error" in result]
    assert limited
    assert all(error["code"] == "rate_limited" and error["retry_after"] > 0 for error in limited)
    assert ack["offset"] == len(answers) - len(refused) + 1


async def test_a_thousand_commands_at_once_are_borne_and_answered_in_order(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker()
    async with await Raw.upgraded(worker.url, issuer.token(user)) as clumsy:
        commands = [
            {"type": kind, "id": n + 1, "room": f"{room}-{n % 7}", "body": 1}
            for n, kind in enumerate(("send", "join", "history", "ping", "leave") * 200)
        ]
        clumsy.write(b"".join(masked(Opcode.TEXT, json.dumps(c).encode()) for c in commands))
        answers: list[Frame] = []
        while len(answers) < 1000:
            if (frame := await clumsy.json())["type"] in ("ack", "error"):
                answers.append(frame)
        clumsy.text({"type": "nonsense", "id": "end"})
        while (frame := await clumsy.json()).get("id") != "end":
            pass

    assert [answer["id"] for answer in answers] == list(range(1, 1001))
    assert {a["code"] for a in answers if a["type"] == "error"} <= {"rate_limited"}


async def test_who_floods_on_is_sent_away_for_a_while(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker()
    async with await Client.connect(worker.url, issuer.token("bob")) as bystander:
        for kind in ("send", "join", "history", "ping", "nonsense"):
            async with await Raw.upgraded(worker.url, issuer.token(user)) as rogue:
                command = json.dumps({"type": kind, "room": room, "body": 1}).encode()
                rogue.write(masked(Opcode.TEXT, command) * 4000)
                frames, code = await rogue.until_closed()
                assert code == 4429, kind
                bye = frames[-1]
                assert (bye["type"], bye["code"], bye["reconnect"]) == ("bye", 4429, True)
                assert bye["after"] > 0
                codes = {f["code"] for f in frames if f["type"] == "error"}
                assert codes <= {"rate_limited", "unknown_type"}
            await bystander.ping()


async def test_peers_that_vanish_are_not_worth_a_line(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as bystander:
        await bystander.join(room)
        before = len(worker.log().splitlines())
        for _ in range(3):
            clients = await asyncio.gather(
                *[Client.connect(worker.url, issuer.token(user)) for _ in range(30)]
            )
            await asyncio.gather(*[client.join(room) for client in clients])
            for client in clients:
                await client.command("send", room=room, body=1)
            await asyncio.gather(*[client.drop() for client in clients])
        await bystander.publish(room, "end")
        await bystander.expect(lambda f: f["type"] == "message" and f["body"] == "end")

    assert len(worker.log().splitlines()) == before


async def test_without_descriptors_live_sockets_work_and_it_recovers(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker()
    limits = resource.prlimit(worker.pid, resource.RLIMIT_NOFILE)
    async with await Client.connect(worker.url, issuer.token(user)) as live:
        highest = max(worker.descriptors())
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, (highest + 4, limits[1]))
        knocking = [await Raw.connect(worker.url) for _ in range(30)]
        for _ in range(200):
            await live.ping()
        used = worker.cpu_seconds()
        began = time.monotonic()
        await eventually(lambda: time.monotonic() - began > 0.5)
        used = worker.cpu_seconds() - used
        for raw in knocking:
            await raw.__aexit__()
        resource.prlimit(worker.pid, resource.RLIMIT_NOFILE, limits)
        async with await Client.connect(worker.url, issuer.token(user)) as newcomer:
            await newcomer.ping()

    assert used < 0.4, "a busy loop"
    assert len(worker.log().splitlines()) < 10

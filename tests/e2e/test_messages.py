"""Rooms: join, replay, live, leave, send, history."""

from __future__ import annotations

import asyncio
import json
import time
from typing import Any

import pytest

from tests.conftest import AMPLE, StartWorker
from tests.support.client import Client, Frame
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, Worker

UNAVAILABLE_WITHIN = 3.0
"""The protocol promises a second; a loaded machine gets three."""


async def filled(client: Client, room: str, count: int) -> Frame:
    """Publish bodies 1, 2, 3 …; returns the last ack."""
    ids = [await client.command("send", room=room, body=n + 1) for n in range(count)]
    return await client.expect(lambda frame: frame.get("id") == ids[-1])


def places(frames: list[Frame]) -> list[int]:
    return [frame["offset"] for frame in frames]


def span(first: int, last: int) -> list[int]:
    return list(range(first, last + 1))


# --- welcome -------------------------------------------------------------------------------


async def test_the_welcome_comes_first_and_tells_everything(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker()
    token = issuer.token(user, session="s1", roles=["member", "x"], lifetime=600)
    before = int(time.time() * 1000)
    async with await Client.connect(worker.url, token) as client:
        welcome = client.welcome

    assert set(welcome) == {
        "type", "protocol", "connection", "session", "user", "roles", "ts", "expires_at",
        "ping_interval", "limits",
    }  # fmt: skip
    assert (welcome["protocol"], welcome["session"], welcome["user"]) == (1, "s1", user)
    assert welcome["roles"] == ["member", "x"]
    assert before <= welcome["ts"] <= int(time.time() * 1000)
    assert 0 < welcome["expires_at"] - before <= 600_000
    assert welcome["ping_interval"] == 25_000
    assert set(welcome["limits"]) == {
        "frame_bytes", "rooms", "send_rate", "send_burst", "command_rate", "command_burst",
        "key_window", "history", "replay",
    }  # fmt: skip
    assert welcome["limits"]["key_window"] == 600_000
    assert welcome["limits"]["command_burst"] >= welcome["limits"]["rooms"]


async def test_connections_have_names_of_their_own(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    token = issuer.token(user)
    clients = [await Client.connect(worker.url, token) for _ in range(3)]
    names = {client.welcome["connection"] for client in clients}
    await asyncio.gather(*[client.close() for client in clients])

    assert len(names) == 3


# --- join ----------------------------------------------------------------------------------


async def test_a_new_room_is_empty_and_has_an_epoch(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        ack = await client.ask("join", id="first", room=room)
        again = await client.join(room)

    assert ack == {
        "type": "ack",
        "id": "first",
        "room": room,
        "epoch": ack["epoch"],
        "offset": 0,
        "rights": "rw",
        "replay": 0,
    }
    assert again["epoch"] == ack["epoch"]


async def test_who_joins_an_empty_room_first_can_recover(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    token = issuer.token(user)
    async with await Client.connect(worker.url, token) as client:
        first = await client.join(room)
    async with await Client.connect(worker.url, token) as client:
        await filled(client, room, 3)
        since = {"epoch": first["epoch"], "offset": 0}
        ack = await client.join(room, since=since)
        replayed = await client.messages(3)

    assert (ack["recovered"], ack["replay"], ack["offset"]) == (True, 3, 3)
    assert places(replayed) == [1, 2, 3]


@pytest.mark.parametrize(("last", "replayed"), [(None, 0), (0, 0), (3, 3), (256, 10)])
async def test_last_replays_the_latest(
    worker: Worker, issuer: Issuer, user: str, room: str, last: int | None, replayed: int
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await filled(client, room, 10)
        ack = await client.join(room, **({} if last is None else {"last": last}))
        events = await client.messages(replayed)
        await client.publish(room, "live")
        [live] = await client.messages(1)

    assert ack["replay"] == replayed
    assert "recovered" not in ack
    assert places([*events, live]) == span(11 - replayed, 11)


@pytest.mark.parametrize("missed", [0, 1, 300])
async def test_what_was_missed_is_replayed_between_the_ack_and_the_first_live_event(
    worker: Worker, issuer: Issuer, user: str, room: str, missed: int
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        last = await filled(client, room, missed + 5)
        ack = await client.join(room, since={"epoch": last["epoch"], "offset": 5})
        await client.publish(room, "live")
        events = await client.messages(missed + 1)

    assert (ack["recovered"], ack["replay"], ack["offset"]) == (True, missed, missed + 5)
    assert "gap" not in ack
    assert places(events) == span(6, missed + 6)
    assert client.seen_in(room) == events


async def test_the_replay_is_ordinary_events_whatever_their_echo_was(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        ack = await client.publish(room, "quiet", echo=False)
        await client.join(room, since={"epoch": ack["epoch"], "offset": 0})
        event = await client.expect(lambda frame: "offset" in frame and frame["type"] != "ack")

    assert (event["type"], event["body"], event["offset"]) == ("message", "quiet", 1)


async def test_of_another_epoch_the_latest_fifty_are_replayed(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await filled(client, room, 60)
        ack = await client.join(room, since={"epoch": "other", "offset": 60})
        default = await client.messages(50)
        few = await client.join(room, since={"epoch": "other", "offset": 60}, last=2)
        latest = await client.messages(2)
        none = await client.join(room, since={"epoch": "other", "offset": 60}, last=0)

    assert (ack["recovered"], ack["replay"], ack["offset"]) == (False, 50, 60)
    assert "gap" not in ack
    assert places(default) == span(11, 60)
    assert (few["recovered"], few["replay"], places(latest)) == (False, 2, [59, 60])
    assert (none["recovered"], none["replay"]) == (False, 0)


async def test_a_gap_is_told_when_the_log_was_trimmed_or_too_much_was_missed(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(history=60, replay=20, send_burst=1000)
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        epoch = (await filled(client, room, 100))["epoch"]
        trimmed = await client.join(room, since={"epoch": epoch, "offset": 10})
        trimmed_events = await client.messages(50)
        too_many = await client.join(room, since={"epoch": epoch, "offset": 79}, last=5)
        too_many_events = await client.messages(5)
        just = await client.join(room, since={"epoch": epoch, "offset": 80})
        just_events = await client.messages(20)
        beyond = await client.join(room, since={"epoch": epoch, "offset": 101}, last=1)
        beyond_events = await client.messages(1)

    assert (trimmed["recovered"], trimmed["gap"]) == (False, {"from": 11, "to": 50})
    assert places(trimmed_events) == span(51, 100)
    assert (too_many["recovered"], too_many["gap"]) == (False, {"from": 80, "to": 95})
    assert places(too_many_events) == span(96, 100)
    assert just["recovered"] is True
    assert places(just_events) == span(81, 100)
    assert beyond["recovered"] is False
    assert "gap" not in beyond
    assert places(beyond_events) == [100]


async def test_joining_again_repositions(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        epoch = (await client.join(room))["epoch"]
        await filled(client, room, 5)
        await client.messages(5)
        await client.join(room, since={"epoch": epoch, "offset": 3})
        again = await client.messages(2)
        await client.publish(room, "live")
        [live] = await client.messages(1)
        await client.ping()

    assert places([*again, live]) == [4, 5, 6]
    assert places(client.seen_in(room)) == [1, 2, 3, 4, 5, 4, 5, 6]


async def test_the_seam_between_replay_and_live_has_no_hole_and_nothing_twice(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    """Joined again and again, anew and with since, while another publishes as fast as it can."""
    worker = start_worker(history=10**6, replay=10**6, **AMPLE)
    token = issuer.token(user)
    stop = asyncio.Event()

    async def hammer(publisher: Client) -> None:
        while not stop.is_set():
            for _ in range(20):
                await publisher.command("send", room=room, body="x" * 50)
            await publisher.ping()

    async def follow(joiner: Client, ack: Frame) -> int:
        """Receive the replay and some live events, check each place; returns the last."""
        await joiner.messages(ack["replay"] + 20, room)
        behind = joiner.seen[joiner.seen.index(ack) + 1 :]
        first = ack["offset"] - ack["replay"] + 1
        events = [frame for frame in behind if frame["type"] == "message"]
        assert places(events) == span(first, first + len(events) - 1)
        assert len(events) >= ack["replay"] + 20
        return int(events[-1]["offset"])

    async with await Client.connect(worker.url, token) as publisher:
        epoch = (await publisher.publish(room))["epoch"]
        hammering = asyncio.create_task(hammer(publisher))
        try:
            position = 0
            for round in range(60):
                async with await Client.connect(worker.url, token) as joiner:
                    if round % 3 == 0:
                        ack = await joiner.join(room, last=round)
                        assert ack["replay"] == min(round, ack["offset"])
                    else:
                        top = (await joiner.ask("history", room=room, limit=1))["offset"]
                        since = {"epoch": epoch, "offset": max(position, top - 300)}
                        ack = await joiner.join(room, since=since)
                        assert ack["recovered"] is True
                    position = await follow(joiner, ack)
                    # And once more on the same connection, in mid-flow.
                    ack = await joiner.join(room, since={"epoch": epoch, "offset": position - 5})
                    assert ack["recovered"] is True
                    joiner.forget()
                    position = await follow(joiner, ack)
        finally:
            stop.set()
            await hammering


async def test_a_room_left_is_silent_after_the_ack(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    other = room + "-2"
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await client.join(room)
        await client.join(other)
        await client.publish(room, 1)
        await client.messages(1)
        ack = await client.ask("leave", id=77, room=room)
        never_joined = await client.ask("leave", room=room + "-3")
        seen = len(client.seen)
        await client.publish(room, 2)
        await client.publish(other, 3)
        await client.messages(1, other)
        again = await client.join(room)

    assert ack == {"type": "ack", "id": 77, "room": room}
    assert never_joined["type"] == "ack"
    assert all(f["room"] == other for f in client.seen[seen:] if f["type"] == "message")
    assert again["offset"] == 2


async def test_no_more_rooms_than_allowed(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(rooms=2)
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        for n in range(2):
            await client.join(f"{room}-{n}")
        refused = await client.ask("join", room=f"{room}-3")
        rejoined = await client.ask("join", room=f"{room}-1")
        await client.ask("leave", room=f"{room}-0")
        accepted = await client.ask("join", room=f"{room}-3")

    assert (refused["type"], refused["code"]) == ("error", "room_limit")
    assert (rejoined["type"], accepted["type"]) == ("ack", "ack")


# --- send ----------------------------------------------------------------------------------


async def test_an_event_reaches_every_member_and_nobody_else(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with (
        await Client.connect(worker.url, issuer.token(user)) as sender,
        await Client.connect(worker.url, issuer.token("bob")) as member,
        await Client.connect(worker.url, issuer.token("eve")) as outsider,
    ):
        await sender.join(room)
        await member.join(room)
        await outsider.join(room + "-2")
        ack = await sender.ask("send", id=5, room=room, body={"text": "hi"}, key="k1")
        [own] = await sender.messages(1)
        [others] = await member.messages(1)
        await sender.publish(room + "-2")
        await outsider.messages(1)

    assert ack == {
        "type": "ack",
        "id": 5,
        "room": room,
        "epoch": ack["epoch"],
        "offset": 1,
        "ts": ack["ts"],
    }
    assert (
        own
        == others
        == {
            "type": "message",
            "room": room,
            "offset": 1,
            "ts": ack["ts"],
            "user": user,
            "body": {"text": "hi"},
            "key": "k1",
        }
    )
    assert outsider.seen_in(room) == []


async def test_sending_needs_no_joining(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        ack = await client.publish(room, 1)
        page = await client.ask("history", room=room)
        await client.ping()

    assert places(page["events"]) == [ack["offset"]]
    assert client.seen_in(room) == []


@pytest.mark.parametrize(
    "body",
    [
        "null",
        "true",
        "0",
        "-0",
        "1.50",
        "1E5",
        "123456789012345678901234567890",
        "0.1000000000000000055511151231257827",
        '""',
        '"\\u00e9\\u0000\\/ \U0001f600é\\ud83d\\ude00"',
        '{"b" : 1 , "a":[ ],"b":2}',
        "[[[[1],2],3],4]",
        '{"__proto__":{"x":1},"constructor":null}',
        "[" * 64 + "]" * 64,
        '{"":' * 64 + "0" + "}" * 64,
        '  "spaces around"  ',
        '"\\",\\"offset\\":99,\\"x\\":\\""',
    ],
)
async def test_a_body_comes_out_byte_for_byte(
    worker: Worker, issuer: Issuer, user: str, room: str, body: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await client.join(room)
        await client.send(f'{{"type":"send","room":"{room}","body":{body}}}')
        text = await client.receive_text()
        ack_text = ""
        await client.command("history", room=room)
        while '"events"' not in ack_text:
            ack_text = await client.receive_text()

    assert f'"body":{body.strip()}}}' in text
    assert json.loads(text)["offset"] == 1
    assert text in ack_text


async def test_a_repeated_key_gets_the_first_position_and_is_delivered_once(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    token, key = issuer.token(user), unique("key")
    async with await Client.connect(worker.url, token) as client:
        await client.join(room)
        first = await client.publish(room, 1, key=key)
        again = await client.publish(room, 2, key=key)
        await client.publish(room, 3)
        events = await client.messages(2)
    async with await Client.connect(worker.url, token) as client:
        later = await client.publish(room, 4, key=key)
    async with await Client.connect(worker.url, issuer.token("bob")) as bob:
        other_user = await bob.publish(room, 5, key=key)

    place = {name: first[name] for name in ("room", "epoch", "offset", "ts")}
    assert "duplicate" not in first
    assert {name: again[name] for name in place} == place
    assert again["duplicate"] is True
    assert later["duplicate"] is True
    assert later["offset"] == 1
    assert [event["body"] for event in events] == [1, 3]
    assert "duplicate" not in other_user


async def test_without_echo_the_sender_is_shown_a_skip_and_others_the_event(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    token = issuer.token(user)
    async with (
        await Client.connect(worker.url, token) as sender,
        await Client.connect(worker.url, token) as second_device,
    ):
        await sender.join(room)
        await second_device.join(room)
        await sender.publish(room, 1)
        await sender.publish(room, 2, echo=False)
        await sender.publish(room, 3)
        await sender.messages(2)
        others = await second_device.messages(3)

    assert places(others) == [1, 2, 3]
    assert [f["type"] for f in sender.seen_in(room)] == ["message", "skip", "message"]
    assert sender.seen_in(room)[1] == {"type": "skip", "room": room, "offset": 2}


async def test_a_cross_post_is_acked_room_by_room(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    rights = {f"{room}-a": "rw", f"{room}-b": "r", f"{room}-c": "rw"}
    rooms = [f"{room}-c", f"{room}-b", "dm:x:y", f"{room}-a"]
    async with await Client.connect(worker.url, issuer.token(user, rooms=rights)) as client:
        await client.join(f"{room}-a")
        ack = await client.ask("send", rooms=rooms, body="x", key="k")
        again = await client.ask("send", rooms=rooms, body="x", key="k")
        [event] = await client.messages(1)
        refused = await client.ask("send", rooms=["dm:x:y"], body="x")

    assert [result["room"] for result in ack["results"]] == rooms
    assert [result.get("offset") for result in ack["results"]] == [1, None, None, 1]
    assert [r["error"]["code"] for r in ack["results"] if "error" in r] == ["forbidden"] * 2
    assert [result.get("duplicate") for result in again["results"]] == [True, None, None, True]
    assert (event["room"], event["offset"]) == (f"{room}-a", 1)
    assert refused["type"] == "ack"
    assert refused["results"][0]["error"]["code"] == "forbidden"


async def test_a_thousand_commands_in_one_segment_are_answered_in_order(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    """Of every kind, good and bad; somebody else is served meanwhile."""
    kinds: list[dict[str, Any]] = [
        {"type": "send", "room": room, "body": "x"},
        {"type": "send", "rooms": [room, room + "-2"], "body": "x"},
        {"type": "ping"},
        {"type": "join", "room": room, "last": 2},
        {"type": "history", "room": room, "limit": 3},
        {"type": "nonsense"},
        {"type": "join", "room": "a b"},
        {"type": "leave", "room": room},
        {"type": "refresh", "token": "bad"},
        {"type": "send", "room": "dm:x:y", "body": "x"},
    ]
    async with (
        await Client.connect(worker.url, issuer.token(user)) as client,
        await Client.connect(worker.url, issuer.token("bob")) as bystander,
    ):
        transport = client.socket.transport
        assert transport is not None
        commands = [json.dumps(kinds[n % 10] | {"id": n + 1}) for n in range(1000)]
        await asyncio.gather(*[client.send(command) for command in commands])
        await bystander.ping()
        answers = [
            await client.expect(lambda frame: frame["type"] in ("ack", "error"))
            for _ in range(1000)
        ]

    assert [answer["id"] for answer in answers] == span(1, 1000)
    sends = [a["offset"] for a in answers if a["type"] == "ack" and "ts" in a and "offset" in a]
    assert sends == sorted(sends)


async def test_what_was_sent_before_a_polite_goodbye_is_stored(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    leaver = await Client.connect(worker.url, issuer.token(user))
    for n in range(10):
        await leaver.send({"type": "send", "room": room, "body": n})
    await leaver.close()
    async with await Client.connect(worker.url, issuer.token(user)) as reader:
        page = await reader.ask("history", room=room)
        while page["offset"] < 10:
            page = await reader.ask("history", room=room)

    assert [event["body"] for event in page["events"]] == list(range(10))


async def test_the_senders_order_is_the_order_of_the_room(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    clients = [await Client.connect(worker.url, issuer.token(f"{user}-{n}")) for n in range(5)]
    reader = clients[0]
    await reader.join(room)
    for n in range(100):
        for client in clients:
            await client.command("send", room=room, body=n)
    events = await reader.messages(500)
    await asyncio.gather(*[client.drop() for client in clients])

    assert places(events) == span(1, 500)
    for n in range(5):
        bodies = [event["body"] for event in events if event["user"] == f"{user}-{n}"]
        assert bodies == list(range(100))


# --- history -------------------------------------------------------------------------------


async def test_history_pages_both_ways_through_the_whole_log(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        last = await filled(client, room, 25)
        backwards: list[int] = []
        page = await client.ask("history", room=room, limit=10)
        assert (page["room"], page["epoch"], page["offset"]) == (room, last["epoch"], 25)
        while True:
            assert places(page["events"]) == sorted(places(page["events"]))
            backwards = places(page["events"]) + backwards
            if not page["more"]:
                break
            page = await client.ask("history", room=room, before=backwards[0], limit=10)
        onwards: list[int] = []
        after, more = 0, True
        while more:
            page = await client.ask("history", room=room, after=after, limit=10)
            onwards += places(page["events"])
            after, more = onwards[-1], page["more"]

    assert backwards == onwards == span(1, 25)
    assert page["events"][-1]["body"] == 25
    assert page["events"][-1]["type"] == "message"


@pytest.mark.parametrize(
    ("asked", "expected", "more"),
    [
        ({}, span(1, 10), False),
        ({"limit": 10}, span(1, 10), False),
        ({"limit": 9}, span(2, 10), True),
        ({"before": 1}, [], False),
        ({"before": 0}, [], False),
        ({"before": 2}, [1], False),
        ({"before": 2**53 - 1, "limit": 1}, [10], True),
        ({"after": 0, "limit": 10}, span(1, 10), False),
        ({"after": 0, "limit": 9}, span(1, 9), True),
        ({"after": 9}, [10], False),
        ({"after": 10}, [], False),
        ({"after": 2**53 - 1}, [], False),
    ],
)
async def test_the_ends_of_the_log(
    worker: Worker,
    issuer: Issuer,
    user: str,
    room: str,
    asked: dict[str, int],
    expected: list[int],
    more: bool,
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await filled(client, room, 10)
        page = await client.ask("history", room=room, **asked)

    assert page["type"] == "ack", page
    assert (places(page["events"]), page["more"]) == (expected, more)


async def test_a_trimmed_log_is_paged_from_its_oldest(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(history=10, send_burst=1000)
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await filled(client, room, 30)
        onwards = await client.ask("history", room=room, after=3, limit=4)
        backwards = await client.ask("history", room=room, before=23)

    assert (places(onwards["events"]), onwards["more"]) == (span(21, 24), True)
    assert (places(backwards["events"]), backwards["more"]) == ([21, 22], False)


async def test_a_page_of_large_events_ends_early_with_more(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        for n in range(10):
            await client.publish(room, str(n) + "x" * 60_000)
        onwards = await client.ask("history", room=room, after=0)
        backwards = await client.ask("history", room=room)

    assert (places(onwards["events"]), onwards["more"]) == ([1, 2, 3, 4], True)
    assert (places(backwards["events"]), backwards["more"]) == ([7, 8, 9, 10], True)


async def test_the_history_of_a_room_nobody_wrote_to_is_empty(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        page = await client.ask("history", room=room)
        joined = await client.join(room)

    assert (page["events"], page["more"], page["offset"]) == ([], False, 0)
    assert joined["epoch"] == page["epoch"]


# --- rights --------------------------------------------------------------------------------


async def test_without_the_right_everything_is_forbidden_alike(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    """Whether the room exists or not."""
    async with await Client.connect(worker.url, issuer.token(user)) as owner:
        await owner.publish(f"{room}-there")
    claim = {f"{room}-mine": "r"}
    async with await Client.connect(worker.url, issuer.token("eve", rooms=claim)) as eve:
        answers = [
            await eve.ask(type, id="x", room=f"{room}-{name}", body=1)
            for type in ("join", "history", "send")
            for name in ("there", "not")
        ]
        allowed = await eve.ask("join", room=f"{room}-mine")
        read_only = await eve.ask("send", room=f"{room}-mine", body=1)

    assert {json.dumps(answer) for answer in answers} == {json.dumps(answers[0])}
    assert answers[0]["code"] == "forbidden"
    assert (allowed["type"], allowed["rights"]) == ("ack", "r")
    assert read_only["code"] == "forbidden"


@pytest.mark.parametrize(
    ("roles", "rights"),
    [
        (["guest"], "r"),
        (["member"], "rw"),
        (["moderator"], "rwm"),
        (["admin"], "rwm"),
        (["service"], "rwm"),
        (["guest", "stranger", "member"], "rw"),
        (["stranger"], None),
        ([], None),
    ],
)
async def test_roles_give_rights_in_every_room(
    worker: Worker, issuer: Issuer, user: str, room: str, roles: list[str], rights: str | None
) -> None:
    async with await Client.connect(worker.url, issuer.token(user, roles=roles)) as client:
        answer = await client.ask("join", room=room)

    assert answer.get("rights") == rights
    assert answer.get("code") == (None if rights else "forbidden")


async def test_of_several_patterns_only_the_longest_counts(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    claim = {"*": "rwm", f"{room}*": "rw", f"{room}-a*": "r", f"{room}-abc": "w", f"{room}-n*": ""}
    expected = {"-x": "rw", "": "rw", "-a": "r", "-ab": "r", "-abcd": "r", "-abc": None, "-n": None}
    token = issuer.token(user, rooms=claim, roles=["admin"])
    async with await Client.connect(worker.url, token) as client:
        rights = {
            suffix: (await client.ask("join", room=room + suffix)).get("rights")
            for suffix in expected
        }
        elsewhere = await client.join("z" + room)

    assert rights == expected
    assert elsewhere["rights"] == "rwm"


async def test_a_direct_room_is_open_to_its_two_users_only(worker: Worker, issuer: Issuer) -> None:
    a, b, c = sorted(unique(letter) for letter in "abc")
    tokens = {
        a: issuer.token(a, rooms={}),
        b: issuer.token(b, roles=["guest"]),
        c: issuer.token(c, roles=["admin"], rooms={"*": "rwm", f"dm:{a}:{b}": "rwm"}),
    }
    answers: dict[str, list[str | None]] = {}
    for name, token in tokens.items():
        async with await Client.connect(worker.url, token) as client:
            rooms = (f"dm:{a}:{b}", f"dm:{b}:{a}", f"dm:{a}:{b}:{c}", f"dm:{name}", f"dm:{a}:{a}")
            answers[name] = [(await client.ask("join", room=r)).get("rights") for r in rooms]

    assert answers[a] == ["rw", None, None, None, None]
    assert answers[b] == ["rw", None, None, None, None]
    assert answers[c] == [None] * 5


# --- the store is away ---------------------------------------------------------------------


@pytest.mark.usefixtures("prompt")
async def test_with_the_store_frozen_a_send_is_unavailable_soon_and_never_acked(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(own_valkey, **AMPLE)
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await client.join(room)
        await client.publish(room, 1)
        own_valkey.freeze()
        for command in ("send", "history", "join"):
            asked = time.monotonic()
            answer = await client.ask(command, room=room, body=2, key="k2")
            assert (answer["type"], answer["code"]) == ("error", "unavailable"), command
            assert time.monotonic() - asked < UNAVAILABLE_WITHIN, command
        cross = await client.ask("send", rooms=[room, room + "-2"], body=3)
        pong = await client.ping()
        own_valkey.thaw()
        deadline = time.monotonic() + PATIENCE
        while (ack := await client.ask("send", room=room, body=2, key="k2"))["type"] == "error":
            assert ack["code"] == "unavailable"
            assert time.monotonic() < deadline
        await client.publish(room, "end")
        await client.expect(lambda f: f["type"] == "message" and f["body"] == "end")

    assert [result["error"]["code"] for result in cross["results"]] == ["unavailable"] * 2
    assert pong["type"] == "ack"
    events = client.seen_in(room)
    assert places(events) == span(1, len(events))
    assert [event["body"] for event in events].count(2) == 1


async def test_sockets_stay_through_a_crash_of_the_store_and_nothing_is_lost(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str, room: str
) -> None:
    """It is started again on its append-only file, in which all that was acked is."""
    worker = start_worker(own_valkey, **AMPLE)
    async with (
        await Client.connect(worker.url, issuer.token(user)) as client,
        await Client.connect(worker.url, issuer.token("bob")) as bob,
    ):
        await bob.join(room)
        before = [(await client.publish(room, n))["offset"] for n in range(10)]
        own_valkey.kill()
        refused = await client.ask("send", room=room, body="lost", key="k")
        own_valkey.start()
        deadline = time.monotonic() + PATIENCE
        while (ack := await client.ask("send", room=room, body="end", key="k"))["type"] != "ack":
            assert time.monotonic() < deadline
        await bob.expect(lambda f: f["type"] == "message" and f["body"] in ("end", "lost"))

    assert refused["code"] == "unavailable"
    assert places(bob.seen_in(room)) == span(1, ack["offset"])
    assert before == span(1, 10)


async def test_a_store_that_came_back_empty_is_told_with_a_reset(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(own_valkey, **AMPLE)
    async with (
        await Client.connect(worker.url, issuer.token(user)) as client,
        await Client.connect(worker.url, issuer.token("bob")) as bob,
    ):
        old = await bob.join(room)
        for n in range(3):
            await client.publish(room, n)
        await bob.messages(3)
        own_valkey.command("FLUSHALL")
        ack = await client.publish(room, "new")
        reset = await bob.expect("reset")
        [event] = await bob.messages(1)
        rejoined = await client.join(room, since={"epoch": old["epoch"], "offset": 3})

    assert ack["offset"] == 1
    assert ack["epoch"] != old["epoch"]
    assert reset == {"type": "reset", "room": room, "epoch": ack["epoch"], "offset": 0}
    assert (event["offset"], event["body"]) == (1, "new")
    assert (rejoined["recovered"], rejoined["epoch"]) == (False, ack["epoch"])


async def test_joining_a_room_whose_log_was_lost_tells_its_members(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str, room: str
) -> None:
    """And does not read the log over and over until somebody writes."""
    worker = start_worker(own_valkey, **AMPLE)

    def scripts_run() -> int:
        stats = own_valkey.command("INFO", "commandstats").decode()
        return int(stats.split("cmdstat_evalsha:calls=")[1].split(",")[0])

    async with (
        await Client.connect(worker.url, issuer.token(user)) as client,
        await Client.connect(worker.url, issuer.token("bob")) as bob,
    ):
        old = await bob.join(room)
        await client.publish(room, 1)
        await bob.messages(1)
        own_valkey.command("FLUSHALL")
        joined = await client.join(room)
        before = scripts_run()
        for _ in range(200):
            await client.ping()
        run = scripts_run() - before
        reset = await bob.expect("reset")
        ack = await client.publish(room, "new")
        events = [(await who.messages(1))[0] for who in (client, bob)]

    assert joined["epoch"] == ack["epoch"] != old["epoch"]
    assert run < 50
    assert (reset["epoch"], reset["offset"]) == (ack["epoch"], 0)
    assert places(events) == [1, 1]


async def test_garbage_on_a_rooms_channel_is_ignored(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(own_valkey, **AMPLE)
    name = f"chat:room:{{{room}}}:live"
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        epoch = (await client.join(room))["epoch"].encode()
        garbage = [
            b"",
            b"\xff\xfe",
            b"nonsense",
            epoch + b" x - {}",
            epoch + b" 1 - null",
            epoch + b" 7 - " + b'{"type":"message"}',
            epoch + b" -7 - " + b'{"type":"message"}',
            b"other 1 - " + b'{"type":"message"}',
            b"x" * 100_000,
        ]
        for payload in garbage:
            assert own_valkey.command("PUBLISH", name, payload) == b":1"
        await client.publish(room, 1)
        await client.publish(room, 2)
        events = await client.messages(2)
        await client.ping()

    assert [event["body"] for event in events] == [1, 2]
    assert places(client.seen_in(room)) == [1, 2]


async def test_pub_sub_that_is_killed_again_and_again_loses_nothing(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(own_valkey, **AMPLE)
    async with (
        await Client.connect(worker.url, issuer.token(user)) as client,
        await Client.connect(worker.url, issuer.token("bob")) as bob,
    ):
        await bob.join(room)
        acked = []
        for round in range(10):
            own_valkey.command("CLIENT", "KILL", "TYPE", "pubsub")
            acked += [(await client.publish(room, (round, n)))["offset"] for n in range(10)]
        events = await bob.messages(100)

    assert places(events) == acked == span(1, 100)

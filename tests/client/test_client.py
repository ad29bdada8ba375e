from __future__ import annotations

import asyncio
import itertools
import json
import socket
import time
from contextlib import AbstractAsyncContextManager
from types import SimpleNamespace
from typing import Any

import pytest

from chatserver.client import (
    ChatError,
    Client,
    Closed,
    CommandError,
    Connecting,
    DisconnectedError,
    Event,
    Gap,
    Left,
    Message,
    Open,
    Position,
    Refreshed,
    RefusedError,
    Room,
    State,
    TokenRefusedError,
    UnknownOutcomeError,
    Waiting,
    backoff,
    clock,
    connect,
    connection,
)
from tests.client.scripted import Peer, Script, refusal, refused, scripted


async def take(room: Room, count: int) -> list[Event]:
    return [await anext(room) for _ in range(count)]


def offsets(events: list[Event]) -> list[int]:
    return [event.position.offset for event in events if isinstance(event, Message)]


def swift(url: str, **options: Any) -> AbstractAsyncContextManager[Client]:
    """Comes back at once."""
    return connect(url, **({"token": "t", "backoff": (0, 0)} | options))


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is refused for now is repeated at once, unless told otherwise."""
    monkeypatch.setattr(backoff, "LONGEST_AGAIN", 0)


# The handshake.


async def test_the_token_goes_in_the_header_and_the_welcome_is_kept() -> None:
    async def script(peer: Peer) -> None:
        assert peer.socket.request is not None
        assert peer.socket.request.headers["Authorization"] == "Bearer t0ken"
        assert peer.socket.subprotocol == "chat.v1"
        await peer.welcome()

    async with scripted(script) as url, connect(url, token="t0ken") as client:
        assert client.welcome.user == "alice"
        assert client.welcome.limits.key_window == 600_000
        assert client.expires_at == 900_000
        assert repr(client) == "<Client c1 of alice open>"


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (refused(401, "token_expired"), (401, "token_expired", "No.", None)),
        (refused(403, "origin_denied"), (403, "origin_denied", "No.", None)),
        (refused(429, "rate_limited", Retry_After="7"), (429, "rate_limited", "No.", 7000)),
        (refused(503, "draining", Retry_After="soon"), (503, "draining", "No.", None)),
        (refusal(502, "<html>"), (502, None, "Bad Gateway", None)),
        (refusal(404, '{"error": "no"}'), (404, None, "Not Found", None)),
        (refusal(307, "", Location="ws://elsewhere/"), (307, None, "Temporary Redirect", None)),
    ],
)
async def test_a_refusal_tells_status_code_and_wait(response: Any, expected: Any) -> None:
    async with scripted(response) as url:
        with pytest.raises(RefusedError) as caught:
            async with connect(url, token="t", patience=0):
                pass

    error = caught.value
    assert (error.status, error.code, error.message, error.retry_after) == expected


async def test_nobody_listening_is_a_disconnect_that_is_not_final() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(DisconnectedError) as caught:
        async with connect(f"ws://127.0.0.1:{port}/v1/ws", token="t", patience=0):
            pass

    assert caught.value.code == 1006
    assert not caught.value.final


@pytest.mark.parametrize("say", ["ack", "message"])
async def test_a_server_that_does_not_begin_with_a_welcome_is_none(say: str) -> None:
    async with scripted(*[lambda peer: peer.say(say)] * 3) as url:
        with pytest.raises(DisconnectedError) as caught:
            async with swift(url):
                pass

    assert caught.value.code == 1002


@pytest.mark.parametrize(
    "limits", [{"interval": 0}, {"send_rate": 0}, {"command_burst": 0}, {"key_window": -1}]
)
async def test_a_welcome_that_allows_nothing_is_none(limits: dict[str, int]) -> None:
    async with scripted(*[lambda peer: peer.welcome(**limits)] * 3) as url:
        with pytest.raises(DisconnectedError, match="malformed 'welcome'"):
            async with swift(url):
                pass


async def test_a_queue_without_space_is_none() -> None:
    with pytest.raises(ValueError, match="queue"):
        async with connect("ws://127.0.0.1:9/", token="t", queue=0):
            pass


async def test_a_server_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def script(peer: Peer) -> None:
        await peer.socket.wait_closed()

    monkeypatch.setattr("chatserver.client.lifeline.CONNECT_SECONDS", 0.05)
    async with scripted(script) as url:
        with pytest.raises(DisconnectedError, match="no answer"):
            async with connect(url, token="t", patience=0):
                pass


async def test_a_goodbye_in_the_place_of_the_welcome_tells_its_reason() -> None:
    async with scripted(lambda peer: peer.bye(1013, "overloaded", after=5)) as url:
        with pytest.raises(DisconnectedError) as caught:
            async with connect(url, token="t", patience=0):
                pass

    assert (caught.value.code, caught.value.after) == (1013, 5)


async def test_entering_goes_on_trying_as_long_as_the_patience_lasts() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()

    refusals = (
        refused(503, "draining", Retry_After="0"),
        refused(426, "upgrade_required"),
        refusal(502, ""),
    )
    async with scripted(*refusals, script) as url, swift(url, patience=20) as client:
        assert client.state == Open("c1")


async def test_patience_ends_with_a_server_that_welcomes_and_goes_at_once() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.bye(1013, "overloaded", after=200)

    async with scripted(script, script) as url:
        with pytest.raises(DisconnectedError, match="1013"):
            async with connect(url, token="t", patience=0.3):
                pass


@pytest.mark.parametrize(
    ("url", "token"),
    [("http://here/", "t"), ("ws://here/", "secret\r\nX: y"), ("ws://here/", "secret ")],
)
async def test_what_can_be_no_url_or_no_token_is_a_value_error(url: str, token: str) -> None:
    with pytest.raises(ValueError, match=r"token|URL") as caught:
        async with connect(url, token=token):
            pass

    assert "secret" not in str(caught.value)


# Events and positions.


async def test_the_replay_comes_first_then_live_events_each_once() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        join = await peer.admit(12, replay=2, recovered=True)
        assert join["since"] == {"epoch": "e1", "offset": 10}
        for offset in (12, 13, 13, 11, 14):
            await peer.message(offset)

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general", since=Position("e1", 10))
        assert (room.rights, room.head) == ("rw", Position("e1", 12))
        assert room.position == Position("e1", 10)
        events = await take(room, 4)

    assert offsets(events) == [11, 12, 13, 14]
    assert events[0] == Message("general", Position("e1", 11), 1, "bob", {"text": "m11"})
    assert room.position == Position("e1", 14)


async def test_last_is_asked_for_and_since_left_out() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        join = await peer.admit(12, replay=2)
        assert join == {"type": "join", "id": 1, "room": "general", "last": 2}

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general", last=2)
        assert offsets(await take(room, 2)) == [11, 12]


async def test_skips_and_unknown_types_move_the_position_and_ephemeral_frames_do_not() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.say("skip", room="general", offset=1)
        await peer.say("wink", room="general", offset=2, at=["bob"])
        await peer.say("typing", room="general", user="bob")
        await peer.say("message", room="elsewhere", offset=77)
        await peer.say("weather", room=["odd"], offset=77)
        await peer.message(3)

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        assert offsets(await take(room, 1)) == [3]


async def test_a_hole_leads_to_a_join_with_since_and_what_follows_it_waits_for_the_ack() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(4)
        await peer.message(5)
        await peer.message(8)
        await peer.message(9)
        join = await peer.admit(9, replay=4, recovered=True)
        assert join["since"] == {"epoch": "e1", "offset": 5}
        await peer.message(10)

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        assert offsets(await take(room, 6)) == [5, 6, 7, 8, 9, 10]


async def test_a_repair_refused_for_now_is_tried_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(4)
        await peer.message(6)
        await peer.error(await peer.expect("join"), "rate_limited", retry_after=20)
        await peer.error(await peer.expect("join"), "unavailable")
        await peer.admit(6, replay=2, recovered=True)

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        assert offsets(await take(room, 2)) == [5, 6]


async def test_a_room_left_during_its_repair_stays_left() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(4)
        await peer.message(6)
        join = await peer.expect("join")
        hole.set()
        leave = await peer.expect("leave")
        await peer.ack(join, room="general", epoch="e1", offset=6, rights="rw", replay=1)
        await peer.message(6)
        await peer.ack(leave, room="general")

    hole = asyncio.Event()
    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        await hole.wait()
        await room.leave()
        assert [event async for event in room] == []


async def test_a_repair_refused_for_good_ends_the_stay() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(4)
        await peer.message(6)
        await peer.error(await peer.expect("join"), "forbidden")

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        assert [event async for event in room] == [Left("general", "forbidden")]


async def test_what_could_not_be_recovered_is_told_before_what_follows_it() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        gap = {"from": 2, "to": 8}
        await peer.admit(9, replay=1, recovered=False, gap=gap)

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general", since=Position("e1", 1))
        gap, message = await take(room, 2)

    assert gap == Gap("general", Position("e1", 8), first=2, last=8)
    assert offsets([message]) == [9]


async def test_a_new_epoch_keeps_the_offset_and_a_reset_sets_both() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(4)
        await peer.say("epoch", room="general", epoch="e2")
        await peer.message(5)
        await peer.say("reset", room="general", epoch="e3", offset=2)
        await peer.message(3)

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        first, reset, second = await take(room, 3)

    assert isinstance(first, Message)
    assert isinstance(second, Message)
    assert first.position == Position("e2", 5)
    assert reset == Gap("general", Position("e3", 2))
    assert second.position == Position("e3", 3)


async def test_an_ack_below_what_was_reached_moves_back() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(4)
        await peer.message(6)
        await peer.admit(2, replay=1, recovered=False)

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        gap, message = await take(room, 2)

    assert gap == Gap("general", Position("e1", 1))
    assert offsets([message]) == [2]


async def test_leaving_and_being_made_to_leave_end_the_iteration() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.message(1)
        await peer.say("left", room="general", reason="kicked")
        await peer.message(2)
        await peer.admit(2)
        leave = await peer.expect("leave", room="general")
        await peer.message(3)
        await peer.ack(leave, room="general")

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        message, left = [event async for event in room]
        again = await client.join("general")
        await again.leave()
        assert [event async for event in again] == []

    assert offsets([message]) == [1]
    assert left == Left("general", "kicked")


async def test_joining_again_ends_the_room_of_before() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(1, replay=1)
        await peer.admit(1, replay=1)

    async with scripted(script) as url, connect(url, token="t") as client:
        before = await client.join("general", last=1)
        after = await client.join("general", last=1)
        await before.leave()
        assert offsets([event async for event in before]) == [1]
        assert offsets(await take(after, 1)) == [1]


async def test_a_join_overtaken_by_another_a_leave_or_the_end_is_no_room() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        for expected in ("join", "join", "leave", "join"):
            if (await peer.expect(expected))["type"] == "leave":
                await peer.ack({"id": 3}, room="general")

    async def join() -> asyncio.Task[Room]:
        joining = asyncio.create_task(client.join("general"))
        await asyncio.sleep(0)
        return joining

    async with scripted(script) as url, connect(url, token="t") as client:
        overtaken, left = await join(), await join()
        with pytest.raises(ChatError, match="joined again"):
            await overtaken
        await client.leave("general")
        with pytest.raises(ChatError, match="left"):
            await left
        waiting = await join()
        await client.close()
        with pytest.raises(DisconnectedError, match="1000 closed by this client"):
            await waiting


async def test_a_full_queue_lets_events_go_and_asks_for_them_when_it_has_drained() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        for offset in range(1, 8):
            await peer.message(offset)
        await peer.ack(await peer.expect("ping"), ts=5)
        join = await peer.admit(8, replay=5, recovered=True)
        assert join["since"] == {"epoch": "e1", "offset": 3}

    async with scripted(script) as url, connect(url, token="t", queue=3) as client:
        room = await client.join("general")
        assert await client.ping() == 5
        assert offsets(await take(room, 3)) == [1, 2, 3]
        assert offsets(await take(room, 3)) == [4, 5, 6]


# Commands and replies.


async def test_replies_find_their_command_by_id() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        first, second = await peer.expect("send"), await peer.expect("send")
        await peer.ack(second, room="general", epoch="e1", offset=2, ts=1)
        await peer.say("ack", id=999, room="general")
        await peer.ack(first, room="general", epoch="e1", offset=1, ts=1)

    async with scripted(script) as url, connect(url, token="t") as client:
        first, second = await asyncio.gather(
            client.send("general", "a"), client.send("general", "b")
        )

    assert (first, second) == (Position("e1", 1), Position("e1", 2))


async def test_a_key_is_fresh_by_default_and_an_echo_is_declined_only_when_asked() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        for _ in range(3):
            send = await peer.expect("send", room="general", body=None)
            await peer.ack(send, room="general", epoch="e1", offset=1, ts=1)
            sent.append(send)

    sent: list[dict[str, Any]] = []
    async with scripted(script) as url, connect(url, token="t") as client:
        await client.send("general", None)
        await client.send("general", None)
        await client.send("general", None, key="mine", echo=False)

    keys = [send["key"] for send in sent]
    assert len(set(keys)) == 3
    assert [len(key) for key in keys] == [36, 36, 4]
    assert [send.get("echo") for send in sent] == [None, None, False]


async def test_an_error_is_typed_and_the_connection_goes_on() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.say("error", code="internal", message="Nobody asked.")
        await peer.error(await peer.expect("send"), "invalid", path="$.body")
        await peer.ack(await peer.expect("ping"), ts=7)

    async with scripted(script) as url, connect(url, token="t") as client:
        with pytest.raises(CommandError) as invalid:
            await client.send("general", 1)
        assert await client.ping() == 7

    assert (invalid.value.message, invalid.value.path) == ("No.", "$.body")
    assert not invalid.value.temporary


async def test_what_is_refused_for_now_is_repeated() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        for kind in ("join", "history", "ping"):
            await peer.error(await peer.expect(kind), "unavailable")
            await peer.error(await peer.expect(kind), "rate_limited", retry_after=10)
            again = await peer.expect(kind)
            await peer.ack(again, **answers[kind])

    log_end = {"room": "general", "epoch": "e1", "offset": 0}
    answers: dict[str, dict[str, Any]] = {
        "join": log_end | {"rights": "r", "replay": 0},
        "history": log_end | {"events": [], "more": False},
        "ping": {"ts": 3},
    }

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        assert (await room.history()).messages == ()
        assert await client.ping() == 3


async def test_commands_go_out_no_faster_than_the_server_allows() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(send_rate=20, send_burst=2)
        for offset in range(1, 5):
            send = await peer.expect("send")
            at.append(time.monotonic())
            await peer.ack(send, room="general", epoch="e1", offset=offset, ts=1)

    at: list[float] = []
    async with scripted(script) as url, connect(url, token="t") as client:
        began = time.monotonic()
        await asyncio.gather(*(client.send("general", n) for n in range(4)))

    assert at[3] - began > 0.09


async def test_a_join_refused_is_no_room() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.error(await peer.expect("join"), "forbidden")

    async with scripted(script) as url, connect(url, token="t") as client:
        with pytest.raises(CommandError, match="forbidden"):
            await client.join("general")


async def test_what_would_end_the_connection_is_not_sent() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(frame_bytes=100)
        await peer.ack(await peer.expect("ping"), ts=1)

    async with scripted(script) as url, connect(url, token="t") as client:
        with pytest.raises(CommandError, match="too_large"):
            await client.send("general", "x" * 100)
        with pytest.raises(ValueError, match="JSON"):
            await client.send("general", float("nan"))
        with pytest.raises(UnicodeEncodeError):
            await client.send("general", "\ud800")
        await client.ping()


async def test_a_command_without_a_reply_ends_at_its_deadline_and_a_late_ack_is_ignored() -> None:
    timed_out = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.welcome()
        late = await peer.expect("ping")
        await timed_out.wait()
        await peer.ack(late, ts=1)
        await peer.message(1)

    async with scripted(script) as url, connect(url, token="t", deadline=0.05) as client:
        with pytest.raises(TimeoutError):
            await client.ping()
        timed_out.set()


async def test_a_join_given_up_is_left_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        join = await peer.expect("join")
        leave = await peer.expect("leave", room="general")
        await peer.ack(join, room="general", epoch="e1", offset=0, rights="r", replay=0)
        await peer.ack(leave, room="general")
        left.set()

    left = asyncio.Event()
    async with scripted(script) as url, connect(url, token="t", deadline=0.05) as client:
        with pytest.raises(TimeoutError):
            await client.join("general")
        await left.wait()


async def test_a_page_of_history_keeps_its_span_when_not_all_of_it_is_known() -> None:
    def event(offset: int, kind: str = "message") -> dict[str, Any]:
        return {"type": kind, "room": "general", "offset": offset, "ts": 1, "user": "b", "body": 1}

    async def script(peer: Peer) -> None:
        await peer.welcome()
        ask = await peer.expect("history", room="general", before=9, limit=3)
        events = [event(6, "edit"), event(7), event(8)]
        await peer.ack(ask, room="general", epoch="e1", offset=20, events=events, more=True)
        ask = await peer.expect("history", room="general", after=20)
        await peer.ack(ask, room="general", epoch="e1", offset=20, events=[], more=False)

    async with scripted(script) as url, connect(url, token="t") as client:
        page = await client.history("general", before=9, limit=3)
        empty = await client.history("general", after=20)

    assert [message.position.offset for message in page.messages] == [7, 8]
    assert (page.position, page.first, page.last, page.more) == (Position("e1", 20), 6, 8, True)
    assert (empty.messages, empty.first, empty.last, empty.more) == ((), None, None, False)


# Coming back.


async def test_a_lost_connection_is_made_again_and_every_room_joined_where_it_was() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        for room in ("general", "other"):
            join = await peer.expect("join", room=room)
            await peer.ack(join, room=room, epoch="e1", offset=3, rights="rw", replay=0)
        await peer.message(4)
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.welcome()
        # In one burst: no answer is waited for.
        joins = [await peer.expect("join") for _ in range(2)]
        since = {join["room"]: join["since"]["offset"] for join in joins}
        assert since == {"general": 4, "other": 3}
        assert "last" not in joins[0]
        for join in joins:
            room, offset = join["room"], since[join["room"]]
            ack = {"epoch": "e1", "offset": offset + 1, "rights": "rw", "replay": 1}
            await peer.ack(join, room=room, recovered=True, **ack)
            await peer.message(offset + 1, room=room)

    async with scripted(first, second) as url, swift(url) as client:
        general = await client.join("general", last=2)
        other = await client.join("other")
        assert offsets(await take(general, 2)) == [4, 5]
        assert offsets(await take(other, 1)) == [4]


async def test_its_state_is_told_with_the_reason_and_the_time_of_the_next_try() -> None:
    states: list[State] = []

    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.bye(1012, "draining", after=50)

    async def second(peer: Peer) -> None:
        await peer.welcome()
        back.set()

    back, before = asyncio.Event(), time.time()
    async with (
        scripted(first, refused(503, "overloaded", Retry_After="0"), second) as url,
        swift(url, on_state=states.append) as client,
    ):
        await back.wait()
        await client.opened()
        assert client.state == Open("c1")

    drained, overloaded = (state for state in states if isinstance(state, Waiting))
    kinds = [Open, Waiting, Connecting, Waiting, Connecting, Open, Closed]
    assert [type(state) for state in states] == kinds
    assert states[-1] == Closed(None)
    assert isinstance(drained.why, DisconnectedError)
    assert (drained.why.code, drained.why.reason) == (1012, "draining")
    assert before + 0.05 <= drained.until <= time.time()
    assert isinstance(overloaded.why, RefusedError)
    assert overloaded.why.status == 503


async def test_an_application_that_fails_to_hear_of_a_state_harms_nobody() -> None:
    def broken(state: State) -> None:
        raise ZeroDivisionError

    async with scripted(Peer.welcome) as url, swift(url, on_state=broken) as client:
        assert client.state == Open("c1")


async def test_what_could_not_be_recovered_after_a_reconnect_is_an_event_of_the_room() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(5)
        await peer.message(6)
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(2, replay=1, epoch="e2", recovered=False)

    async with scripted(first, second) as url, swift(url) as client:
        room = await client.join("general")
        message, gap, after = await take(room, 3)
        assert not room.recovered

    assert offsets([message, after]) == [6, 2]
    assert gap == Gap("general", Position("e2", 1))


async def test_a_room_refused_after_a_reconnect_ends_and_the_others_go_on() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        other = await peer.expect("join", room="other")
        await peer.ack(other, room="other", epoch="e1", offset=0, rights="r", replay=0)
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.welcome()
        await peer.error(await peer.expect("join", room="general"), "forbidden")
        other = await peer.expect("join", room="other")
        ack = {"epoch": "e1", "offset": 0, "rights": "r", "replay": 0, "recovered": True}
        await peer.ack(other, room="other", **ack)
        await peer.message(1, room="other")

    async with scripted(first, second) as url, swift(url) as client:
        general, other = await client.join("general"), await client.join("other")
        assert [event async for event in general] == [Left("general", "forbidden")]
        assert offsets(await take(other, 1)) == [1]


async def test_a_room_whose_queue_is_full_is_not_joined_before_it_has_space() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        for offset in range(1, 4):
            await peer.message(offset)
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)
        join = await peer.admit(4, replay=2, recovered=True)
        assert join["since"]["offset"] == 2

    async with scripted(first, second) as url, swift(url, queue=2) as client:
        room = await client.join("general")
        while isinstance(client.state, Open):
            await asyncio.sleep(0)
        await client.ping()
        assert offsets(await take(room, 4)) == [1, 2, 3, 4]


async def test_a_join_and_other_commands_wait_for_the_next_connection() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        for _ in range(2):
            await peer.hear()
        await peer.bye(1012, "draining", after=1)

    async def second(peer: Peer) -> None:
        await peer.welcome()
        join = await peer.admit(1, replay=1)
        assert join["last"] == 1
        await peer.ack(await peer.expect("ping"), ts=7)

    async with scripted(first, second) as url, swift(url) as client:
        async with asyncio.TaskGroup() as tasks:
            joining = tasks.create_task(client.join("general", last=1))
            pinging = tasks.create_task(client.ping())
        assert offsets(await take(joining.result(), 1)) == [1]
        assert pinging.result() == 7


async def test_a_room_left_while_there_is_no_connection_is_not_joined_again() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.bye(1012, "draining", after=100)

    async def second(peer: Peer) -> None:
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    async with scripted(first, second) as url, swift(url) as client:
        room = await client.join("general")
        while isinstance(client.state, Open):
            await asyncio.sleep(0)
        await room.leave()
        assert [event async for event in room] == []
        await client.ping()


async def test_a_link_without_a_sign_of_life_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome(interval=100)
        await peer.expect("ping")
        # It stays, and says nothing: not even a pong.
        await peer.socket.wait_closed()

    async def second(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)

    states: list[State] = []
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.1)
    async with scripted(first, second) as url, swift(url, on_state=states.append) as client:
        while not any(isinstance(state, Waiting) for state in states):
            await asyncio.sleep(0.01)
        await client.join("general")

    (waiting,) = (state for state in states if isinstance(state, Waiting))
    assert "no sign of life" in str(waiting.why)


async def test_pongs_and_pieces_of_frames_are_signs_of_life(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(interval=100)
        for _ in range(10):
            await (await peer.socket.ping())
            await asyncio.sleep(0.05)
        done.set()

    done, states = asyncio.Event(), list[State]()
    monkeypatch.setattr(connection, "ANSWER_SECONDS", 0.1)
    async with scripted(script) as url, swift(url, on_state=states.append):
        await done.wait()

    assert [type(state) for state in states] == [Open, Closed]


# Messages.


async def test_a_message_whose_ack_was_lost_is_repeated_with_its_key() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        keys.append((await peer.expect("send", body="a"))["key"])
        keys.append((await peer.expect("send", body="b"))["key"])
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.welcome()
        for offset, body in enumerate("abc", 1):
            send = await peer.expect("send", body=body)
            keys.append(send["key"])
            ack = {"room": "general", "epoch": "e1", "offset": offset, "ts": 1}
            await peer.ack(send, **ack, duplicate=True)

    keys: list[str] = []
    async with scripted(first, second) as url, swift(url) as client:
        sending = [asyncio.create_task(client.send("general", body)) for body in "ab"]
        while len(keys) < 2:
            await asyncio.sleep(0.001)
        sending.append(asyncio.create_task(client.send("general", "c")))
        positions = await asyncio.gather(*sending)

    assert positions == [Position("e1", offset) for offset in (1, 2, 3)]
    assert keys[:2] == keys[2:4]
    assert len(set(keys)) == 3


async def test_a_message_refused_for_now_is_repeated_with_its_key() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        first = await peer.expect("send")
        await peer.error(first, "rate_limited", retry_after=20)
        await peer.error(await peer.expect("send", key=first["key"]), "unavailable")
        await peer.error(await peer.expect("send", key=first["key"]), "internal")
        last = await peer.expect("send", key=first["key"], echo=False)
        await peer.ack(last, room="general", epoch="e1", offset=1, ts=1)

    async with scripted(script) as url, swift(url) as client:
        assert await client.send("general", 1, echo=False) == Position("e1", 1)


async def test_a_message_whose_key_may_be_forgotten_fails_visibly_and_is_not_repeated() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome(key_window=100)
        await peer.expect("send", key="mine")
        await peer.bye(1012, "draining", after=200)

    async def second(peer: Peer) -> None:
        await peer.welcome(key_window=100)
        await peer.ack(await peer.expect("ping"), ts=1)

    async with scripted(first, second) as url, swift(url) as client:
        with pytest.raises(UnknownOutcomeError) as caught:
            await client.send("general", 1, key="mine")
        await client.ping()

    assert (caught.value.key, caught.value.why) == ("mine", None)


async def test_keys_are_forgotten_while_this_machine_sleeps(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.expect("send")
        woken = SimpleNamespace(monotonic=time.monotonic, time=lambda: time.time() + 1200)
        monkeypatch.setattr(clock, "time", woken)
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    async with scripted(first, second) as url, swift(url) as client:
        with pytest.raises(UnknownOutcomeError):
            await client.send("general", 1)
        await client.ping()


async def test_messages_wait_when_too_many_are_unacknowledged(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        sends = [await peer.expect("send") for _ in range(2)]
        await peer.ack(await peer.expect("ping"), ts=1)
        for offset, send in enumerate(sends, 1):
            await peer.ack(send, room="general", epoch="e1", offset=offset, ts=1)
        third = await peer.expect("send", body=2)
        await peer.ack(third, room="general", epoch="e1", offset=3, ts=1)

    monkeypatch.setattr("chatserver.client.client.UNACKNOWLEDGED", 2)
    async with scripted(script) as url, connect(url, token="t") as client:
        sending = [asyncio.create_task(client.send("general", n)) for n in range(3)]
        await asyncio.sleep(0)
        await client.ping()
        await asyncio.gather(*sending)


async def test_a_message_given_up_is_not_repeated() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.expect("send")
        heard.set()
        await peer.expect("ping")
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    heard = asyncio.Event()
    async with scripted(first, second) as url, swift(url) as client:
        sending = asyncio.create_task(client.send("general", 1))
        await heard.wait()
        sending.cancel()
        await client.ping()
        assert sending.cancelled()


# The token.


class Source:
    """Gives these tokens, one after the other, or raises them."""

    def __init__(self, *tokens: str | Exception) -> None:
        self.tokens = list(tokens)
        self.asked = 0

    async def __call__(self) -> str:
        self.asked += 1
        token = self.tokens.pop(0)
        if isinstance(token, Exception):
            raise token
        return token


def with_token(token: str, script: Script) -> Script:
    async def checked(peer: Peer) -> None:
        assert peer.socket.request is not None
        assert peer.socket.request.headers["Authorization"] == f"Bearer {token}"
        await script(peer)

    return checked


async def renewed(client: Client) -> None:
    """Wait until the script has answered its last refresh, and the client read the answer."""
    room = await client.join("general")
    assert await take(room, 1)
    assert client.expires_at == 1_800_000


async def test_a_refresh_moves_the_expiry_and_ends_rooms_no_longer_allowed() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        refresh = await peer.expect("refresh", token="next")
        await peer.ack(refresh, expires_at=1_800_000, roles=["guest"], left=["general", "other"])

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        refreshed = await client.refresh("next")
        assert [event async for event in room] == [Left("general", "forbidden")]

    assert refreshed.roles == ("guest",)
    assert client.expires_at == 1_800_000


async def test_expiring_leads_to_one_refresh_however_often_it_is_said() -> None:
    asked, told = itertools.count(1), asyncio.Event()

    async def source() -> str:
        number = next(asked)
        if number > 1:
            await told.wait()
        return f"token{number}"

    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.say("expiring", expires_at=900_000)
        told.set()
        await peer.renew(await peer.expect("refresh", token="token2"))

    async with scripted(script) as url, connect(url, token=source) as client:
        await renewed(client)

    assert next(asked) == 3


async def test_rights_that_change_while_a_token_is_fetched_lead_to_another() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.say("expiring", expires_at=900_000)
        refresh = await peer.expect("refresh", token="b")
        await peer.say("expiring", expires_at=900_000, now=True)
        await peer.ack(refresh, expires_at=1_000_000, roles=[], left=[])
        await peer.renew(await peer.expect("refresh", token="c"))

    async with scripted(script) as url, connect(url, token=Source("a", "b", "c")) as client:
        await renewed(client)


async def test_one_refresh_follows_however_often_and_whenever_it_is_said_to_be_time() -> None:
    pings = 5
    fetching, go = asyncio.Event(), asyncio.Event()
    tokens = iter(["a", "b", "c"])

    async def source() -> str:
        token = next(tokens)
        if token == "b":
            fetching.set()
            await go.wait()
        return token

    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.say("expiring", expires_at=900_000)
        await fetching.wait()
        await peer.say("expiring", expires_at=900_000)
        await peer.message(1)
        refresh = await peer.expect("refresh", token="b")
        await peer.say("expiring", expires_at=900_000)
        await peer.ack(refresh, expires_at=1_000_000, roles=[], left=[])
        await peer.message(2)
        for _ in range(pings):
            await peer.ack(await peer.expect("ping"), ts=1)
        # Of the token that is in use by then, whose end may be near as well.
        await peer.say("expiring", expires_at=1_000_000)
        refresh = await peer.expect("refresh", token="c")
        await peer.ack(refresh, expires_at=1_800_000, roles=[], left=[])

    async with scripted(script) as url, connect(url, token=source) as client:
        room = await client.join("general")
        await take(room, 1)  # And with it what was said before.
        go.set()
        await take(room, 1)
        for _ in range(pings):  # Time enough for another refresh.
            await client.ping()
        while client.expires_at != 1_800_000:
            await asyncio.sleep(0.001)


async def test_a_new_token_that_is_about_to_expire_is_renewed_though_it_is_said_at_once() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.say("expiring", expires_at=900_000)
        refresh = await peer.expect("refresh", token="b")
        ack = {"type": "ack", "id": refresh["id"], "expires_at": 1_001, "roles": [], "left": []}
        for frame in (ack, {"type": "expiring", "expires_at": 1_001}):
            peer.socket.protocol.send_text(json.dumps(frame).encode())
        # In one piece, so that both are read in one turn.
        peer.socket.transport.write(b"".join(peer.socket.protocol.data_to_send()))
        await peer.renew(await peer.expect("refresh", token="c"))

    async with scripted(script) as url, connect(url, token=Source("a", "b", "c")) as client:
        await renewed(client)


async def test_after_a_refresh_that_was_refused_the_token_before_goes_on() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.error(await peer.expect("refresh", token="bad"), "token_invalid")
        await peer.expect("ping")
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    async with scripted(first, with_token("t", second)) as url, swift(url, token="t") as client:
        with pytest.raises(CommandError):
            await client.refresh("bad")
        await client.ping()


async def test_of_two_refreshes_the_one_that_was_taken_counts() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        refused, taken = await peer.expect("refresh"), await peer.expect("refresh", token="newer")
        await peer.error(refused, "token_invalid")
        await peer.ack(taken, expires_at=1_800_000, roles=["member"], left=[])
        await peer.expect("ping")
        peer.socket.transport.abort()

    async def second(peer: Peer) -> None:
        assert peer.socket.request is not None
        assert peer.socket.request.headers["Authorization"] == "Bearer newer"
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    async with scripted(first, second) as url, swift(url) as client:
        outcomes = await asyncio.gather(
            client.refresh("bad"), client.refresh("newer"), return_exceptions=True
        )
        await client.ping()

    assert [type(outcome) for outcome in outcomes] == [CommandError, Refreshed]


async def test_a_refresh_that_fails_is_tried_again(caplog: pytest.LogCaptureFixture) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.say("expiring", expires_at=900_000)
        await peer.error(await peer.expect("refresh", token="bad"), "token_invalid")
        await peer.error(await peer.expect("refresh", token="good"), "unavailable")
        await peer.renew(await peer.expect("refresh", token="good"))

    source = Source("first", OSError("the secret place is down"), "bad", "good")
    async with scripted(script) as url, connect(url, token=source) as client:
        await renewed(client)

    assert [record.args for record in caplog.records] == [("OSError",), ("CommandError",)]


async def test_with_a_mere_string_expiring_asks_nobody_and_4401_is_the_end() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.say("expiring", expires_at=900_000)
        await peer.bye(4401, "token_expired")

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        with pytest.raises(ValueError, match="no function"):
            await client.refresh()
        with pytest.raises(DisconnectedError) as caught:
            await anext(room)

    assert caught.value.code == 4401


async def test_a_new_token_is_fetched_first_after_4401_and_after_a_401_that_says_expired() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.bye(4401, "token_expired")

    async def last(peer: Peer) -> None:
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    first, second = with_token("a", script), with_token("c", last)
    refusal = refused(401, "token_expired")
    async with (
        scripted(first, refusal, second) as url,
        swift(url, token=Source("a", "b", "c")) as client,
    ):
        await client.ping()


async def test_a_token_that_is_good_for_a_while_is_used_again() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.bye(1012, "draining", after=1)

    async def last(peer: Peer) -> None:
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    source = Source("a")
    scripts = [with_token("a", script), with_token("a", last)]
    async with scripted(*scripts) as url, swift(url, token=source) as client:
        await client.ping()

    assert source.asked == 1


async def test_a_token_that_is_about_to_expire_is_replaced_before_connecting() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome(expires_at=1_001)
        await peer.bye(1012, "draining", after=1)

    async def last(peer: Peer) -> None:
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    scripts = [with_token("a", script), with_token("b", last)]
    async with scripted(*scripts) as url, swift(url, token=Source("a", "b")) as client:
        await client.ping()


@pytest.mark.parametrize("code", ["token_invalid", "token_revoked", "token_expired"])
async def test_a_refused_token_is_the_end_when_there_is_no_other(code: str) -> None:
    async with scripted(refused(401, code)) as url:
        with pytest.raises(RefusedError) as caught:
            async with swift(url, token=Source("a", "a")):
                pass

    assert caught.value.code == code


async def test_a_source_whose_second_token_is_refused_as_well_is_asked_no_more() -> None:
    source, states = Source("a", "b"), list[State]()
    async with scripted(*[refused(401, "token_invalid")] * 2) as url:
        with pytest.raises(RefusedError):
            async with swift(url, token=source, on_state=states.append):
                pass

    assert source.asked == 2
    assert [type(state) for state in states] == [Waiting, Connecting, Closed]


async def test_after_4401_a_newer_token_that_was_not_shown_yet_is_good_enough() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.say("expiring", expires_at=900_000)
        await peer.expect("refresh", token="b")
        await peer.bye(4401, "token_expired")

    async def last(peer: Peer) -> None:
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    source, states = Source("a", "b"), list[State]()
    scripts = [with_token("a", script), with_token("b", last)]
    async with (
        scripted(*scripts) as url,
        swift(url, token=source, on_state=states.append) as client,
    ):
        while sum(isinstance(state, Open) for state in states) < 2:
            await asyncio.sleep(0.001)
        await client.ping()

    assert source.asked == 2


async def test_what_the_function_raises_comes_out_at_first_and_is_borne_later() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.bye(4401, "token_expired")

    async def last(peer: Peer) -> None:
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    states: list[State] = []
    source = Source("a", ZeroDivisionError(), "b")
    async with scripted(script, last) as url:
        with pytest.raises(ZeroDivisionError):
            async with swift(url, token=Source(ZeroDivisionError())):
                pass
        async with swift(url, token=source, on_state=states.append) as client:
            await client.ping()

    reasons = [type(state.why) for state in states if isinstance(state, Waiting)]
    assert reasons == [DisconnectedError, ZeroDivisionError]


@pytest.mark.parametrize("answer", ["<html>", "token\n", None])
async def test_what_is_no_token_is_not_used_and_the_function_asked_again(answer: Any) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.bye(4401, "token_expired")

    async def last(peer: Peer) -> None:
        assert peer.socket.request is not None
        assert peer.socket.request.headers["Authorization"] == "Bearer b"
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    states: list[State] = []
    async with scripted(script, last) as url:
        with pytest.raises(ValueError, match="a token "):
            async with swift(url, token=Source(answer)):
                pass
        async with swift(url, token=Source("a", answer, "b"), on_state=states.append) as client:
            await client.ping()

    reasons = [type(state.why) for state in states if isinstance(state, Waiting)]
    assert reasons == [DisconnectedError, ValueError]


async def test_an_exception_of_the_application_comes_out_as_it_is_however_it_is_made() -> None:
    class OddError(Exception):
        def __init__(self, *, needed: str) -> None:
            super().__init__(needed)

    async with scripted() as url:
        for _ in range(2):
            with pytest.raises(OddError, match="a key"):
                async with swift(url, token=Source(OddError(needed="a key"))):
                    pass


async def test_a_session_that_is_over_ends_the_client() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.bye(4401, "token_expired")

    over = TokenRefusedError(401, "token_revoked", "No.")
    async with scripted(script) as url, swift(url, token=Source("a", over)) as client:
        room = await client.join("general")
        with pytest.raises(TokenRefusedError):
            await anext(room)


async def test_a_session_that_is_over_ends_the_client_while_its_token_is_still_good() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.say("expiring", expires_at=900_000)

    over = TokenRefusedError(401, "token_revoked", "No.")
    async with scripted(script) as url, swift(url, token=Source("a", over)) as client:
        room = await client.join("general")
        with pytest.raises(TokenRefusedError):
            await anext(room)
        assert client.state == Closed(over)


async def test_a_new_token_of_another_user_is_the_end() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.bye(4401, "token_expired")

    async def last(peer: Peer) -> None:
        await peer.welcome(user="bob")

    async with scripted(script, last) as url, swift(url, token=Source("a", "b")) as client:
        room = await client.join("general")
        with pytest.raises(CommandError, match="identity_mismatch"):
            await anext(room)
        assert client.welcome.user == "alice"


async def test_a_logout_ends_the_client_without_a_word() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.ack(await peer.expect("logout"))
        await peer.bye(4503, "session_revoked")

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        await client.logout()
        assert client.state == Closed(None)
        assert [event async for event in room] == []


async def test_a_logout_of_a_client_that_was_closed_is_not_said_to_be_done() -> None:
    async with scripted(Peer.welcome) as url, connect(url, token="t") as client:
        await client.close()
        with pytest.raises(DisconnectedError, match="1000"):
            await client.logout()


# The end.


@pytest.mark.parametrize(
    ("code", "reason"), [(4500, "bad_frame"), (4503, "session_revoked"), (4599, "something_new")]
)
async def test_a_final_goodbye_ends_what_waits_with_its_reason(code: int, reason: str) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(1, replay=1)
        await peer.expect("ping")
        await peer.expect("send")
        await peer.bye(code, reason)

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general", last=1)
        ping, send = await asyncio.gather(
            client.ping(), client.send("general", 1), return_exceptions=True
        )
        assert offsets(await take(room, 1)) == [1]
        with pytest.raises(DisconnectedError) as waiting:
            await anext(room)
        with pytest.raises(DisconnectedError) as later:
            await client.send("general", 2)
        with pytest.raises(DisconnectedError):
            await client.join("general")

    assert isinstance(send, UnknownOutcomeError)
    for error in (ping, send.why, waiting.value, later.value, client.state.why):  # type: ignore[union-attr]
        assert isinstance(error, DisconnectedError)
        assert (error.code, error.reason, error.final) == (code, reason, True)


@pytest.mark.parametrize("code", [1002, 1007])
async def test_a_fault_of_our_own_is_not_repeated_for_ever(code: int) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.socket.close(code, "your fault")

    async with scripted(script, script, script) as url, swift(url) as client:
        with pytest.raises(DisconnectedError) as caught:
            await client.ping()

    assert (caught.value.code, caught.value.reason) == (code, "your fault")


async def test_a_close_without_a_code_is_told_with_the_byes() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.hear()
        await peer.say("bye", code=4503, reason="session_revoked")
        peer.socket.transport.write(b"\x88\x00")

    async with scripted(first) as url, swift(url) as client:
        with pytest.raises(DisconnectedError) as caught:
            await client.ping()

    assert caught.value.code == 4503


async def test_a_close_without_a_code_is_told_as_1006() -> None:
    async def first(peer: Peer) -> None:
        await peer.welcome()
        await peer.hear()
        peer.socket.transport.write(b"\x88\x00")

    async def second(peer: Peer) -> None:
        await peer.welcome()
        await peer.ack(await peer.expect("ping"), ts=1)

    states: list[State] = []
    async with scripted(first, second) as url, swift(url, on_state=states.append) as client:
        await client.ping()

    (waiting,) = [state for state in states if isinstance(state, Waiting)]
    assert isinstance(waiting.why, DisconnectedError)
    assert waiting.why.code == 1006


async def test_a_goodbye_without_a_close_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    async def cut(peer: Peer) -> None:
        await peer.welcome()
        await peer.expect("ping")
        await peer.say("bye", code=4505, reason="superseded", reconnect=False)
        peer.socket.transport.close()

    async def hang(peer: Peer) -> None:
        await peer.welcome()
        await peer.expect("ping")
        await peer.say("bye", code=4505, reason="superseded", reconnect=False)
        await peer.socket.wait_closed()

    monkeypatch.setattr(connection, "BYE_SECONDS", 0.05)
    async with scripted(cut, hang) as url:
        for _ in range(2):
            async with connect(url, token="t") as client:
                with pytest.raises(DisconnectedError) as caught:
                    await client.ping()
                assert caught.value.code == 4505


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        '{"no":"type"}',
        "[" * 5000,
        '{"type":"left","room":"general"}',
        '{"type":"ack","id":2,"room":"general"}',
        b"{}",
    ],
)
async def test_frames_that_are_not_of_the_protocol_end_the_connection_and_at_last_the_client(
    text: str | bytes,
) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.expect("join")
        await peer.say("ack", id=1, room="general", epoch="e", offset=0, rights="r", replay=0)
        await peer.expect("history")
        await peer.socket.send(
            text if isinstance(text, bytes) else text.replace('"id":1', '"id":2')
        )

    async with scripted(script, script, script) as url, swift(url) as client:
        await client.join("general")
        with pytest.raises(DisconnectedError) as caught:
            await client.history("general")

    assert caught.value.code == 1002


async def test_odd_bodies_of_others_are_delivered() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.socket.send(
            '{"type":"message","room":"general","offset":1,"ts":1,"user":"bob","new":[],'
            '"body":["\\ud800","\\u0000",1' + "0" * 300 + "]}"
        )

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        (message,) = await take(room, 1)

    assert isinstance(message, Message)
    assert message.body == ["\ud800", "\x00", 10**300]


async def test_closing_ends_iterations_quietly_and_refuses_commands() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)

    async def read(room: Room) -> list[Event]:
        return [event async for event in room]

    async with scripted(script) as url:
        async with connect(url, token="t") as client:
            reading = asyncio.create_task(read(await client.join("general")))
        assert await reading == []
        with pytest.raises(DisconnectedError, match="1000"):
            await client.ping()
        assert repr(client) == "<Client c1 of alice closed>"


async def test_an_exception_of_the_block_comes_out_as_it_is_and_the_connection_is_closed() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.socket.wait_closed()
        assert peer.socket.close_code == 1000

    async with scripted(script) as url:
        with pytest.raises(ZeroDivisionError):
            async with connect(url, token="t"):
                raise ZeroDivisionError


def tasks() -> list[str]:
    """Those of clients."""
    coroutines = [repr(task.get_coro()) for task in asyncio.all_tasks()]
    return [name for name in coroutines if "_supervise" in name or "_keep_fresh" in name]


async def test_what_comes_while_it_closes_begins_nothing() -> None:
    closing = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.welcome()
        ping = await peer.expect("ping")
        peer.socket.transport.pause_reading()
        await peer.ack(ping, ts=1)
        await closing.wait()
        await peer.say("expiring", expires_at=900_000)
        peer.socket.transport.resume_reading()

    source = Source("a", "b")
    async with scripted(script) as url:
        async with connect(url, token=source) as client:
            await client.ping()
            asyncio.get_running_loop().call_soon(closing.set)
        left = tasks()

    assert left == []
    assert source.asked == 1


async def test_a_close_that_is_cancelled_leaves_nothing_behind() -> None:
    """As when a timeout ends the whole block, and the server has gone silent."""
    resume = asyncio.Event()

    async def script(peer: Peer) -> None:
        await peer.welcome()
        peer.socket.transport.pause_reading()
        await resume.wait()
        peer.socket.transport.resume_reading()

    async with scripted(script) as url, connect(url, token="t") as client:
        assert len(tasks()) == 1
        closing = asyncio.create_task(client.close())
        await asyncio.sleep(0)
        closing.cancel()
        await asyncio.gather(closing, return_exceptions=True)
        left = tasks()
        resume.set()

    assert closing.cancelled()
    assert left == []

from __future__ import annotations

import asyncio
import itertools
import socket
from collections.abc import Iterator
from typing import Any, cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserver.client import (
    Client,
    CommandError,
    DisconnectedError,
    Event,
    Gap,
    Left,
    Message,
    Position,
    RefusedError,
    Room,
    connect,
)
from chatserver.client import connection as connection_module
from chatserver.client.backoff import wait_before
from chatserver.client.events import JoinAck
from tests.client.scripted import Peer, refusal, refused, scripted


async def take(room: Room, count: int) -> list[Event]:
    return [await anext(room) for _ in range(count)]


def offsets(events: list[Event]) -> list[int]:
    return [event.position.offset for event in events if isinstance(event, Message)]


@pytest.fixture
def no_waits(monkeypatch: pytest.MonkeyPatch) -> list[int | None]:
    """Waits before another try take no time; what the server told to wait is kept."""
    told: list[int | None] = []

    def wait_before(attempt: int, wish: int | None) -> float:
        told.append(wish)
        return 0.0

    monkeypatch.setattr(connection_module, "wait_before", wait_before)
    return told


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


async def test_a_token_function_is_asked_for_each_connection() -> None:
    tokens = (f"token{n}" for n in itertools.count(1))

    async def script(peer: Peer) -> None:
        assert peer.socket.request is not None
        seen.append(peer.socket.request.headers["Authorization"])
        await peer.welcome()

    async def source() -> str:
        return next(tokens)

    seen: list[str] = []
    async with scripted(script, script) as url:
        for _ in range(2):
            async with connect(url, token=source):
                pass

    assert seen == ["Bearer token1", "Bearer token2"]


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        (refused(401, "token_expired"), (401, "token_expired", "No.", None)),
        (refused(429, "rate_limited", Retry_After="7"), (429, "rate_limited", "No.", 7000)),
        (refused(503, "draining", Retry_After="soon"), (503, "draining", "No.", None)),
        (refusal(502, "<html>"), (502, None, "Bad Gateway", None)),
        (refusal(404, '{"error": "no"}'), (404, None, "Not Found", None)),
    ],
)
async def test_a_refusal_tells_status_code_and_wait(response: Any, expected: Any) -> None:
    async with scripted(response) as url:
        with pytest.raises(RefusedError) as caught:
            async with connect(url, token="t"):
                pass

    error = caught.value
    assert (error.status, error.code, error.message, error.retry_after) == expected


async def test_nobody_listening_is_a_disconnect_that_is_not_final() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
    with pytest.raises(DisconnectedError) as caught:
        async with connect(f"ws://127.0.0.1:{port}/v1/ws", token="t"):
            pass

    assert caught.value.code == 1006
    assert not caught.value.final


@pytest.mark.parametrize("say", ["ack", "message"])
async def test_a_server_that_does_not_begin_with_a_welcome_is_none(say: str) -> None:
    async with scripted(lambda peer: peer.say(say)) as url:
        with pytest.raises(DisconnectedError) as caught:
            async with connect(url, token="t"):
                pass

    assert caught.value.code == 1002


async def test_a_server_that_says_nothing_is_given_up_at_the_deadline() -> None:
    async def script(peer: Peer) -> None:
        await peer.socket.wait_closed()

    async with scripted(script) as url:
        with pytest.raises(DisconnectedError, match="no answer"):
            async with connect(url, token="t", deadline=0.05):
                pass


async def test_a_goodbye_in_the_place_of_the_welcome_tells_its_reason() -> None:
    async with scripted(lambda peer: peer.bye(1013, "overloaded", after=5)) as url:
        with pytest.raises(DisconnectedError) as caught:
            async with connect(url, token="t"):
                pass

    assert (caught.value.code, caught.value.after) == (1013, 5)


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


async def test_a_repair_refused_for_now_is_tried_again(no_waits: list[int | None]) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(4)
        await peer.message(6)
        await peer.error(await peer.expect("join"), "rate_limited", retry_after=350)
        await peer.error(await peer.expect("join"), "unavailable")
        await peer.admit(6, replay=2, recovered=True)

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        assert offsets(await take(room, 2)) == [5, 6]

    assert no_waits == [350, None]


async def test_a_repair_without_an_answer_is_tried_again(no_waits: list[int | None]) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(4)
        await peer.message(6)
        await peer.expect("join")
        await peer.admit(6, replay=2, recovered=True)

    async with scripted(script) as url, connect(url, token="t", deadline=0.5) as client:
        room = await client.join("general")
        assert offsets(await take(room, 2)) == [5, 6]


async def test_a_room_left_during_its_repair_stays_left(no_waits: list[int | None]) -> None:
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
        assert offsets([event async for event in before]) == [1]
        assert offsets(await take(after, 1)) == [1]


async def test_a_full_queue_lets_events_go_and_asks_for_them_once_it_is_empty() -> None:
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


class Repairs:
    """Stands in for a Client: counts what a Room asks for."""

    def __init__(self) -> None:
        self.count = 0

    def repair(self, room: Room) -> None:
        self.count += 1


@given(st.lists(st.integers(0, 12)), st.integers(1, 4))
async def test_whatever_comes_a_room_gives_consecutive_offsets(seen: list[int], bound: int) -> None:
    repairs = Repairs()
    room = Room(cast(Client, repairs), JoinAck("r", "e", 0, "r", 0), bound)
    for offset in seen:
        message = {"type": "message", "room": "r", "offset": offset, "ts": 1, "user": "u"}
        room.receive(message | {"body": None})
    room.end(None)
    given_out = offsets([event async for event in room])

    assert given_out == list(range(1, len(given_out) + 1))
    assert len(given_out) <= bound
    assert repairs.count <= 1


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
        await peer.error(await peer.expect("send"), "rate_limited", retry_after=350)
        await peer.say("error", code="internal", message="Nobody asked.")
        await peer.error(await peer.expect("send"), "invalid", path="$.body")
        await peer.ack(await peer.expect("ping"), ts=7)

    async with scripted(script) as url, connect(url, token="t") as client:
        with pytest.raises(CommandError) as limited:
            await client.send("general", 1)
        with pytest.raises(CommandError) as invalid:
            await client.send("general", 1)
        assert await client.ping() == 7

    assert (limited.value.code, limited.value.retry_after) == ("rate_limited", 350)
    assert limited.value.temporary
    assert (invalid.value.message, invalid.value.path) == ("No.", "$.body")
    assert not invalid.value.temporary


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


# The token.


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
    asked = 0

    async def source() -> str:
        nonlocal asked
        asked += 1
        return f"token{asked}"

    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.say("expiring", expires_at=900_000)
        await peer.say("expiring", expires_at=900_000)
        refresh = await peer.expect("refresh", token="token2")
        await peer.say("expiring", expires_at=900_000)
        await peer.renew(refresh)

    async with scripted(script) as url, connect(url, token=source) as client:
        await renewed(client)

    assert asked == 2


async def test_rights_that_change_while_a_refresh_is_under_way_lead_to_another() -> None:
    async def source() -> str:
        return "t"

    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.say("expiring", expires_at=900_000)
        refresh = await peer.expect("refresh")
        await peer.say("expiring", expires_at=900_000, now=True)
        await peer.ack(refresh, expires_at=1_000_000, roles=[], left=[])
        await peer.renew(await peer.expect("refresh"))

    async with scripted(script) as url, connect(url, token=source) as client:
        await renewed(client)


async def test_a_refresh_that_fails_is_tried_again(
    no_waits: list[int | None], caplog: pytest.LogCaptureFixture
) -> None:
    answers: Iterator[str | OSError]
    answers = iter(["first", OSError("the secret place is down"), "bad", "good"])

    async def source() -> str:
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return answer

    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.say("expiring", expires_at=900_000)
        await peer.error(await peer.expect("refresh", token="bad"), "token_invalid")
        await peer.renew(await peer.expect("refresh", token="good"))

    async with scripted(script) as url, connect(url, token=source) as client:
        await renewed(client)

    assert len(no_waits) == 2
    assert [record.args for record in caplog.records] == [("OSError",), ("CommandError",)]


async def test_with_a_mere_string_expiring_asks_nobody() -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.say("expiring", expires_at=900_000)
        await peer.ack(await peer.expect("ping"), ts=1)

    async with scripted(script) as url, connect(url, token="t") as client:
        await client.ping()


# Waits.


@given(st.integers(0, 10_000))
def test_a_wait_is_what_was_told_or_jitter_under_a_limit(attempt: int) -> None:
    assert wait_before(attempt, 350) == 0.35
    assert 0 <= wait_before(attempt, None) <= min(30, 2**attempt)


# The end.


@pytest.mark.parametrize(
    ("code", "reason", "fields", "final"),
    [
        (1012, "draining", {"after": 1500}, False),
        (4401, "token_expired", {}, False),
        (4503, "session_revoked", {}, True),
    ],
)
async def test_a_goodbye_ends_what_waits_with_its_reason(
    code: int, reason: str, fields: dict[str, int], final: bool
) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(1, replay=1)
        await peer.expect("ping")
        await peer.bye(code, reason, **fields)

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general", last=1)
        with pytest.raises(DisconnectedError) as pending:
            await client.ping()
        assert offsets(await take(room, 1)) == [1]
        with pytest.raises(DisconnectedError) as waiting:
            await anext(room)
        with pytest.raises(DisconnectedError) as later:
            await client.ping()

    for caught in (pending, waiting, later):
        error = caught.value
        assert (error.code, error.reason, error.after) == (code, reason, fields.get("after"))
        assert error.final is final


async def test_a_connection_cut_without_a_word_is_1006_and_a_goodbye_without_a_close_counts() -> (
    None
):
    async def cut(peer: Peer) -> None:
        await peer.welcome()
        await peer.expect("ping")
        peer.socket.transport.abort()

    async def cut_after_goodbye(peer: Peer) -> None:
        await peer.welcome()
        await peer.expect("ping")
        await peer.say("bye", code=4505, reason="superseded", reconnect=False)
        peer.socket.transport.close()

    codes = []
    async with scripted(cut, cut_after_goodbye) as url:
        for _ in range(2):
            async with connect(url, token="t") as client:
                with pytest.raises(DisconnectedError) as caught:
                    await client.ping()
                codes.append((caught.value.code, caught.value.final))

    assert codes == [(1006, False), (4505, True)]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"no":"type"}', "[" * 5000, '{"type":"left","room":"general"}', b"{}"]
)
async def test_a_frame_that_is_not_of_the_protocol_ends_the_connection(text: str | bytes) -> None:
    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.admit(0)
        await peer.socket.send(text)

    async with scripted(script) as url, connect(url, token="t") as client:
        room = await client.join("general")
        with pytest.raises(DisconnectedError) as caught:
            await anext(room)

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

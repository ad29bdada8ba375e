"""Frames: what breaks the framing ends one connection, what breaks a command is answered."""

from __future__ import annotations

import json
from typing import Any

import pytest
from websockets.frames import Opcode

from tests.support.client import Client, Raw, masked
from tests.support.tokens import Issuer, unique
from tests.support.worker import Worker

TEXT, BINARY, CONT = Opcode.TEXT, Opcode.BINARY, Opcode.CONT
CLOSE, PING, PONG = Opcode.CLOSE, Opcode.PING, Opcode.PONG
COMMAND = b'{"type":"ping","id":1}'
LIMIT = 65536
MAX_FRAGMENTS = 4096

BROKEN: dict[str, tuple[bytes, int]] = {
    "unmasked": (b"\x81\x02hi", 1002),
    "rsv1": (masked(TEXT, COMMAND, rsv=4), 1002),
    "rsv2": (masked(TEXT, COMMAND, rsv=2), 1002),
    "rsv3": (masked(PING, rsv=1), 1002),
    "opcode 3": (b"\x83\x80\0\0\0\0", 1002),
    "opcode 11": (b"\x8b\x80\0\0\0\0", 1002),
    "a stray continuation": (masked(CONT, b"x"), 1002),
    "a text within a text": (masked(TEXT, b"x", fin=False) + masked(TEXT, b"y"), 1002),
    "a ping in fragments": (b"\x09\x80\0\0\0\0", 1002),
    "a long ping": (b"\x89\xfe\x00\x7e\0\0\0\0" + bytes(126), 1002),
    "a close of one byte": (masked(CLOSE, b"\x03"), 1002),
    "a close with code 1005": (masked(CLOSE, (1005).to_bytes(2)), 1002),
    "a close with code 999": (masked(CLOSE, (999).to_bytes(2)), 1002),
    "a close reason that is no text": (masked(CLOSE, (1000).to_bytes(2) + b"\xff"), 1007),
    "no text": (masked(TEXT, b'{"type":"\xff"}'), 1007),
    "half a character": (masked(TEXT, "{é}".encode()[:2]), 1007),
    "a surrogate": (masked(TEXT, b'{"a":"\xed\xa0\x80"}'), 1007),
    "overlong": (masked(TEXT, b'{"a":"\xc0\xaf"}'), 1007),
    "text that breaks off between fragments": (
        masked(TEXT, b'{"\xc3', fin=False) + masked(CONT, b'":1}'),
        1007,
    ),
    "too big": (masked(TEXT, b'"' + b"x" * LIMIT + b'"'), 1009),
    "too big in fragments": (
        masked(TEXT, b"x" * 40_000, fin=False) + masked(CONT, b"x" * 40_000, fin=False),
        1009,
    ),
    "2^62 claimed": (b"\x81\xff" + (2**62).to_bytes(8) + b"\0\0\0\0", 1009),
    "2^32 claimed": (b"\x81\xff" + (2**32).to_bytes(8) + b"\0\0\0\0", 1009),
    "too many fragments": (
        masked(TEXT, b"{", fin=False) + masked(CONT, b"", fin=False) * 4200,
        1009,
    ),
    "a fragment too many, the last": (
        masked(TEXT, COMMAND, fin=False)
        + masked(CONT, b"", fin=False) * (MAX_FRAGMENTS - 1)
        + masked(CONT, b""),
        1009,
    ),
    "binary": (masked(BINARY, COMMAND), 4500),
    "no JSON": (masked(TEXT, b"hello"), 4500),
    "nothing": (masked(TEXT, b""), 4500),
    "a list": (masked(TEXT, b"[" + COMMAND + b"]"), 4500),
    "null": (masked(TEXT, b"null"), 4500),
    "a number": (masked(TEXT, b"1"), 4500),
    "two objects": (masked(TEXT, COMMAND + COMMAND), 4500),
    "half an object": (masked(TEXT, b'{"type":"ping"'), 4500),
    "a BOM": (masked(TEXT, b"\xef\xbb\xbf" + COMMAND), 4500),
    "a comma too many": (masked(TEXT, b'{"type":"ping",}'), 4500),
    "single quotes": (masked(TEXT, b"{'type':'ping'}"), 4500),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_a_broken_frame_ends_the_connection_and_no_other_notices(
    worker: Worker, issuer: Issuer, user: str, room: str, what: str
) -> None:
    """The offender joined first: what is delivered meanwhile comes to it before the others."""
    data, expected = BROKEN[what]
    async with (
        await Raw.upgraded(worker.url, issuer.token(user)) as offender,
        await Client.connect(worker.url, issuer.token(user)) as bystander,
        await Client.connect(worker.url, issuer.token(user)) as publisher,
    ):
        offender.text({"type": "join", "id": 1, "room": room})
        assert (await offender.json())["type"] == "ack"
        await bystander.join(room)
        await publisher.publish(room, 1)
        assert (await offender.json())["type"] == "message"
        offender.write(data)
        frames, code = await offender.until_closed()
        for n in (2, 3):
            await publisher.publish(room, n)
        delivered = await bystander.messages(3)

    assert code == expected
    assert [event["body"] for event in delivered] == [1, 2, 3]
    if expected == 4500:
        assert frames[-1]["type"] == "bye"
        assert (frames[-1]["code"], frames[-1]["reconnect"]) == (4500, False)
        assert frames[-1]["reason"] == "bad_frame"
    else:
        assert [frame for frame in frames if frame["type"] != "bye"] == []


@pytest.mark.parametrize("what", ["unmasked", "no text", "too big", "binary", "no JSON"])
async def test_commands_before_a_broken_frame_count_and_those_after_it_do_not(
    worker: Worker, issuer: Issuer, user: str, room: str, what: str
) -> None:
    """All in one segment."""
    data, expected = BROKEN[what]

    def send(n: int) -> bytes:
        command = {"type": "send", "id": n, "room": room, "body": n}
        return masked(TEXT, json.dumps(command).encode())

    async with (
        await Client.connect(worker.url, issuer.token(user)) as bystander,
        await Raw.upgraded(worker.url, issuer.token(user)) as offender,
    ):
        await bystander.join(room)
        offender.write(masked(TEXT, COMMAND) + data + send(2) + masked(TEXT, COMMAND))
        frames, code = await offender.until_closed()
        await bystander.publish(room, "after")
        [event] = await bystander.messages(1)

    assert code == expected
    assert [frame["type"] for frame in frames if frame["type"] != "bye"] in (["ack"], [])
    assert event["body"] == "after"


@pytest.mark.parametrize(
    "behind",
    [b"\x81\x02hi", masked(CLOSE, b"\x03\xe8"), masked(PING, b"p")],
    ids=["not-masked", "close", "ping"],
)
@pytest.mark.parametrize("what", ["binary", "no JSON", "no text"])
async def test_the_first_offence_of_a_segment_gives_the_code(
    worker: Worker, issuer: Issuer, user: str, what: str, behind: bytes
) -> None:
    data, expected = BROKEN[what]
    async with await Raw.upgraded(worker.url, issuer.token(user)) as offender:
        offender.write(data + behind)
        frames, code = await offender.until_closed()

    assert code == expected
    assert [(frame["type"], frame["code"]) for frame in frames] == [("bye", expected)]


async def test_a_send_and_a_close_in_one_segment(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    """What many clients do at their end. The close frame is answered; the send may count or not."""
    command = {"type": "send", "id": 1, "room": room, "body": "last words"}
    async with await Client.connect(worker.url, issuer.token(user)) as bystander:
        await bystander.join(room)
        for _ in range(5):
            async with await Raw.upgraded(worker.url, issuer.token(user)) as raw:
                raw.write(
                    masked(TEXT, COMMAND)
                    + masked(TEXT, json.dumps(command).encode())
                    + masked(CLOSE, (1000).to_bytes(2))
                )
                frames, code = await raw.until_closed()
                assert code == 1000
                assert {frame["type"] for frame in frames} <= {"ack"}
        await bystander.publish(room, "after")
        await bystander.expect(lambda f: f["type"] == "message" and f["body"] == "after")


async def test_a_close_is_answered_in_kind(worker: Worker, issuer: Issuer, user: str) -> None:
    for payload in (b"", (1000).to_bytes(2) + b"bye", (4999).to_bytes(2)):
        async with await Raw.upgraded(worker.url, issuer.token(user)) as raw:
            raw.write(masked(CLOSE, payload))
            opcode, echoed = await raw.frame()
            assert opcode == CLOSE
            assert echoed[:2] == payload[:2]
            assert await raw.read_to_end() == b""


async def test_fragments_make_one_command_with_pings_in_between(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    async with await Raw.upgraded(worker.url, issuer.token(user)) as raw:
        raw.write(masked(TEXT, COMMAND[:5], fin=False))
        for byte in COMMAND[5:]:
            raw.write(masked(PING, b"p") + masked(CONT, bytes([byte]), fin=False))
        raw.write(masked(CONT, b""))
        frames = [await raw.frame() for _ in range(len(COMMAND) - 5 + 1)]

    assert [payload for opcode, payload in frames if opcode == PONG] == [b"p"] * (len(COMMAND) - 5)
    [ack] = [json.loads(payload) for opcode, payload in frames if opcode == TEXT]
    assert ack["id"] == 1


async def test_a_message_in_just_as_many_fragments_as_are_taken_passes(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    async with await Raw.upgraded(worker.url, issuer.token(user)) as raw:
        raw.write(
            masked(TEXT, COMMAND, fin=False)
            + masked(CONT, b"", fin=False) * (MAX_FRAGMENTS - 2)
            + masked(CONT, b"")
        )
        ack = await raw.json()

    assert (ack["type"], ack["id"]) == ("ack", 1)


async def test_a_frame_of_just_the_limit_passes(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        assert client.welcome["limits"]["frame_bytes"] == LIMIT
        await client.join(room)
        head = f'{{"type":"send","id":"big","room":"{room}","body":"'
        await client.send(head + "x" * (LIMIT - len(head) - 2) + '"}')
        ack = await client.expect(lambda frame: frame.get("id") == "big")
        [event] = await client.messages(1)

    assert ack["type"] == "ack"
    assert len(event["body"]) == LIMIT - len(head) - 2


async def test_pings_are_answered_and_unasked_pongs_are_not(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    async with await Raw.upgraded(worker.url, issuer.token(user)) as raw:
        raw.write(masked(PONG, b"unasked") + masked(PING, b"\0\xff") + masked(PING, b"x" * 125))
        frames = [await raw.frame() for _ in range(2)]

    assert frames == [(PONG, b"\0\xff"), (PONG, b"x" * 125)]


async def test_compression_is_off_whatever_is_offered(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    client = await Client.connect(worker.url, issuer.token(user), compression="deflate")
    async with client:
        await client.ping()
        assert client.socket.response is not None
        assert "Sec-WebSocket-Extensions" not in client.socket.response.headers


# --- commands that are none ----------------------------------------------------------------

ROOM = unique("room")
BAD: dict[str, tuple[str, str, str | None]] = {
    # what is sent; the code and the path that come back
    "no type": ('{"id":1}', "invalid", "$.type"),
    "type a number": ('{"id":1,"type":1}', "invalid", "$.type"),
    "unknown type": ('{"id":1,"type":"dance"}', "unknown_type", None),
    "type in capitals": ('{"id":1,"type":"PING"}', "unknown_type", None),
    "join without a room": ('{"id":1,"type":"join"}', "invalid", "$.room"),
    "join a number": ('{"id":1,"type":"join","room":1}', "invalid", "$.room"),
    "last below": (f'{{"id":1,"type":"join","room":"{ROOM}","last":-1}}', "invalid", "$.last"),
    "last above": (f'{{"id":1,"type":"join","room":"{ROOM}","last":257}}', "invalid", "$.last"),
    "last a float": (f'{{"id":1,"type":"join","room":"{ROOM}","last":1.5}}', "invalid", "$.last"),
    "last a bool": (f'{{"id":1,"type":"join","room":"{ROOM}","last":true}}', "invalid", "$.last"),
    "since a number": (f'{{"id":1,"type":"join","room":"{ROOM}","since":5}}', "invalid", "$.since"),
    "since without offset": (
        f'{{"id":1,"type":"join","room":"{ROOM}","since":{{"epoch":"a"}}}}',
        "invalid",
        "$.since.offset",
    ),
    "since beyond 2^53": (
        f'{{"id":1,"type":"join","room":"{ROOM}","since":{{"epoch":"a","offset":{2**53}}}}}',
        "invalid",
        "$.since.offset",
    ),
    "send without body": (f'{{"id":1,"type":"send","room":"{ROOM}"}}', "invalid", "$.body"),
    "send nowhere": ('{"id":1,"type":"send","body":1}', "invalid", "$.room"),
    "send to no rooms": ('{"id":1,"type":"send","rooms":[],"body":1}', "invalid", "$.rooms"),
    "send to a room twice": (
        f'{{"id":1,"type":"send","rooms":["{ROOM}","{ROOM}"],"body":1}}',
        "invalid",
        "$.rooms",
    ),
    "send to 17 rooms": (
        json.dumps({"id": 1, "type": "send", "rooms": [f"r{n}" for n in range(17)], "body": 1}),
        "invalid",
        "$.rooms",
    ),
    "an empty key": (
        f'{{"id":1,"type":"send","room":"{ROOM}","body":1,"key":""}}',
        "invalid",
        "$.key",
    ),
    "a long key": (
        f'{{"id":1,"type":"send","room":"{ROOM}","body":1,"key":"{"k" * 65}"}}',
        "invalid",
        "$.key",
    ),
    "echo a string": (
        f'{{"id":1,"type":"send","room":"{ROOM}","body":1,"echo":"no"}}',
        "invalid",
        "$.echo",
    ),
    "before and after": (
        f'{{"id":1,"type":"history","room":"{ROOM}","before":1,"after":1}}',
        "invalid",
        "$.after",
    ),
    "limit 0": (f'{{"id":1,"type":"history","room":"{ROOM}","limit":0}}', "invalid", "$.limit"),
    "refresh without token": ('{"id":1,"type":"refresh"}', "invalid", "$.token"),
    "refresh with a list": ('{"id":1,"type":"refresh","token":[]}', "invalid", "$.token"),
    "body beyond a double": (
        f'{{"id":1,"type":"send","room":"{ROOM}","body":1e999}}',
        "invalid",
        "$.body",
    ),
    "body 65 deep": (
        f'{{"id":1,"type":"send","room":"{ROOM}","body":{"[" * 65 + "]" * 65}}}',
        "invalid",
        "$.body",
    ),
    "a lone surrogate": (
        f'{{"id":1,"type":"send","room":"{ROOM}","body":"\\ud800"}}',
        "invalid",
        "$.body",
    ),
}


@pytest.mark.parametrize("what", BAD)
async def test_a_bad_command_is_answered_with_what_is_wrong_and_closes_nothing(
    worker: Worker, issuer: Issuer, user: str, what: str
) -> None:
    sent, code, path = BAD[what]
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await client.send(sent)
        error = await client.receive()
        pong = await client.ping()

    assert (error["type"], error["id"], error["code"]) == ("error", 1, code)
    assert error.get("path") == path
    assert error["message"]
    assert pong["type"] == "ack"


@pytest.mark.parametrize("type", ["edit", "delete", "react", "typing", "read", "presence", "kick"])
async def test_reserved_commands_are_unknown(
    worker: Worker, issuer: Issuer, user: str, type: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        assert (await client.ask(type, room="general"))["code"] == "unknown_type"


@pytest.mark.parametrize(
    "room",
    [
        "",
        " ",
        "a b",
        "a\n",
        "a\r\nb",
        "a\0",
        "*",
        "a*",
        "{a}",
        "a}b",
        "a{b",
        "../a",
        "-a",
        ".a",
        "_a",
        "__proto__",
        "é",
        "a/b",
        "a\u2028",
        "x" * 129,
        "x" * 10_000,
    ],
)
async def test_a_name_that_is_no_rooms_is_invalid_everywhere(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user, roles=["admin"])) as client:
        answers = [
            await client.ask("join", room=room),
            await client.ask("leave", room=room),
            await client.ask("history", room=room),
            await client.ask("send", room=room, body=1),
            await client.ask("send", rooms=["fine", room], body=1),
        ]

    assert {answer["code"] for answer in answers} == {"invalid"}
    assert [answer["path"].split("[")[0] for answer in answers] == ["$.room"] * 4 + ["$.rooms"]


@pytest.mark.parametrize(
    "id", [0, -1, 2**53, 1.5, True, None, "", "x" * 65, [], {}, "\ud800", 10**400]
)
async def test_an_id_that_is_none_is_invalid_and_not_answered_to(
    worker: Worker, issuer: Issuer, user: str, id: Any
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await client.send({"type": "ping", "id": id})
        error = await client.receive()

    assert (error["type"], error["code"]) == ("error", "invalid")
    assert "id" not in error


@pytest.mark.parametrize("id", [1, 2**53 - 1, "a", "x" * 64, "\u0000é\U0001f600"])
async def test_an_answer_has_the_id_of_its_command(
    worker: Worker, issuer: Issuer, user: str, id: Any
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        assert (await client.ask("ping", id=id))["type"] == "ack"
        assert (await client.ask("nonsense", id=id))["type"] == "error"


async def test_a_command_without_id_gets_no_ack_but_its_error(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        for command in ("join", "send", "history", "leave"):
            await client.send({"type": command, "room": room, "body": 1})
        await client.send({"type": "ping"})
        await client.send({"type": "join", "room": "a b"})
        await client.ping()

    kinds = [frame["type"] for frame in client.seen if frame["type"] not in ("welcome", "message")]
    [error] = [frame for frame in client.seen if frame["type"] == "error"]
    assert kinds == ["error", "ack"]
    assert "id" not in error


async def test_unknown_fields_are_ignored(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    """Also those that would make somebody else of the sender."""
    forged = {"user": "admin", "roles": ["admin"], "ts": 1, "offset": 99, "epoch": "x", "x": [{}]}
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await client.join(room, **forged)
        ack = await client.ask("send", room=room, body=forged, **forged)
        [event] = await client.messages(1)

    assert (ack["type"], ack["offset"]) == ("ack", 1)
    assert (event["user"], event["offset"], event["body"]) == (user, 1, forged)
    assert event["ts"] > 1


async def test_a_member_that_occurs_twice_has_one_meaning(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    """The ack, the event and the log speak of one and the same room."""
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        await client.send(
            f'{{"type":"send","type":"send","id":1,"id":2,"room":"{room}","room":"{room}-2",'
            '"body":1,"body":2}'
        )
        answer = await client.receive()
        if answer["type"] == "ack":
            page = await client.ask("history", room=answer["room"])
            assert [event["offset"] for event in page["events"]] == [answer["offset"]]
        await client.ping()

"""permessage-deflate on a real worker: what is agreed on, who gets what, and what is refused."""

from __future__ import annotations

import json
import zlib
from collections.abc import Iterator
from contextlib import AsyncExitStack

import pytest
from websockets.extensions.permessage_deflate import ClientPerMessageDeflateFactory
from websockets.frames import Opcode

from tests.conftest import AMPLE
from tests.support.client import Client, Raw, masked, refused
from tests.support.tokens import Issuer
from tests.support.valkey import Valkey
from tests.support.worker import Worker

TEXT, CONT = Opcode.TEXT, Opcode.CONT
LIMIT = 65536
OFFER = {"Sec-WebSocket-Extensions": "permessage-deflate"}
RSV1 = 4
BODY = {"text": "what is said in a room, again and again: " * 20}
COMMAND = b'{"type":"ping","id":1}'


@pytest.fixture(scope="module")
def worker(
    valkey: Valkey, issuer: Issuer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Worker]:
    """A worker with compression."""
    log = tmp_path_factory.mktemp("worker") / "log"
    started = Worker(log, valkey.url, issuer, compression="shared", **AMPLE)
    started.start()
    yield started
    started.stop()


def deflated(data: bytes) -> bytes:
    compressor = zlib.compressobj(9, wbits=-15)
    return (compressor.compress(data) + compressor.flush(zlib.Z_SYNC_FLUSH))[:-4]


def inflated(data: bytes) -> bytes:
    return zlib.decompressobj(-12).decompress(data + b"\0\0\xff\xff")


def terms(client: Client) -> str | None:
    assert client.socket.response is not None
    return client.socket.response.headers.get("Sec-WebSocket-Extensions")


async def test_a_room_of_members_with_and_without_compression_gets_every_event_once(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    asking = [ClientPerMessageDeflateFactory(server_max_window_bits=9)]
    async with (
        await Client.connect(worker.url, issuer.token(user), compression="deflate") as usual,
        await Client.connect(worker.url, issuer.token(user), extensions=asking) as small,
        await Client.connect(worker.url, issuer.token(user)) as plain,
    ):
        members = [usual, small, plain]
        for member in members:
            await member.join(room)
        bodies = [BODY | {"n": n} if n % 2 else n for n in range(40)]
        for n, body in enumerate(bodies):
            await members[n % 3].publish(room, body)
        for member in members:
            await member.messages(len(bodies))
            await member.ping()

    assert (terms(usual) or "").endswith("; server_max_window_bits=12")
    assert (terms(small) or "").endswith("; server_max_window_bits=9")
    assert terms(plain) is None
    for member in members:
        events = member.seen_in(room)
        assert [event["offset"] for event in events] == list(range(1, len(bodies) + 1))
        assert [event["body"] for event in events] == bodies


async def test_an_event_is_compressed_above_a_size_and_nothing_else_is(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    async with (
        await Raw.upgraded(worker.url, issuer.token(user), headers=OFFER) as member,
        await Client.connect(worker.url, issuer.token(user)) as publisher,
    ):
        await publisher.publish(room, BODY)
        member.text({"type": "join", "id": 1, "room": room, "last": 1})
        assert (await member.json())["type"] == "ack"
        assert (await member.json())["body"] == BODY
        await publisher.publish(room, 1)
        assert (await member.json())["body"] == 1
        await publisher.publish(room, BODY)
        opcode, data = await member.frame()

    assert opcode == TEXT
    assert len(data) < len(json.dumps(BODY)) / 2
    assert json.loads(inflated(data))["body"] == BODY


@pytest.mark.parametrize("fragments", [1, 5])
async def test_a_command_may_come_compressed(
    worker: Worker, issuer: Issuer, user: str, room: str, fragments: int
) -> None:
    command = {"type": "send", "id": 1, "room": room, "body": BODY}
    data = deflated(json.dumps(command).encode())
    size = -(-len(data) // fragments)
    async with await Raw.upgraded(worker.url, issuer.token(user), headers=OFFER) as raw:
        for start in range(0, len(data), size):
            piece, fin = data[start : start + size], start + size >= len(data)
            opcode, rsv = (CONT, 0) if start else (TEXT, RSV1)
            raw.write(masked(opcode, piece, fin=fin, rsv=rsv))
        ack = await raw.json()

    assert (ack["type"], ack["id"]) == ("ack", 1)


def bomb(size: int) -> bytes:
    return deflated(bytes(size))


BROKEN: dict[str, tuple[bytes, int]] = {
    "a bomb of 1:1000": (masked(TEXT, bomb(64 * 2**20), rsv=RSV1), 1009),
    "a byte too big": (masked(TEXT, deflated(b"x" * (LIMIT + 1)), rsv=RSV1), 1009),
    "a bomb in fragments": (
        masked(TEXT, bomb(2**20)[:50], fin=False, rsv=RSV1)
        + masked(CONT, bomb(2**20)[50:100], fin=False),
        1009,
    ),
    "a bomb behind a full message": (
        masked(TEXT, bomb(LIMIT), fin=False, rsv=RSV1) + masked(CONT, bomb(2**20)),
        1009,
    ),
    "no deflate data": (masked(TEXT, b"\xff" * 100, rsv=RSV1), 1002),
    "from before the window": (masked(TEXT, b"\x02\x13\x00\x00\x00", rsv=RSV1), 1002),
    "fragments without end behind a final block": (
        masked(TEXT, b"\x03\x00", fin=False, rsv=RSV1)
        + masked(CONT, b"x" * 60_000, fin=False) * 100,
        1002,
    ),
    "rsv1 in a continuation": (
        masked(TEXT, deflated(b"{"), fin=False, rsv=RSV1) + masked(CONT, b"", rsv=RSV1),
        1002,
    ),
    "a compressed ping": (masked(Opcode.PING, deflated(b"x"), rsv=RSV1), 1002),
    "rsv2": (masked(TEXT, deflated(COMMAND), rsv=RSV1 | 2), 1002),
    "no text when inflated": (masked(TEXT, deflated(b'{"type":"\xff"}'), rsv=RSV1), 1007),
    "no JSON when inflated": (masked(TEXT, deflated(b"hello"), rsv=RSV1), 4500),
}


@pytest.mark.parametrize("what", BROKEN)
async def test_what_cannot_be_inflated_ends_one_connection_and_no_other_notices(
    worker: Worker, issuer: Issuer, user: str, room: str, what: str
) -> None:
    data, expected = BROKEN[what]
    async with (
        await Raw.upgraded(worker.url, issuer.token(user), headers=OFFER) as offender,
        await Client.connect(worker.url, issuer.token(user), compression="deflate") as bystander,
    ):
        await bystander.join(room)
        offender.write(data)
        frames, code = await offender.until_closed()
        await bystander.publish(room, BODY)
        [event] = await bystander.messages(1)

    assert code == expected
    assert [frame for frame in frames if frame["type"] != "bye"] == []
    assert event["body"] == BODY


async def test_a_bomb_costs_no_more_than_a_message_of_the_largest_size(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    """A hundred connections, each with one that is almost full and not finished."""
    whole = bomb(2**20)
    before = worker.memory()
    async with AsyncExitStack() as stack:
        connections = []
        for _ in range(100):
            raw = await Raw.upgraded(worker.url, issuer.token(user), headers=OFFER)
            connections.append(await stack.enter_async_context(raw))
            raw.write(masked(TEXT, whole[:60], fin=False, rsv=RSV1) + masked(Opcode.PING, b"?"))
            assert await raw.frame() == (Opcode.PONG, b"?")
        held = worker.memory() - before
        for raw in connections:
            raw.write(masked(CONT, whole[60:], fin=False))
            assert (await raw.until_closed())[1] == 1009
        exploded = worker.memory() - before

    # The message itself, a window of 32 KiB, and what zlib needs beside it.
    assert held < 100 * 2.5 * LIMIT
    assert exploded < 100 * 2.5 * LIMIT


async def test_a_client_that_asks_for_a_window_that_cannot_be_had_goes_without(
    worker: Worker, issuer: Issuer, user: str, room: str
) -> None:
    offer = {"Sec-WebSocket-Extensions": "permessage-deflate; server_max_window_bits=8"}
    async with await Raw.upgraded(worker.url, issuer.token(user), headers=offer) as raw:
        raw.text({"type": "join", "id": 1, "room": room})
        await raw.json()
        raw.text({"type": "send", "id": 2, "room": room, "body": BODY})
        frames = [await raw.json(), await raw.json()]
        raw.write(masked(TEXT, deflated(COMMAND), rsv=RSV1))
        _, code = await raw.until_closed()

    assert {frame["type"] for frame in frames} == {"ack", "message"}
    assert code == 1002


async def test_a_malformed_offer_is_a_bad_request(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    headers = {"Sec-WebSocket-Extensions": "permessage-deflate; ="}
    answer = await refused(worker.url, issuer.token(user), headers=headers)

    assert (answer.status, answer.code) == (400, "bad_request")

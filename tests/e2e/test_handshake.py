"""The door: every refusal before the upgrade, and what gets through."""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import AsyncExitStack

import pytest
from websockets.frames import Opcode

from tests.conftest import StartWorker
from tests.support.client import (
    Answer,
    Client,
    Raw,
    exchange,
    http,
    masked,
    refused,
    request,
    upgrade_headers,
)
from tests.support.tokens import Issuer
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, Worker, eventually

HERE = "http://localhost:3000"


def assert_refused(answer: Answer, status: int, code: str) -> None:
    """A refusal of the protocol's table, and nothing in it that tells what software sent it."""
    assert (answer.status, answer.code) == (status, code), answer
    assert set(answer.json) == {"error"}
    assert set(answer.json["error"]) == {"code", "message"}
    assert answer.header("content-type") == "application/json"
    assert answer.header("content-length") == str(len(answer.body))
    assert answer.header("server") is None
    assert b"websockets" not in answer.raw.lower().replace(b"upgrade: websocket", b"")
    assert b"python" not in answer.raw.lower()


# --- credentials ---------------------------------------------------------------------------


async def test_a_token_in_the_header_gets_in(worker: Worker, issuer: Issuer, user: str) -> None:
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        assert client.welcome["user"] == user
        assert client.socket.subprotocol is None


async def test_a_token_as_a_subprotocol_gets_in_and_is_not_echoed(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    async with await Client.connect(worker.url, issuer.token(user), subprotocol=True) as client:
        assert client.welcome["user"] == user
        assert client.socket.subprotocol == "chat.v1"
        assert client.socket.response is not None
        assert "bearer" not in str(client.socket.response.headers).lower()


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
async def test_subprotocols_may_be_spread_over_header_lines(
    worker: Worker, issuer: Issuer, user: str, order: tuple[int, int]
) -> None:
    offered = ["chat.v1", f"bearer.{issuer.token(user)}"]
    more = [("Sec-WebSocket-Protocol", offered[n]) for n in order]
    async with await Raw.connect(worker.url) as raw:
        raw.write(request(worker.url, headers=upgrade_headers(), more=more))
        answer = await raw.head()

    assert answer.status == 101
    assert answer.header("sec-websocket-protocol") == "chat.v1"


async def test_a_header_with_a_subprotocol_offered_beside_it_selects_version_one(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    headers = {
        "Authorization": f"bEaReR {issuer.token(user)}",
        "Sec-WebSocket-Protocol": "chat.v2, chat.v1",
    }
    async with await Raw.connect(worker.url) as raw:
        raw.write(request(worker.url, headers=upgrade_headers() | headers))
        answer = await raw.head()

    assert answer.status == 101
    assert answer.header("sec-websocket-protocol") == "chat.v1"
    assert answer.header("server") is None


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer "},
        {"Authorization": "Basic YWxpY2U6cHc="},
        {"Sec-WebSocket-Protocol": "chat.v1"},
        {"Sec-WebSocket-Protocol": "chat.v1, bearer."},
        {"Cookie": "token=x; Authorization=Bearer x"},
    ],
)
async def test_without_a_token(worker: Worker, headers: dict[str, str]) -> None:
    answer = await refused(worker.url, headers=headers)

    assert_refused(answer, 401, "token_missing")
    assert answer.header("www-authenticate") == "Bearer"


@pytest.mark.parametrize("token", ["x", "a.b.c", "e30.e30.", "x" * 5000, "null", "%00"])
async def test_a_token_that_is_none(worker: Worker, token: str) -> None:
    answer = await refused(worker.url, token)

    assert_refused(answer, 401, "token_invalid")
    assert answer.header("www-authenticate") == 'Bearer error="invalid_token"'


async def test_an_expired_token(worker: Worker, issuer: Issuer, user: str) -> None:
    old = issuer.token(user, issued_at=int(time.time()) - 60, lifetime=60)
    answer = await refused(worker.url, old)

    assert_refused(answer, 401, "token_expired")
    assert answer.header("www-authenticate") == 'Bearer error="invalid_token"'


async def test_two_credentials(worker: Worker, issuer: Issuer, user: str) -> None:
    token = issuer.token(user)
    bearer = ("Sec-WebSocket-Protocol", f"chat.v1, bearer.{token}")
    header = ("Authorization", f"Bearer {token}")
    for more in ([bearer], [header], [bearer, bearer]):
        answer = await refused(worker.url, token, more=more)
        assert_refused(answer, 400, "ambiguous_credentials")
    twice = await refused(worker.url, more=[bearer, ("Sec-WebSocket-Protocol", f"bearer.{token}")])
    assert_refused(twice, 400, "ambiguous_credentials")


@pytest.mark.parametrize("name", ["token", "access_token", "Token", "bearer", "x"])
async def test_a_token_in_the_url(worker: Worker, issuer: Issuer, user: str, name: str) -> None:
    """Refused although there is a good one in the header; worker.stop() looks for it in the log."""
    token = issuer.token(user)
    answer = await refused(worker.url, token, path=f"/v1/ws?a=b&{name}={token}")

    assert_refused(answer, 400, "token_in_url")


async def test_an_unknown_version(worker: Worker, issuer: Issuer, user: str) -> None:
    token = issuer.token(user)
    for offered in ("chat.v2", "graphql-ws", "Chat.v1"):
        headers = {"Sec-WebSocket-Protocol": offered}
        assert_refused(
            await refused(worker.url, token, headers=headers), 400, "unsupported_version"
        )
    headers = {"Sec-WebSocket-Protocol": f"chat.v2, bearer.{token}"}
    assert_refused(await refused(worker.url, headers=headers), 400, "unsupported_version")


# --- paths, methods, plain requests --------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/", "/v1", "/v1/ws/", "//v1/ws", "/v1/../v1/ws", "/V1/WS", "/v1/ws%00", "/v1%2fws"]
)
async def test_other_paths_are_not_found(
    worker: Worker, issuer: Issuer, user: str, path: str
) -> None:
    assert_refused(await refused(worker.url, issuer.token(user), path=path), 404, "not_found")


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "OPTIONS", "TRACE", "get"])
async def test_other_methods_are_not_allowed(
    worker: Worker, issuer: Issuer, user: str, method: str
) -> None:
    answer = await refused(worker.url, issuer.token(user), method=method)

    assert answer.status == 405
    assert answer.header("allow") is not None
    assert "GET" in str(answer.header("allow"))


async def test_a_plain_get_with_a_good_token_is_told_to_upgrade(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    good = {"Authorization": f"Bearer {issuer.token(user)}", "Origin": HERE}
    answer = await http(worker.url, headers=good)

    assert_refused(answer, 426, "upgrade_required")
    assert answer.header("upgrade") == "websocket"
    assert answer.header("access-control-allow-origin") == HERE
    assert answer.header("vary") == "Origin"


async def test_a_plain_get_tells_a_page_what_a_handshake_could_not(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    old = issuer.token(user, issued_at=int(time.time()) - 60, lifetime=60)
    answer = await http(worker.url, headers={"Authorization": f"Bearer {old}", "Origin": HERE})

    assert_refused(answer, 401, "token_expired")
    assert answer.header("access-control-allow-origin") == HERE


async def test_a_preflight_is_answered_for_allowed_origins(worker: Worker) -> None:
    asked = {
        "Origin": HERE,
        "Access-Control-Request-Method": "GET",
        "Access-Control-Request-Headers": "authorization",
    }
    answer = await http(worker.url, method="OPTIONS", headers=asked)
    denied = await http(worker.url, method="OPTIONS", headers=asked | {"Origin": "https://x.test"})

    assert answer.status == 204
    assert answer.body == b""
    assert answer.header("content-length") is None
    assert answer.header("access-control-allow-origin") == HERE
    assert "GET" in str(answer.header("access-control-allow-methods"))
    assert "authorization" in str(answer.header("access-control-allow-headers")).lower()
    assert answer.header("access-control-allow-credentials") is None
    assert_refused(denied, 403, "origin_denied")
    assert denied.header("access-control-allow-origin") is None


async def test_it_is_healthy_and_ready(worker: Worker) -> None:
    for path in ("/healthz", "/readyz"):
        answer = await http(worker.url, path)
        assert answer.status == 200
        assert answer.json["status"] == "ok"
        assert answer.header("server") is None
    assert (await http(worker.url, "/healthz", method="POST")).status == 405


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/v1/ws", "/nowhere"])
async def test_who_asks_for_a_head_gets_no_body(worker: Worker, path: str) -> None:
    """But all else as it would be with one."""
    answer = await http(worker.url, path, method="HEAD")
    whole = await http(worker.url, path)

    assert answer.body == b""
    assert int(str(answer.header("content-length"))) > 0
    if path != "/v1/ws":
        assert answer.headers == whole.headers


# --- origins, proxies ----------------------------------------------------------------------


async def test_a_page_from_elsewhere_is_refused_before_its_token_is_looked_at(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    for origin in ("https://evil.test", "null", "http://localhost.evil.test", "file://", ""):
        for token in (issuer.token(user), "bad"):
            answer = await refused(worker.url, token, headers={"Origin": origin})
            assert_refused(answer, 403, "origin_denied")


async def test_origins_are_matched_exactly(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker(allowed_origins="https://chat.example,https://b.example:8443")
    token = issuer.token(user)
    denied = [
        "http://chat.example",
        "https://chat.example:444",
        "https://chat.example.evil.test",
        "https://evilchat.example",
        "https://chat.example/",
        "https://b.example",
        "https://CHAT.example",
        "https://chat.example https://evil.test",
        "http://localhost",
        "null",
        "*",
    ]
    for origin in denied:
        answer = await refused(worker.url, token, headers={"Origin": origin})
        assert_refused(answer, 403, "origin_denied")
    twice = [("Origin", "https://chat.example"), ("Origin", "https://chat.example")]
    assert_refused(await refused(worker.url, token, more=twice), 400, "bad_request")

    for origin in ("https://chat.example", "https://b.example:8443"):
        async with await Client.connect(worker.url, token, headers={"Origin": origin}) as client:
            await client.ping()
    async with await Client.connect(worker.url, token) as native:
        await native.ping()


async def test_behind_a_trusted_proxy_its_word_is_taken(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker(trusted_proxies="127.0.0.1", handshake_rate=1)
    token = issuer.token(user)
    plain = await refused(worker.url, token, headers={"X-Forwarded-Proto": "http"})
    assert_refused(plain, 403, "https_required")

    async def status(client: str) -> int:
        headers = {"X-Forwarded-Proto": "https", "X-Forwarded-For": f"10.0.0.1, {client}"}
        good = {"Authorization": f"Bearer {token}"}
        return (await http(worker.url, headers=headers | good)).status

    statuses = [await status("192.0.2.1") for _ in range(20)]

    assert 429 in statuses
    assert await status("192.0.2.2") == 426


async def test_what_an_untrusted_peer_says_about_itself_is_not_believed(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker(handshake_rate=1)
    token = issuer.token(user)
    answers = [
        await http(
            worker.url,
            headers={"Authorization": f"Bearer {token}", "X-Forwarded-For": f"192.0.2.{n}"},
        )
        for n in range(20)
    ]

    limited = [answer for answer in answers if answer.status == 429]
    assert limited
    assert_refused(limited[0], 429, "rate_limited")
    assert int(str(limited[0].header("retry-after"))) >= 1


# --- malformed -----------------------------------------------------------------------------

START = b"GET /v1/ws HTTP/1.1\r\nHost: localhost\r\n"
UPGRADE = (
    b"Connection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\nSec-WebSocket-Version: 13\r\n"
)
MALFORMED = {
    "no host": b"GET /v1/ws HTTP/1.1\r\n%AUTH%" + UPGRADE + b"\r\n",
    "two hosts": START + b"Host: localhost\r\n%AUTH%" + UPGRADE + b"\r\n",
    "empty host": b"GET /v1/ws HTTP/1.1\r\nHost:\r\n%AUTH%" + UPGRADE + b"\r\n",
    "host with a path": b"GET /v1/ws HTTP/1.1\r\nHost: a/b\r\n%AUTH%" + UPGRADE + b"\r\n",
    "host with user": b"GET /v1/ws HTTP/1.1\r\nHost: a@b\r\n%AUTH%" + UPGRADE + b"\r\n",
    "bare LF": (START + b"%AUTH%" + UPGRADE + b"\r\n").replace(b"\r\n", b"\n"),
    "one bare LF": START + b"%AUTH%" + UPGRADE.replace(b"\r\nUpgrade", b"\nUpgrade") + b"\r\n",
    "obs-fold": START + b"X-A: b\r\n c\r\n%AUTH%" + UPGRADE + b"\r\n",
    "space before colon": START + b"X-A : b\r\n%AUTH%" + UPGRADE + b"\r\n",
    "no colon": START + b"nonsense\r\n%AUTH%" + UPGRADE + b"\r\n",
    "NUL in a value": START + b"X-A: a\0b\r\n%AUTH%" + UPGRADE + b"\r\n",
    "not ASCII in the path": b"GET /v1/ws\xff HTTP/1.1\r\nHost: a\r\n%AUTH%" + UPGRADE + b"\r\n",
    "body": START + b"Content-Length: 4\r\n%AUTH%" + UPGRADE + b"\r\nbody",
    "chunked": START + b"Transfer-Encoding: chunked\r\n%AUTH%" + UPGRADE + b"\r\n0\r\n\r\n",
    "HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n",
    "HTTP/0.9": b"GET /v1/ws\r\n\r\n",
    "two spaces": b"GET  /v1/ws HTTP/1.1\r\nHost: a\r\n%AUTH%" + UPGRADE + b"\r\n",
    "TLS": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + bytes(range(256)) + b"\r\n",
    "random": bytes(n * 7919 % 256 for n in range(3000)) + b"\r\n\r\n",
    "no key": START + b"%AUTH%" + UPGRADE.replace(b"Sec-WebSocket-Key", b"X-Key") + b"\r\n",
    "short key": START
    + b"%AUTH%"
    + UPGRADE.replace(b"dGhlIHNhbXBsZSBub25jZQ==", b"eA==")
    + b"\r\n",
    "two keys": START
    + b"%AUTH%Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n"
    + UPGRADE
    + b"\r\n",
    "version 8": START + b"%AUTH%" + UPGRADE.replace(b"Version: 13", b"Version: 8") + b"\r\n",
    "other upgrade": START + b"%AUTH%" + UPGRADE.replace(b": websocket", b": h2c") + b"\r\n",
    "no connection": START + b"%AUTH%" + UPGRADE.replace(b"n: Upgrade", b"n: close") + b"\r\n",
}


@pytest.mark.parametrize("what", MALFORMED)
async def test_what_is_malformed_is_never_upgraded(
    worker: Worker, issuer: Issuer, user: str, what: str
) -> None:
    credential = f"Authorization: Bearer {issuer.token(user)}\r\n".encode()
    answer = await exchange(worker.url, MALFORMED[what].replace(b"%AUTH%", credential))

    assert answer.status in (0, 400), answer
    if answer.status:
        assert_refused(answer, 400, "bad_request")
        assert what != "version 8" or answer.header("sec-websocket-version") == "13"


async def test_a_path_with_nul_in_it_is_another_path(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    answer = await refused(worker.url, issuer.token(user), path="/v1/ws\0")

    assert_refused(answer, 404, "not_found")


async def test_the_same_request_well_formed_is_upgraded(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    credential = f"Authorization: Bearer {issuer.token(user)}\r\n".encode()
    async with await Raw.connect(worker.url) as raw:
        # In as many pieces as there are bytes.
        for byte in START + credential + UPGRADE + b"\r\n":
            raw.write(bytes([byte]))
            await raw.drain()
        assert (await raw.head()).status == 101


async def test_long_lines_and_many_headers(worker: Worker, issuer: Issuer, user: str) -> None:
    token = issuer.token(user)
    long_path = await refused(worker.url, token, path="/v1/ws?" + "x" * 20_000)
    long_header = await refused(worker.url, token, headers={"X-Long": "x" * 20_000})
    many = await refused(worker.url, token, more=[(f"X-{n}", "y") for n in range(300)])
    endless = await exchange(worker.url, b"GET /" + b"x" * 100_000)

    assert (long_path.status, long_header.status, many.status) == (414, 431, 431)
    assert endless.status in (0, 414)
    assert long_path.header("server") is None


async def test_hanging_up_in_the_middle_is_nothing(worker: Worker) -> None:
    for part in (b"", b"GET", START, START + UPGRADE[:40]):
        async with await Raw.connect(worker.url) as raw:
            raw.write(part)
            raw.write_eof()
            answer = await raw.answer()
            assert answer.status in (0, 400)
    assert (await http(worker.url, "/healthz")).status == 200


async def test_a_slow_handshake_is_cut_off(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    """The deadline is for all of it: a byte now and then does not push it back."""
    worker = start_worker(handshake_seconds=2)
    async with await Client.connect(worker.url, issuer.token(user)) as bystander:
        began = time.monotonic()
        silent = asyncio.create_task(exchange(worker.url, b""))
        async with await Raw.connect(worker.url) as raw:
            dripping = asyncio.create_task(raw.read_to_end())
            while not dripping.done():
                raw.write(b"G" if time.monotonic() - began < 1.0 else b"E")
                await asyncio.wait([dripping], timeout=0.1)
            assert await dripping == b""
        assert (await silent).status == 0
        assert 1.5 < time.monotonic() - began < PATIENCE
        await bystander.ping()


async def test_a_frame_sent_along_with_the_handshake_is_answered_after_the_welcome(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    headers = upgrade_headers() | {"Authorization": f"Bearer {issuer.token(user)}"}
    command = masked(Opcode.TEXT, b'{"type":"ping","id":1}')
    async with await Raw.connect(worker.url) as raw:
        raw.write(request(worker.url, headers=headers) + command)
        assert (await raw.head()).status == 101
        assert [(await raw.json())["type"] for _ in range(2)] == ["welcome", "ack"]


# --- caps ----------------------------------------------------------------------------------


async def test_a_full_worker_says_so(start_worker: StartWorker, issuer: Issuer, user: str) -> None:
    worker = start_worker(connections=2)
    async with (
        await Client.connect(worker.url, issuer.token(user)) as first,
        await Client.connect(worker.url, issuer.token(user)),
    ):
        answer = await refused(worker.url, issuer.token("other"))
        assert_refused(answer, 429, "too_many_connections")
        assert int(str(answer.header("retry-after"))) >= 1

        await first.close()
        again = await Client.connect(worker.url, issuer.token("other"))
        await again.close()


async def test_at_a_users_cap_the_sessions_most_silent_connection_makes_room(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker(user_connections=2)
    token = issuer.token(user, session="s1")
    async with (
        await Client.connect(worker.url, token) as first,
        await Client.connect(worker.url, token) as second,
    ):
        await second.ping()
        await first.ping()
        other_session = await refused(worker.url, issuer.token(user, session="s2"))
        async with await Client.connect(worker.url, token) as third:
            frames, code = await second.until_closed()
            await first.ping()
            await third.ping()

    assert_refused(other_session, 429, "too_many_connections")
    assert code == 4505
    assert frames[-1]["type"] == "bye"
    assert (frames[-1]["code"], frames[-1]["reconnect"]) == (4505, False)


async def test_a_flood_of_bad_handshakes_is_counted_not_told_one_by_one(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker()
    async with await Client.connect(worker.url, issuer.token(user)) as bystander:
        for _ in range(20):
            answers = await asyncio.gather(
                *[refused(worker.url, "bad") for _ in range(25)],
                *[exchange(worker.url, b"\0\r\n\r\n") for _ in range(25)],
            )
            assert {answer.status for answer in answers} <= {0, 400, 401}
        await bystander.ping()

    assert len(worker.log().splitlines()) < 20


async def test_a_storm_is_served_in_order_and_at_the_rate(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    """Five hundred at once, where 250 a second are let in and five seconds are not too long."""
    worker = start_worker(admission_rate=250, handshake_seconds=10)
    async with AsyncExitStack() as sockets:
        began = time.monotonic()
        raws = [await _asking(sockets, worker, issuer.token(user)) for _ in range(500)]

        statuses = {(await raw.head()).status for raw in raws}
        let_in = [(await raw.json())["ts"] for raw in raws]

        assert statuses == {101}
        assert time.monotonic() - began > 1.8
        # Some are let in together, so order is one of groups.
        groups = [let_in[start : start + 50] for start in range(0, 500, 50)]
        pairs = zip(groups, groups[2:], strict=False)
        assert all(max(earlier) <= min(later) for earlier, later in pairs)


async def test_beyond_the_queue_newcomers_are_told_when_their_turn_would_be(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    """Ten a second, and a queue of a second: of sixty the last would wait for six."""
    worker = start_worker(admission_rate=10, handshake_seconds=2)
    token = issuer.token(user)
    async with AsyncExitStack() as sockets:
        bystander = await sockets.enter_async_context(await Client.connect(worker.url, token))
        raws = [await sockets.enter_async_context(await Raw.connect(worker.url)) for _ in range(60)]
        for raw in raws:  # All at once, however long it took them to come.
            raw.write(_asks(worker, token))

        heads = [(raw, await raw.head()) for raw in raws]
        refusals = [
            Answer(head.raw + await raw.read_to_end()) for raw, head in heads if head.status != 101
        ]

        await bystander.ping()
    assert 30 < len(refusals) < 60
    for refusal in refusals:
        assert_refused(refusal, 503, "overloaded")
    waits = [int(refusal.header("retry-after") or 0) for refusal in refusals]
    # Each second ten of them, give or take the second that each is spread over.
    assert set(waits) <= {1, 2, 3, 4, 5, 6, 7}
    assert max(waits) >= 4
    assert max(map(waits.count, waits)) <= 20


async def test_whoever_hangs_up_while_it_waits_is_forgotten(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker(admission_rate=20, handshake_seconds=4, user_connections=2)
    before = len(worker.descriptors())
    async with AsyncExitStack() as sockets:
        for _ in range(10):
            await _asking(sockets, worker, issuer.token(user))

    # Had one of them been let in after all, there would be no room for these two.
    async with (
        await Client.connect(worker.url, issuer.token(user)) as first,
        await Client.connect(worker.url, issuer.token(user)) as second,
    ):
        await first.ping()
        await second.ping()
        await eventually(lambda: len(worker.descriptors()) <= before + 2)


async def test_whoever_hangs_up_lets_those_behind_move_up(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    """One in two seconds is let in, and nobody comes for half a minute's turns."""
    worker = start_worker(admission_rate=0.5, handshake_seconds=60)
    async with AsyncExitStack() as sockets:
        for _ in range(14):
            await _asking(sockets, worker, issuer.token(user))
        await http(worker.url, "/healthz")  # by now they have all been accepted
        waiting = len(worker.descriptors())
    await eventually(lambda: len(worker.descriptors()) <= waiting - 14)

    async with await Client.connect(worker.url, issuer.token(user)) as newcomer:
        await newcomer.ping()


async def test_who_hangs_up_just_before_the_refusal_ends_nobody_else(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str
) -> None:
    """The worker hears of both in one turn of its loop: the store's answer, and the hanging up."""
    worker = start_worker(own_valkey, user_connections=1)
    async with await Client.connect(worker.url, issuer.token(user)) as client:
        own_valkey.freeze()
        async with AsyncExitStack() as sockets:
            await _asking(sockets, worker, issuer.token(user, session="another"))
            # It has been asked for at the store when a later command has been answered twice.
            await client.ping()
            await client.ping()
            worker.signal(signal.SIGSTOP)
            own_valkey.thaw()
            own_valkey.command("PING")
        worker.signal(signal.SIGCONT)
        await client.ping()
        await client.ping()


async def test_what_is_sent_while_waiting_is_answered_afterwards(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    """A client that does not wait for the 101 loses nothing, and is read no further meanwhile."""
    worker = start_worker(admission_rate=2, handshake_seconds=4)
    async with AsyncExitStack() as sockets:
        await _asking(sockets, worker, issuer.token(user))
        hasty = await _asking(sockets, worker, issuer.token(user))
        for number in range(1, 6):
            await asyncio.sleep(0)
            hasty.write(masked(Opcode.TEXT, b'{"type":"ping","id":%d}' % number))

        assert (await hasty.head()).status == 101
        assert (await hasty.json())["type"] == "welcome"
        assert [(await hasty.json())["id"] for _ in range(5)] == [1, 2, 3, 4, 5]


async def _asking(sockets: AsyncExitStack, worker: Worker, token: str) -> Raw:
    """A connection that has asked to be let in, and has no answer yet."""
    raw = await sockets.enter_async_context(await Raw.connect(worker.url))
    raw.write(_asks(worker, token))
    return raw


def _asks(worker: Worker, token: str) -> bytes:
    headers = upgrade_headers() | {"Authorization": f"Bearer {token}"}
    return request(worker.url, headers=headers)


# --- the store is away ---------------------------------------------------------------------


async def test_while_revocations_cannot_be_checked_nobody_gets_in(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str
) -> None:
    worker = start_worker(own_valkey)
    token = issuer.token(user)

    async def refuses() -> bool:
        answer = await http(worker.url, headers={"Authorization": f"Bearer {token}"})
        if answer.status == 426:
            return False
        assert_refused(answer, 503, "unavailable")
        assert int(str(answer.header("retry-after"))) >= 1
        return True

    own_valkey.freeze()
    frozen = time.monotonic()
    while not await refuses():
        assert time.monotonic() - frozen < 3 * 3.5
    took = time.monotonic() - frozen
    ready = await http(worker.url, "/readyz")
    alive = await http(worker.url, "/healthz")
    bad = await refused(worker.url, "bad")
    upgrade = await refused(worker.url, token)
    own_valkey.thaw()
    deadline = time.monotonic() + PATIENCE
    while await refuses():
        assert time.monotonic() < deadline
    async with await Client.connect(worker.url, token) as client:
        await client.ping()

    assert took < 3 * 3.5
    assert ready.status == 503
    assert ready.json["status"] != "ok"
    assert alive.status == 200
    assert_refused(bad, 401, "token_invalid")
    assert_refused(upgrade, 503, "unavailable")


# --- going away ----------------------------------------------------------------------------


async def test_a_drain_tells_everyone_when_to_come_back_and_ends_well(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker()
    clients = [await Client.connect(worker.url, issuer.token(user)) for _ in range(20)]
    await asyncio.gather(*[client.join(room) for client in clients])
    async with await Raw.connect(worker.url) as waiting:
        worker.terminate()
        ends = await asyncio.gather(*[client.until_closed() for client in clients])
        waiting.write(request(worker.url, headers=upgrade_headers()))
        at_the_door = await waiting.answer()
    code = await worker.exit_code()

    assert code == 0
    assert {close for _, close in ends} == {1012}
    byes = [frames[-1] for frames, _ in ends]
    assert all((bye["type"], bye["code"], bye["reconnect"]) == ("bye", 1012, True) for bye in byes)
    assert all(isinstance(bye["after"], int) and bye["after"] > 0 for bye in byes)
    assert len({bye["after"] for bye in byes}) > 10
    assert at_the_door.status != 101
    with pytest.raises(ConnectionRefusedError):
        await Raw.connect(worker.url)


async def test_a_drain_answers_what_is_under_way_first(
    start_worker: StartWorker, own_valkey: Valkey, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(own_valkey)
    async with (
        await Client.connect(worker.url, issuer.token(user)) as client,
        await Client.connect(worker.url, issuer.token(user)) as other,
    ):
        await client.publish(room)
        own_valkey.freeze()
        ids = [await client.command("send", room=room, body=n) for n in range(5)]
        # The sends have been read by the time a later connection has been served twice.
        await other.ping()
        await other.ping()
        worker.terminate()
        await eventually(lambda: worker.log_lines("draining"))
        own_valkey.thaw()
        frames, code = await client.until_closed()

    answered = [frame["id"] for frame in frames if frame["type"] in ("ack", "error")]
    assert answered == ids
    assert code == 1012
    assert frames[-1]["type"] == "bye"
    assert await worker.exit_code() == 0


async def test_a_drain_does_not_wait_for_one_who_does_not_read(
    start_worker: StartWorker, issuer: Issuer, user: str, room: str
) -> None:
    worker = start_worker(send_rate=10_000, send_burst=10_000)
    async with (
        await Raw.upgraded(worker.url, issuer.token(user), receive_buffer=4096) as stalled,
        await Client.connect(worker.url, issuer.token(user)) as talker,
    ):
        stalled.text({"type": "join", "id": 1, "room": room})
        await stalled.json()
        for _ in range(100):
            await talker.publish(room, "x" * 20_000)
        worker.terminate()
        _, code = await talker.until_closed()
        exited = await worker.exit_code()

    assert (code, exited) == (1012, 0)


# --- what follows the request in one segment -----------------------------------------------


@pytest.mark.parametrize(
    "rest",
    [b"\r\n", b"GET /healthz HTTP/1.1\r\nHost: a\r\n\r\n", b"\0" * 100, b"\x81\x02hi"],
    ids=["CRLF", "another request", "zeros", "an unmasked frame"],
)
async def test_a_request_with_more_behind_it_is_answered_or_dropped(
    worker: Worker, issuer: Issuer, user: str, rest: bytes
) -> None:
    credential = {"Authorization": f"Bearer {issuer.token(user)}"}
    health = await exchange(worker.url, request(worker.url, "/healthz") + rest)
    plain = await exchange(worker.url, request(worker.url, headers=credential) + rest)
    missing = await exchange(worker.url, request(worker.url, headers=upgrade_headers()) + rest)

    assert health.status in (0, 200, 400)
    assert plain.status in (0, 400, 426)
    assert missing.status in (0, 400, 401)
    assert (await http(worker.url, "/healthz")).status == 200


async def test_a_broken_frame_sent_along_with_the_handshake_ends_it(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    headers = upgrade_headers() | {"Authorization": f"Bearer {issuer.token(user)}"}
    for rest in (b"\x81\x02hi", masked(Opcode.TEXT, b"{}") + b"\x83\x80\0\0\0\0"):
        async with await Raw.connect(worker.url) as raw:
            raw.write(request(worker.url, headers=headers) + rest)
            ended = Answer(await raw.read_to_end())
        assert ended.status in (0, 101, 400)


async def test_a_ping_sent_along_with_the_handshake_is_answered_after_it(
    worker: Worker, issuer: Issuer, user: str
) -> None:
    headers = upgrade_headers() | {"Authorization": f"Bearer {issuer.token(user)}"}
    async with await Raw.connect(worker.url) as raw:
        raw.write(request(worker.url, headers=headers) + masked(Opcode.PING, b"early"))
        head = await raw.head()
        frames = [await raw.frame() for _ in range(2)]

    assert head.status == 101
    assert (Opcode.PONG, b"early") in frames

"""The control API: a whole server, two workers and its control process, over real sockets."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import ssl
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

from tests.support.client import Client, refused
from tests.support.server import KEY, Server
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, eventually

PAIR = {"access_token", "refresh_token", "session", "expires_at", "refresh_expires_at"}


@pytest.fixture(scope="module")
def server(
    module_valkey: Valkey, issuer: Issuer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Server]:
    """Alone on its store: it tells of all workers there."""
    log = tmp_path_factory.mktemp("server") / "log"
    started = Server(log, issuer, REDIS_URL=module_valkey.url, CONTROL_KEY=KEY, WORKERS=2)
    try:
        started.wait_for("ready")
        yield started
    finally:
        started.stop()


def begin(server: Server, user: str, **rights: object) -> dict[str, Any]:
    reply = server.ask("POST", "/v1/tokens", {"user": user, **rights})
    assert reply.status == 201, reply
    server.issuer.keep(reply.body["access_token"])
    server.issuer.keep(reply.body["refresh_token"])
    return dict(reply.body)


# --- who may ---------------------------------------------------------------------------------

ROUTES = [
    ("POST", "/v1/tokens"),
    ("PATCH", "/v1/sessions/s"),
    ("DELETE", "/v1/sessions/s"),
    ("GET", "/v1/sessions?user=u"),
    ("POST", "/v1/revocations"),
    ("POST", "/v1/rooms/r/messages"),
    ("GET", "/v1/rooms/r/messages"),
    ("GET", "/v1/rooms"),
    ("GET", "/v1/workers"),
    ("GET", "/metrics"),
]


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "key",
    [None, "", "x", KEY[:-1], KEY + "x", KEY.swapcase(), "é"],
    ids=["none", "empty", "x", "shorter", "longer", "other-case", "not-ascii"],
)
def test_without_the_key_nothing_is_done(
    server: Server, method: str, path: str, key: str | None
) -> None:
    reply = server.ask(method, path, b"{", key=key)

    assert (reply.status, reply.code) == (401, "unauthorized")
    assert reply.headers["www-authenticate"] == "Bearer"


def test_two_keys_are_none(server: Server) -> None:
    link = http.client.HTTPConnection("127.0.0.1", server.control_port, timeout=PATIENCE)
    link.putrequest("GET", "/v1/workers")
    link.putheader("Authorization", f"Bearer {KEY}")
    link.putheader("Authorization", f"Bearer {KEY}")
    link.endheaders()
    answer = link.getresponse()
    link.close()

    assert answer.status == 401


@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/openapi.json", "/docs"])
def test_health_and_the_description_need_no_key(server: Server, path: str) -> None:
    reply = server.ask("GET", path, b"{", key=None)  # a body that nobody asked for

    assert reply.status == 200
    assert reply.headers["cache-control"] == "no-store"
    assert not {"server", "date"} & reply.headers.keys()


# --- sessions --------------------------------------------------------------------------------


async def test_a_login_gives_tokens_that_connect_and_can_be_traded(
    server: Server, user: str, room: str
) -> None:
    pair = begin(server, user, roles=["x"], rooms={room: "rw"})

    async with await Client.connect(server.url, pair["access_token"]) as client:
        ack = await client.join(room)

    assert set(pair) == PAIR
    assert ack["rights"] == "rw"
    assert client.welcome["session"] == pair["session"]
    assert client.welcome["roles"] == ["x"]
    now = time.time() * 1000
    assert 890_000 < pair["expires_at"] - now <= 901_000
    assert 604_790_000 < pair["refresh_expires_at"] - now <= 604_801_000


async def test_changed_rights_are_told_to_the_sockets_and_said_by_the_next_token(
    server: Server, user: str, room: str
) -> None:
    pair = begin(server, user)
    async with await Client.connect(server.url, pair["access_token"]) as client:
        changed = server.ask(
            "PATCH", f"/v1/sessions/{pair['session']}", {"roles": ["guest"], "rooms": {room: "r"}}
        )
        told = await client.expect("expiring")
        following = rotate(server, pair["refresh_token"])
        ack = await client.ask("refresh", token=following["access_token"])
        joined = await client.join(room)
    without = server.ask("PATCH", f"/v1/sessions/{pair['session']}", {"rooms": None})

    assert changed.status == 200
    assert changed.body == {
        "session": pair["session"],
        "user": user,
        "roles": ["guest"],
        "rooms": {room: "r"},
        "expires_at": pair["refresh_expires_at"],
    }
    assert told["now"] is True
    assert ack["roles"] == ["guest"]
    assert joined["rights"] == "r"
    assert (without.body["roles"], without.body["rooms"]) == (["guest"], None)


def rotate(server: Server, token: str) -> dict[str, Any]:
    port = int(server.url.split(":")[2].split("/")[0])
    link = http.client.HTTPConnection("127.0.0.1", port, timeout=PATIENCE)
    link.request("POST", "/v1/tokens/refresh", headers={"Authorization": f"Bearer {token}"})
    answer = link.getresponse()
    pair: dict[str, Any] = json.loads(answer.read())
    link.close()
    assert answer.status == 200, pair
    for name in ("access_token", "refresh_token"):
        server.issuer.keep(pair[name])
    return pair


def test_rights_of_a_session_that_is_not_there_cannot_be_changed(server: Server) -> None:
    reply = server.ask("PATCH", "/v1/sessions/none", {"roles": []})

    assert (reply.status, reply.code) == (404, "not_found")


async def test_a_users_sessions_are_told_from_all_workers(server: Server, user: str) -> None:
    """SO_REUSEPORT spreads connections; with thirty, both workers have some."""
    pairs = [begin(server, user), begin(server, user)]
    clients = [
        await Client.connect(server.url, pair["access_token"]) for pair in pairs for _ in range(15)
    ]
    reply = server.ask("GET", f"/v1/sessions?user={user}")
    first = server.ask("GET", f"/v1/sessions?user={user}&limit=1")
    second = server.ask("GET", f"/v1/sessions?user={user}&limit=1&after={first.body['next']}")
    workers = server.ask("GET", "/v1/workers").body["workers"]
    for client in clients:
        await client.close()
    await eventually(lambda: server.ask("GET", f"/v1/sessions?user={user}").body["sessions"] == [])

    sessions = reply.body["sessions"]
    connections = [each for session in sessions for each in session["connections"]]
    assert [each["session"] for each in sessions] == sorted(p["session"] for p in pairs)
    assert {each["user"] for each in sessions} == {user}
    assert {each["connection"] for each in connections} == {
        client.welcome["connection"] for client in clients
    }
    assert {each["address"] for each in connections} == {"127.0.0.1"}
    assert all(abs(each["connected_since"] - time.time() * 1000) < 60_000 for each in connections)
    assert {each["worker"] for each in connections} == {each["worker"] for each in workers}
    assert sum(each["connections"] for each in workers) >= 0
    assert (first.body["sessions"], second.body["sessions"]) == (sessions[:1], sessions[1:])
    assert (reply.body["next"], second.body["next"]) == (None, None)


# --- revocations -----------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["session", "user", "token_id", "DELETE"])
async def test_a_revocation_returns_when_nobody_accepts_it_any_more(
    server: Server, issuer: Issuer, user: str, by: str
) -> None:
    session, token_id = unique("s"), unique("t")
    token = issuer.token(user, session=session, token_id=token_id)
    clients = [await Client.connect(server.url, token) for _ in range(6)]
    if by == "DELETE":
        reply = server.ask("DELETE", f"/v1/sessions/{session}")
    else:
        named = {"session": session, "user": user, "token_id": token_id}[by]
        reply = server.ask("POST", "/v1/revocations", {by: named, "reason": "for the test"})
    answers = [await refused(server.url, token) for _ in range(20)]
    ends = [(await client.until_closed())[1] for client in clients]

    assert (reply.status, reply.body) == (200, {"closed": 6, "complete": True})
    assert {(answer.status, answer.code) for answer in answers} == {(401, "token_revoked")}
    assert ends == [4503] * 6


# --- rooms -----------------------------------------------------------------------------------


async def test_a_message_is_published_as_a_user_and_read_back(
    server: Server, issuer: Issuer, user: str, room: str
) -> None:
    message = b'{"user":"robot","key":"k","body":{"n": 1.50,  "s":"\\u00e9"}}'
    async with await Client.connect(server.url, issuer.token(user)) as client:
        await client.join(room)
        first = server.ask("POST", f"/v1/rooms/{room}/messages", message)
        again = server.ask("POST", f"/v1/rooms/{room}/messages", message)
        server.ask("POST", f"/v1/rooms/{room}/messages", {"user": "robot", "body": None})
        events = await client.messages(2)
    page = server.ask("GET", f"/v1/rooms/{room}/messages?limit=1")
    older = server.ask("GET", f"/v1/rooms/{room}/messages?before=2")
    rest = server.ask("GET", f"/v1/rooms/{room}/messages?after=1")

    assert (first.status, again.status) == (201, 201)
    assert set(first.body) == {"room", "epoch", "offset", "ts"}
    assert again.body == first.body | {"duplicate": True}
    assert [event["body"] for event in events] == [{"n": 1.5, "s": "é"}, None]
    assert events[0]["user"] == "robot"
    assert (page.body["events"], page.body["more"]) == (events[1:], True)
    assert (older.body["events"], older.body["more"]) == (events[:1], False)
    assert (rest.body["events"], rest.body["more"]) == (events[1:], False)


def test_every_room_is_found_page_by_page(server: Server) -> None:
    names = {unique("room") for _ in range(40)}
    for name in names:
        server.ask("POST", f"/v1/rooms/{name}/messages", {"user": "u", "body": 1, "key": "}:meta"})
    found, after = [], "0"
    while after is not None:
        page = server.ask("GET", f"/v1/rooms?limit=7&after={after}").body
        found += page["rooms"]
        after = page["next"]

    states = {room["room"]: room["offset"] for room in found}
    assert {name: states.get(name) for name in names} == dict.fromkeys(names, 1)


# --- what is wrong ---------------------------------------------------------------------------

LONG = "x" * 129
DEEP = {levels: b"[" * levels + b"]" * levels for levels in (300, 1030)}
"""Beyond what pydantic takes, and beyond what Python's parser does."""


@pytest.mark.parametrize(
    ("method", "path", "body", "where"),
    [
        ("POST", "/v1/tokens", None, "$"),
        ("POST", "/v1/tokens", b"{", "$"),
        ("POST", "/v1/tokens", b"[" * 100_000, "$"),
        ("POST", "/v1/tokens", b'{"user":NaN}', "$"),
        ("POST", "/v1/tokens", b'{"user":"\\ud800"}', "$"),
        ("POST", "/v1/tokens", b'{"user":"\xff"}', "$"),
        ("POST", "/v1/tokens", [], "$"),
        ("POST", "/v1/tokens", {}, "$.user"),
        ("POST", "/v1/tokens", {"user": 1}, "$.user"),
        ("POST", "/v1/tokens", {"user": LONG}, "$.user"),
        ("POST", "/v1/tokens", {"user": "a\nb"}, "$.user"),
        ("POST", "/v1/tokens", {"user": "a", "roles": "admin"}, "$.roles"),
        ("POST", "/v1/tokens", {"user": "a", "roles": ["r"] * 33}, None),
        ("POST", "/v1/tokens", {"user": "a", "rooms": {"a*b": "r"}}, None),
        ("POST", "/v1/tokens", {"user": "a", "rooms": {"a": "rwx"}}, None),
        ("POST", "/v1/revocations", {}, "$"),
        ("POST", "/v1/revocations", {"user": "a", "session": "b"}, "$"),
        ("POST", "/v1/revocations", {"session": ""}, "$.session"),
        ("POST", "/v1/tokens", b'{"user":"a","x":' + b"9" * 5000 + b"}", "$"),
        ("POST", "/v1/rooms/r/messages", {"user": "a"}, "$.body"),
        ("POST", "/v1/rooms/r/messages", b'{"user":"a","body":1e400}', "$"),
        ("POST", "/v1/rooms/r/messages", b'{"user":"a","body":%b}' % DEEP[300], "$.body"),
        ("POST", "/v1/rooms/r/messages", b'{"user":"a","body":%b}' % DEEP[1030], "$"),
        ("POST", "/v1/rooms/r/messages", {"user": "a", "body": 1, "key": ""}, "$.key"),
        ("POST", "/v1/rooms/r%20x/messages", {"user": "a", "body": 1}, "$.room"),
        ("GET", "/v1/rooms/%7Br%7D/messages", None, "$.room"),
        ("GET", "/v1/rooms/r/messages?before=1&after=1", None, "$.after"),
        ("GET", "/v1/rooms/r/messages?limit=257", None, "$.limit"),
        ("GET", "/v1/rooms?after=x", None, "$.after"),
        ("GET", f"/v1/rooms?after={2**64}", None, "$.after"),
        ("GET", "/v1/rooms?limit=0", None, "$.limit"),
        ("GET", "/v1/sessions", None, "$.user"),
    ],
)
def test_what_is_wrong_is_told_with_its_place(
    server: Server, method: str, path: str, body: object, where: str | None
) -> None:
    reply = server.ask(method, path, body)

    assert (reply.status, reply.code) == (400, "invalid")
    assert reply.body["error"].get("path") == where
    assert reply.headers["cache-control"] == "no-store"


def test_a_body_too_deep_or_too_large_is_refused(server: Server) -> None:
    deep = b'{"user":"a","body":' + b"[" * 65 + b"]" * 65 + b"}"
    large = {"user": "a", "body": "x" * 70_000}
    huge = {"user": "a", "body": "x" * 1_100_000}

    replies = [server.ask("POST", "/v1/rooms/r/messages", body) for body in (deep, large, huge)]

    assert [(reply.status, reply.code) for reply in replies] == [
        (400, "invalid"),
        (413, "too_large"),
        (413, "too_large"),
    ]


def test_other_paths_and_methods_have_the_same_shape(server: Server) -> None:
    missing = [server.ask("GET", path) for path in ("/v1/nothing", "/v1/workers/", "/redoc")]
    allowed = {
        "/v1/rooms": "GET",
        "/v1/rooms/r/messages": "GET, POST",
        "/v1/sessions/s": "DELETE, PATCH",
    }
    refused = {path: server.ask("PUT", path) for path in allowed}

    assert {(reply.status, reply.code) for reply in missing} == {(404, "not_found")}
    assert {(reply.status, reply.code) for reply in refused.values()} == {
        (405, "method_not_allowed")
    }
    assert {path: reply.headers["allow"] for path, reply in refused.items()} == allowed


def test_a_body_without_a_length_is_bounded(server: Server) -> None:
    head = (
        f"POST /v1/tokens HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n"
        "Transfer-Encoding: chunked\r\n\r\n"
    )
    chunk = b"10000\r\n" + b"x" * 65_536 + b"\r\n"
    with socket.create_connection(("127.0.0.1", server.control_port), PATIENCE) as link:
        link.sendall(head.encode() + 16 * chunk + b"1\r\nx\r\n")
        answer = link.recv(1000)

    assert answer.startswith(b"HTTP/1.1 413 ")


@pytest.mark.parametrize("length", ["Content-Length: 100", "Transfer-Encoding: chunked"])
def test_a_body_that_does_not_come_is_not_waited_for(server: Server, length: str) -> None:
    head = f"POST /v1/tokens HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {KEY}\r\n{length}\r\n\r\n"
    with socket.create_connection(("127.0.0.1", server.control_port), PATIENCE) as link:
        link.sendall(head.encode())
        answer = http.client.HTTPResponse(link, method="POST")
        answer.begin()
        told = json.loads(answer.read())
        end = link.recv(1)

    assert (answer.status, told["error"]["code"], end) == (408, "timeout", b"")


def test_peers_that_talk_nonsense_are_not_worth_a_line(server: Server) -> None:
    server.ask("GET", "/healthz")
    before = len(server.log().splitlines())
    for _ in range(20):
        with socket.create_connection(("127.0.0.1", server.control_port), PATIENCE) as link:
            link.sendall(b"nonsense\r\n\r\n")
            answer = link.recv(1000)
        assert answer.startswith(b"HTTP/1.1 400 ")

    assert len(server.log().splitlines()) < before + 10


def test_under_the_servers_certificate_when_it_is_not_only_for_this_machine(
    valkey: Valkey, issuer: Issuer, tmp_path: Path
) -> None:
    certificate = _certificate(tmp_path)
    server = Server(
        tmp_path / "log",
        issuer,
        REDIS_URL=valkey.url,
        CONTROL_KEY=KEY,
        CONTROL_HOST="0.0.0.0",
        TLS_CERTFILE=certificate,
        TLS_KEYFILE=certificate,
    )
    try:
        server.wait_for("ready")
        trusting = ssl.create_default_context(cafile=certificate)
        link = http.client.HTTPSConnection("localhost", server.control_port, context=trusting)
        link.request("GET", "/healthz")
        status = link.getresponse().status
        link.close()
    finally:
        server.stop()

    assert status == 200


def _certificate(directory: Path) -> Path:
    """A file with a key and a certificate of it, for localhost."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder(name, name, key.public_key(), x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.DNSName("localhost")]), critical=False)
        .sign(key, SHA256())
    )
    secret = key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())
    path = directory / "certificate.pem"
    path.write_bytes(secret + certificate.public_bytes(Encoding.PEM))
    return path


def test_what_is_described_is_what_is_done(server: Server, tmp_path: Path) -> None:
    """Schemathesis tries what the description allows and what it does not."""
    server.ask("GET", "/healthz")
    done = subprocess.run(
        [
            str(Path(sys.executable).with_name("st")),
            "run",
            f"http://127.0.0.1:{server.control_port}/openapi.json",
            "--header",
            f"Authorization: Bearer {KEY}",
            "--checks",
            "not_a_server_error,status_code_conformance,response_schema_conformance,"
            "content_type_conformance,response_headers_conformance,unsupported_method",
            "--max-examples=15",
            "--suppress-health-check=too_slow",
            "--seed=1",
            "--no-color",
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )

    assert done.returncode == 0, done.stdout[-6000:]


# --- its process -----------------------------------------------------------------------------


def test_a_control_process_that_dies_is_replaced(
    valkey: Valkey, issuer: Issuer, tmp_path: Path
) -> None:
    server = Server(tmp_path / "log", issuer, REDIS_URL=valkey.url, CONTROL_KEY=KEY)
    try:
        os.kill(server.wait_for("control_ready")["pid"], signal.SIGKILL)
        server.wait_for("control_ready", 2)
        reply = server.ask("GET", "/v1/workers")
    finally:
        server.stop()

    assert reply.status == 200


def test_a_store_that_is_away_is_told_and_comes_back(
    own_valkey: Valkey, issuer: Issuer, tmp_path: Path
) -> None:
    server = Server(tmp_path / "log", issuer, REDIS_URL=own_valkey.url, CONTROL_KEY=KEY)
    try:
        server.wait_for("ready")
        own_valkey.freeze()
        away = [server.ask("GET", path) for path in ("/readyz", "/v1/workers", "/v1/rooms")]
        alive = server.ask("GET", "/healthz")
        own_valkey.thaw()
        deadline = time.monotonic() + PATIENCE
        while server.ask("GET", "/readyz").status != 200:
            assert time.monotonic() < deadline
    finally:
        own_valkey.thaw()
        server.stop()

    assert [reply.status for reply in away] == [503, 503, 503]
    assert away[1].code == "unavailable"
    assert away[1].headers["retry-after"] == "1"
    assert alive.status == 200


def test_without_a_key_there_is_no_control_api(
    valkey: Valkey, issuer: Issuer, tmp_path: Path
) -> None:
    server = Server(tmp_path / "log", issuer, REDIS_URL=valkey.url)
    server.wait_for("ready")
    server.stop()

    assert server.lines("control_bound") == []


@pytest.mark.parametrize(
    ("variables", "says"),
    [
        ({"CONTROL_KEY": "short"}, "CHATSERVER_CONTROL_KEY is not fit to guard"),
        ({"CONTROL_KEY": KEY, "SECRET": KEY}, "it needs one of its own"),
        ({"CONTROL_KEY": KEY, "SECRET_PREVIOUS": KEY}, "it needs one of its own"),
        ({"CONTROL_KEY": KEY, "PORT": 18_321, "CONTROL_PORT": 18_321}, "are the same"),
        ({"CONTROL_KEY": KEY, "CONTROL_HOST": "192.0.2.1"}, "CHATSERVER_CONTROL_HOST"),
    ],
)
def test_a_control_api_that_cannot_be_served_stops_the_start(
    issuer: Issuer, tmp_path: Path, variables: dict[str, object], says: str
) -> None:
    server = Server(tmp_path / "log", issuer, REDIS_URL="unix:///nowhere", **variables)

    assert server.process.wait(PATIENCE) == 78
    assert says in server.log()


def test_a_busy_port_is_named(valkey: Valkey, server: Server, tmp_path: Path) -> None:
    port = server.control_port
    second = Server(
        tmp_path / "log", Issuer(), REDIS_URL=valkey.url, CONTROL_KEY=KEY, CONTROL_PORT=port
    )

    assert second.process.wait(PATIENCE) == 78
    assert f"Port {port} on 127.0.0.1 is in use" in second.log()
    assert "CHATSERVER_CONTROL_PORT" in second.log()

"""SIGHUP on a real server: every process is another one afterwards, and nobody lost anything."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import ssl
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from websockets.exceptions import ConnectionClosed

from tests.conftest import AMPLE
from tests.support import served
from tests.support.client import Client, Raw, http, request, upgrade_headers
from tests.support.stopwatch import Stopwatch
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, end, eventually

KEY = "correct horse battery staple, and a control key with it: 4f1c9a7be2d05836"


class Host:
    """``chatserver serve`` with these settings."""

    def __init__(self, log: Path, store: Valkey, issuer: Issuer, **settings: object) -> None:
        self.scheme = "wss" if "tls_certfile" in settings else "ws"
        self._issuer = issuer
        self._log = log
        others = {k: v for k, v in os.environ.items() if not k.startswith("CHATSERVER_")}
        mine: dict[str, object] = {
            "secret": issuer.secret,
            "redis_url": store.url,
            "port": 0,
            "drain_seconds": 1,
            "handshake_rate": 100_000,
            **AMPLE,
            **settings,
        }
        with log.open("wb") as output:
            self.process = subprocess.Popen(
                [*served.COMMAND, "serve"],
                env=others | {f"CHATSERVER_{k.upper()}": str(v) for k, v in mine.items()},
                stdout=output,
                stderr=output,
            )

    async def wait_for(self, event: str, count: int = 1) -> list[dict[str, Any]]:
        """The first so many lines of the log with this event."""
        try:
            await eventually(lambda: len(self.lines(event)) >= count, event, 3 * PATIENCE)
        except AssertionError:
            raise AssertionError(f"{event}: {self.log()[-8000:]}") from None
        return self.lines(event)[:count]

    def lines(self, event: str) -> list[dict[str, Any]]:
        # The last line may not be whole yet.
        lines = self.log().rpartition("\n")[0].splitlines()
        found = [json.loads(line) for line in lines if line.startswith("{")]
        return [line for line in found if line["event"] == event]

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    async def url(self) -> str:
        [ready] = await self.wait_for("ready")
        return f"{self.scheme}://127.0.0.1:{ready['port']}/v1/ws"

    def workers(self) -> list[int]:
        """The process ids of all that ever served."""
        return [line["pid"] for line in self.lines("worker_ready")]

    def roll(self) -> None:
        self.process.send_signal(signal.SIGHUP)

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        try:
            code = self.process.wait(2 * PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
            raise AssertionError(f"it did not end: {self.log()[-8000:]}") from None
        assert code == 0, self.log()[-8000:]
        assert "Traceback" not in self.log(), self.log()[-8000:]
        assert self._issuer.secrets_in(self.log()) == []


StartHost = Callable[..., Host]


@pytest.fixture
def start_host(issuer: Issuer, tmp_path: Path, own_valkey: Valkey) -> Iterator[StartHost]:
    """Servers on ``own_valkey``; they end with the test."""
    with ExitStack() as running:

        def start(**settings: object) -> Host:
            host = Host(tmp_path / unique("log"), own_valkey, issuer, **settings)
            running.callback(host.stop)
            return host

        yield start


class Member:
    """In a room all the time, as a client should be: it comes back, and asks for what it missed."""

    def __init__(self, url: str, token: str, room: str) -> None:
        self._url = url
        self._token = token
        self._room = room
        self._since: dict[str, Any] | None = None
        self.joined = 0
        self.received: list[Any] = []
        self.ends: list[int] = []
        self.afters: list[int] = []

    async def stay(self) -> None:
        while True:
            async with await Client.connect(self._url, self._token) as client:
                try:
                    await self._follow(client)
                except ConnectionClosed as closed:
                    self.ends.append(1006 if closed.rcvd is None else closed.rcvd.code)
                with suppress(ConnectionClosed):
                    while True:
                        await client.receive()  # The bye is unread if it was the join that failed.
                byes = [frame for frame in client.seen if frame["type"] == "bye"]
                self.afters += [bye["after"] for bye in byes]
            await asyncio.sleep(self.afters[-1] / 1000 if byes else 0)

    async def _follow(self, client: Client) -> None:
        since = {} if self._since is None else {"since": self._since}
        ack = await client.join(self._room, **since)
        assert self._since is None or ack["recovered"] is True
        self.joined += 1
        epoch = ack["epoch"]
        if self._since is None:
            self._since = {"epoch": epoch, "offset": ack["offset"]}
        while True:
            frame = await client.expect("message", within=4 * PATIENCE)
            self.received.append(frame["body"])
            self._since = {"epoch": epoch, "offset": frame["offset"]}


class Publisher:
    """Sends 0, 1, 2 …; what it does not know to be there it sends again with the same key."""

    def __init__(self, url: str, token: str, room: str) -> None:
        self._url = url
        self._token = token
        self._room = room
        self.acked = 0

    async def publish(self) -> None:
        while True:
            async with await Client.connect(self._url, self._token) as client:
                try:
                    while True:
                        await client.publish(self._room, self.acked, key=f"k{self.acked}")
                        self.acked += 1
                        await asyncio.sleep(0.01)
                except ConnectionClosed:
                    pass


class Visitors:
    """Handshake after handshake; every one must succeed."""

    def __init__(self, url: str, issuer: Issuer) -> None:
        self._url = url
        self._issuer = issuer
        self.welcomed = 0

    async def come_and_go(self) -> None:
        token = self._issuer.token(unique("visitor"))
        while True:
            async with await Client.connect(self._url, token):
                self.welcomed += 1


async def ask_on_and_on(port: int, enough: asyncio.Event) -> None:
    """Of the control API; every request must be answered."""
    while not enough.is_set():
        url = f"http://127.0.0.1:{port}"
        answer = await http(url, "/healthz", headers={"Connection": "close"})
        assert answer.status == 200, answer


async def test_under_load_nobody_is_refused_and_nothing_is_lost(
    start_host: StartHost, issuer: Issuer, room: str
) -> None:
    host = start_host(workers=2, control_key=KEY, control_port=0)
    url = await host.url()
    members = [Member(url, issuer.token(unique("member")), room) for _ in range(20)]
    publisher = Publisher(url, issuer.token("bob"), room)
    visitors = Visitors(url, issuer)
    running = [asyncio.create_task(member.stay()) for member in members]
    running += [asyncio.create_task(visitors.come_and_go()) for _ in range(8)]
    [bound] = host.lines("control_bound")
    enough = asyncio.Event()
    asking = [asyncio.create_task(ask_on_and_on(bound["port"], enough)) for _ in range(4)]

    def none_has_failed() -> bool:
        for task in (*running, *asking):
            if task.done():
                task.result()
        return True

    def counted() -> tuple[float, int, int]:
        return time.monotonic(), visitors.welcomed, publisher.acked

    await eventually(lambda: none_has_failed() and all(m.joined for m in members))
    running.append(asyncio.create_task(publisher.publish()))
    began = counted()
    await eventually(lambda: none_has_failed() and publisher.acked > 50)

    host.roll()
    await host.wait_for("rolling")
    rolling = counted()
    await eventually(lambda: none_has_failed() and host.lines("rolled"), within=3 * PATIENCE)
    rolled = counted()
    settled = publisher.acked + 10
    await eventually(lambda: none_has_failed() and all(settled in m.received for m in members))
    enough.set()
    await asyncio.gather(*asking)
    await end(running)

    old, new = host.workers()[:2], host.workers()[2:]
    assert len({*old, *new}) == 4
    assert len(host.lines("control_ready")) == 2
    # All the while, if not as fast: the new processes want the processors, too.
    calm, busy = rolling[0] - began[0], rolled[0] - rolling[0]
    for before, then, after in list(zip(began, rolling, rolled, strict=True))[1:]:
        assert (after - then) / busy > (then - before) / calm / 10
    for member in members:
        assert member.received == list(range(len(member.received)))
        assert 1 <= len(member.ends) <= 2, "it was moved once, or once more by the second worker"
        assert set(member.ends) == {1012}
        assert all(after > 0 for after in member.afters)
        assert len(member.afters) == len(member.ends)
    assert host.lines("worker_died") == host.lines("worker_killed") == []


async def test_a_handshake_under_way_is_finished_and_its_client_sent_on(
    start_host: StartHost, issuer: Issuer, user: str
) -> None:
    host = start_host()
    url = await host.url()
    headers = upgrade_headers() | {"Authorization": f"Bearer {issuer.token(user)}"}
    asked = request(url, headers=headers)
    async with await Raw.connect(url) as halfway:
        halfway.write(asked[:50])
        # Who came before a connection that was served has been accepted.
        assert (await http(url, "/healthz")).status == 200
        host.roll()
        await host.wait_for("draining")
        await http(url, "/healthz")
        halfway.write(asked[50:])
        head = await halfway.head()
        frames, code = await halfway.until_closed()
    await host.wait_for("rolled")

    assert head.status == 101
    assert [frame["type"] for frame in frames] == ["welcome", "bye"]
    assert (frames[-1]["reconnect"], code) == (True, 1012)
    assert frames[-1]["after"] > 0


async def test_a_queue_that_the_old_worker_does_not_serve_is_the_new_ones(
    start_host: StartHost, issuer: Issuer, user: str
) -> None:
    host = start_host()
    url = await host.url()
    [old] = host.workers()
    os.kill(old, signal.SIGSTOP)
    waiting = [
        asyncio.create_task(http(url, headers=upgrade_headers())) for _ in range(200)
    ]  # Refused for want of a token, but answered.
    host.roll()
    answers = await asyncio.gather(*waiting)
    await host.wait_for("rolled")

    assert [answer.status for answer in answers] == [401] * 200


async def test_a_worker_that_stands_still_is_replaced_and_its_clients_miss_nothing(
    start_host: StartHost, issuer: Issuer, room: str
) -> None:
    host = start_host(workers=2)
    url = await host.url()
    members = [Member(url, issuer.token(unique("member")), room) for _ in range(10)]
    running = [asyncio.create_task(member.stay()) for member in members]
    await eventually(lambda: all(member.joined for member in members))
    stopped = host.workers()[0]
    os.kill(stopped, signal.SIGSTOP)
    publisher = Publisher(url, issuer.token("bob"), room)
    running.append(asyncio.create_task(publisher.publish()))
    with Stopwatch() as watch:
        await host.wait_for("worker_hung")
    await host.wait_for("worker_ready", 3)
    await eventually(lambda: publisher.acked > 20)
    settled = publisher.acked
    await eventually(lambda: all(settled in member.received for member in members))
    await end(running)

    assert watch.seconds < 7.0
    assert [line["pid"] for line in host.lines("worker_hung")] == [stopped]
    assert all(m.received == list(range(len(m.received))) for m in members)


async def test_a_store_that_is_away_kills_no_worker(
    start_host: StartHost, own_valkey: Valkey, issuer: Issuer, user: str, room: str
) -> None:
    host = start_host(workers=2)
    url = await host.url()
    async with await Client.connect(url, issuer.token(user)) as client:
        await client.join(room)
        own_valkey.freeze()
        since = time.monotonic()
        await eventually(lambda: time.monotonic() - since > 8.0)
        own_valkey.thaw()
        await client.ping()

    assert host.lines("worker_hung") == host.lines("worker_died") == []
    assert len(host.workers()) == 2


def self_signed(path: Path) -> bytes:
    """Writes a new key and a certificate for it; returns what a client sees of it."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "127.0.0.1")])
    now = datetime.now(UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(minutes=30))
        .not_valid_after(now + timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    private = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    path.write_bytes(private + made.public_bytes(serialization.Encoding.PEM))
    return made.public_bytes(serialization.Encoding.DER)


def broken(path: Path) -> None:
    path.write_text("broken")


class TestUnderTLS:
    @pytest.fixture
    def files(self, tmp_path: Path) -> Path:
        return tmp_path / "both.pem"

    @pytest.fixture
    def trusting(self) -> ssl.SSLContext:
        context = ssl.create_default_context()
        context.check_hostname = False
        context.verify_mode = ssl.CERT_NONE
        return context

    async def test_a_new_certificate_is_served_and_a_broken_one_changes_nothing(
        self,
        start_host: StartHost,
        issuer: Issuer,
        user: str,
        files: Path,
        trusting: ssl.SSLContext,
    ) -> None:
        async def shown(url: str) -> bytes | None:
            async with await Client.connect(url, issuer.token(user), ssl=trusting) as visitor:
                found = visitor.socket.transport.get_extra_info("ssl_object")
                certificate: bytes | None = found.getpeercert(binary_form=True)
                return certificate

        first = self_signed(files)
        host = start_host(tls_certfile=files, tls_keyfile=files)
        url = await host.url()
        async with await Client.connect(url, issuer.token(user), ssl=trusting) as client:
            broken(files)
            host.roll()
            [failure] = await host.wait_for("not_rolling")
            await client.ping()
            assert await shown(url) == first
            second = self_signed(files)
            host.roll()
            await host.wait_for("rolled")
            _, code = await client.until_closed()

        assert "CHATSERVER_TLS_CERTFILE" in failure["reasons"][0]
        assert await shown(url) == second != first
        assert code == 1012

    async def test_a_handshake_under_way_is_finished_and_its_client_sent_on(
        self,
        start_host: StartHost,
        issuer: Issuer,
        user: str,
        files: Path,
        trusting: ssl.SSLContext,
    ) -> None:
        self_signed(files)
        host = start_host(tls_certfile=files, tls_keyfile=files)
        url = await host.url()
        asked = request(
            url, headers=upgrade_headers() | {"Authorization": f"Bearer {issuer.token(user)}"}
        )
        reader, writer = await asyncio.open_connection("127.0.0.1", urlsplit(url).port)
        async with Raw(reader, writer) as silent:
            # Who came before one that was served has been accepted.
            await (await Client.connect(url, issuer.token(user), ssl=trusting)).close()
            host.roll()
            await host.wait_for("draining")
            await (await Client.connect(url, issuer.token(user), ssl=trusting)).close()
            await writer.start_tls(trusting)
            silent.write(asked)
            head = await silent.head()
            _, code = await silent.until_closed()
        await host.wait_for("rolled")

        assert (head.status, code) == (101, 1012)

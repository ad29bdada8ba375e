"""One scrape of a whole host: two workers and the control process, over real sockets."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.support.client import Client, Raw, http, refused
from tests.support.server import KEY, Server
from tests.support.stopwatch import Stopwatch
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, eventually

LABELS = {"worker", "outcome", "code", "kind", "lane", "version", "le"}
StartServer = Callable[..., Server]


@pytest.fixture
def start_server(module_valkey: Valkey, issuer: Issuer, tmp_path: Path) -> Iterator[StartServer]:
    started: list[Server] = []

    def start(**variables: object) -> Server:
        server = Server(
            tmp_path / unique("log"),
            issuer,
            **{"REDIS_URL": module_valkey.url, "CONTROL_KEY": KEY, "WORKERS": 2} | variables,
        )
        started.append(server)
        server.wait_for("ready")
        return server

    yield start
    for server in started:
        server.stop()


class Scrape:
    """All samples of one answer."""

    def __init__(self, server: Server) -> None:
        reply = server.ask("GET", "/metrics")
        assert reply.status == 200
        self.text = reply.body.decode()
        families = text_string_to_metric_families(self.text)
        self.samples = [sample for family in families for sample in family.samples]

    def by_worker(self, name: str, **labels: str) -> dict[str, float]:
        found = {
            sample.labels["worker"]: sample.value
            for sample in self.samples
            if sample.name == f"chatserver_{name}" and labels.items() <= sample.labels.items()
        }
        assert found or name in ("connections", "ready"), f"there is no {name}"
        return found

    def sum(self, name: str, **labels: str) -> float:
        return sum(self.by_worker(name, **labels).values())

    def by(self, label: str, name: str) -> dict[str, float]:
        """What is not 0, of all workers together."""
        found: dict[str, float] = {}
        for sample in self.samples:
            if sample.name == f"chatserver_{name}" and sample.value:
                value = sample.labels[label]
                found[value] = found.get(value, 0) + sample.value
        return found


async def fresh(server: Server) -> Scrape:
    """What all workers have counted until now: each reports by itself, once a second."""
    now = time.time()

    def told() -> bool:
        scrapes.append(Scrape(server))
        return min(scrapes[-1].by_worker("report_timestamp_seconds").values()) > now

    scrapes: list[Scrape] = []
    await eventually(told)
    return scrapes[-1]


async def connect(server: Server, issuer: Issuer, count: int) -> list[Client]:
    """Enough that both workers have some: SO_REUSEPORT spreads them."""
    return [await Client.connect(server.url, issuer.token(unique("user"))) for _ in range(count)]


async def test_one_scrape_has_the_sums_of_all_workers(
    start_server: StartServer, issuer: Issuer, room: str
) -> None:
    server = start_server()
    clients = await connect(server, issuer, 16)
    for client in clients:
        await client.join(room)
    here = await fresh(server)

    sender, session = clients[0], unique("s")
    for n in range(10):
        await sender.publish(room, n, key=f"k{n}")
    await sender.publish(room, 0, key="k0")
    cross = await sender.ask("send", rooms=[room, "dm:x:y"], body="both")
    assert (await sender.ask("send", room="dm:x:y", body=1))["code"] == "forbidden"
    assert (await sender.ask("join", room="dm:x:y"))["code"] == "forbidden"
    assert (await sender.ask("nonsense"))["code"] == "unknown_type"
    assert "offset" in cross["results"][0]
    quiet = await clients[1].publish(room, "not shown to me", echo=False)
    for client in clients[2:]:
        await client.messages(12)
    await sender.messages(12)
    await clients[1].expect(lambda frame: frame.get("offset") == quiet["offset"])

    late = await Client.connect(server.url, issuer.token("latecomer", session=session))
    await late.join(room, last=5)
    await late.messages(5)
    await late.ask("refresh", token=issuer.token("latecomer", session=session))
    assert (await late.ask("refresh", token=issuer.token("other")))["code"] == "identity_mismatch"

    for _ in range(3):
        await refused(server.url, "nonsense")
    await refused(server.url)
    await http(server.url, "/nowhere")
    await http(server.url, "/v1/tokens/refresh", method="POST")

    await clients[1].close()
    await clients[2].socket.close(1001)
    await clients[3].socket.close(4999)
    await clients[4].drop()
    await clients[5].send(b"binary")
    await clients[6].send("[]")
    raw = await Raw.upgraded(server.url, issuer.token("raw"))
    raw.write(b"\xff\xff")  # No WebSocket frame.
    await raw.until_closed()
    revoked_at = time.time()
    server.ask("POST", "/v1/revocations", {"session": session})

    expected = {
        "1000": 1.0,
        "1001": 1.0,
        "other": 1.0,
        "1006": 1.0,
        "4500": 2.0,
        "1002": 1.0,
        "4503": 1.0,
    }
    await eventually(lambda: Scrape(server).by("code", "closes_total") == expected)
    scrape = await fresh(server)
    since = time.time() - revoked_at
    for client in [*clients, late]:
        await client.drop()
    async with raw:
        pass

    assert set(here.by_worker("connections")) == {"0", "1"}
    assert all(here.by_worker("connections").values())
    assert here.sum("rooms") == 2
    assert here.sum("ready") == 2
    assert here.sum("worker_processes") == 2
    assert here.sum("connections") == 16
    assert scrape.sum("connections") == 10
    assert scrape.by("outcome", "handshakes_total") == {
        "accepted": 18,
        "token_invalid": 3,
        "token_missing": 1,
        "not_found": 1,
    }
    assert scrape.by("outcome", "rotations_total") == {"token_missing": 1}
    assert scrape.by("outcome", "sends_total") == {"stored": 12, "duplicate": 1, "forbidden": 2}
    assert scrape.by("code", "refusals_total") == {
        "forbidden": 3,
        "unknown_type": 1,
        "identity_mismatch": 1,
    }
    assert scrape.by("outcome", "refreshes_total") == {"accepted": 1, "identity_mismatch": 1}
    # Twelve events to sixteen members, but for one skip; and five replayed.
    assert scrape.sum("delivery_latency_seconds_count") == 12 * 16 - 1
    assert scrape.sum("deliveries_total") == 12 * 16 - 1 + 5
    assert scrape.sum("replayed_events_total") == 5
    assert scrape.sum("publish_latency_seconds_count") == 13
    assert scrape.by("lane", "store_round_trip_seconds_count").keys() == {
        "publish",
        "read",
        "sessions",
        "poll",
        "other",
    }
    assert scrape.by("lane", "store_commands_total")["publish"] == 13
    assert scrape.by("kind", "revocations_total") == {"session": 2}  # On either worker.
    assert scrape.sum("revocation_lag_seconds_count") == 2
    assert 0 <= scrape.sum("revocation_lag_seconds_sum") < 2 * since
    assert 1000 < scrape.sum("received_bytes_total") < scrape.sum("sent_bytes_total")
    assert scrape.sum("received_frames_total") == 16 + 10 + 1 + 4 + 1 + 3 + 1
    assert scrape.sum("event_loop_lag_seconds_count") > 0
    assert scrape.by("lane", "store_failures_total") == {}
    assert {label for sample in scrape.samples for label in sample.labels} <= LABELS
    assert not [name for name in (room, session, "latecomer", "user-") if name in scrape.text]


async def test_sent_bytes_are_those_that_arrive(
    start_server: StartServer, issuer: Issuer, room: str
) -> None:
    server = start_server(WORKERS=1)
    raw = await Raw.connect(server.url)
    key = "dGhlIHNhbXBsZSBub25jZQ=="
    said = (
        f"GET /v1/ws HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
        f"Sec-WebSocket-Key: {key}\r\nSec-WebSocket-Version: 13\r\n"
        f"Authorization: Bearer {issuer.token('a')}\r\n\r\n"
    ).encode()
    raw.write(said)
    arrived = len((await raw.head()).raw)
    for command in (
        {"type": "join", "id": 1, "room": room},
        {"type": "send", "id": 2, "room": room, "body": "x" * 5000},
        {"type": "send", "id": 3, "room": room, "body": 1, "echo": False},
    ):
        raw.text(json.dumps(command))
    raw.write(b"\x89\x80\0\0\0\0")  # A ping.
    await eventually(lambda: Scrape(server).sum("deliveries_total") == 1)
    raw.write(b"\x88\x80\0\0\0\0")
    arrived += len(await raw.read_to_end())
    await eventually(lambda: Scrape(server).by("code", "closes_total") == {"1005": 1})
    async with raw:
        pass

    assert Scrape(server).sum("sent_bytes_total") == arrived


async def test_a_killed_workers_gauges_go_and_its_counts_stay(
    start_server: StartServer, issuer: Issuer, room: str
) -> None:
    server = start_server()
    clients = await connect(server, issuer, 16)
    for client in clients:
        await client.join(room)
    for n in range(5):
        await clients[0].publish(room, n)
    for client in clients:
        await client.messages(5)
    before = await fresh(server)
    victim = max(server.lines("worker_ready"), key=lambda line: line["slot"])
    os.kill(victim["pid"], signal.SIGKILL)
    others = before.by_worker("connections")["0"]
    await eventually(lambda: Scrape(server).sum("connections") == others)
    server.wait_for("worker_ready", 3)
    await eventually(lambda: Scrape(server).by_worker("connections").get("1") == 0)
    after = Scrape(server)
    for client in clients:
        await client.drop()

    assert before.sum("deliveries_total") == 80
    assert before.sum("connections") == 16
    assert 0 < others < 16
    assert after.sum("worker_processes") == 2
    for name in ("deliveries_total", "received_frames_total", "delivery_latency_seconds_count"):
        assert after.by_worker(name) == before.by_worker(name)
    assert after.sum("handshakes_total", outcome="accepted") == 8 * 2


async def test_a_scrape_does_not_wait_for_a_worker_that_hangs(start_server: StartServer) -> None:
    server = start_server()
    pid = next(line["pid"] for line in server.lines("worker_ready") if line["slot"] == 0)
    os.kill(pid, signal.SIGSTOP)
    stopped_at = time.time()
    await eventually(
        lambda: Scrape(server).by_worker("report_timestamp_seconds")["1"] > stopped_at + 1.0
    )
    with Stopwatch() as watch:
        scrape = Scrape(server)
    os.kill(pid, signal.SIGCONT)

    assert watch.seconds < PATIENCE / 5
    assert scrape.by_worker("report_timestamp_seconds")["0"] < stopped_at + 0.1
    assert scrape.sum("worker_processes") == 2


async def test_no_counter_goes_back_in_a_rolling_restart(
    start_server: StartServer, issuer: Issuer, room: str
) -> None:
    server = start_server()
    clients = await connect(server, issuer, 16)
    for client in clients:
        await client.join(room)
    await clients[0].publish(room, 1)
    for client in clients:
        await client.messages(1)
    scrapes = [await fresh(server)]
    server.process.send_signal(signal.SIGHUP)
    while not server.lines("rolled"):
        scrapes.append(Scrape(server))
    ends = [(await client.until_closed())[1] for client in clients]
    scrapes.append(Scrape(server))

    assert ends == [1012] * 16
    assert scrapes[-1].by("code", "closes_total") == {"1012": 16}
    assert scrapes[-1].sum("deliveries_total") == 16
    assert 3 in {scrape.sum("worker_processes") for scrape in scrapes}
    assert scrapes[-1].sum("connections") == 0
    for name in ("handshakes_total", "deliveries_total", "process_cpu"):
        for worker in ("0", "1"):
            values = [
                sum(
                    sample.value
                    for sample in scrape.samples
                    if name in sample.name and sample.labels["worker"] == worker
                )
                for scrape in scrapes
            ]
            assert values == sorted(values)


def test_metrics_end_with_the_host(start_server: StartServer) -> None:
    server = start_server()
    [control] = [line["pid"] for line in server.lines("control_ready")]
    words = Path(f"/proc/{control}/cmdline").read_text().split("\0")
    directory = Path(words[words.index("--reports") + 1])
    assert directory.is_dir()
    server.stop()

    assert not directory.exists()

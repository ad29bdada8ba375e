"""Fan-out: one room, one publisher, everyone else receives."""

from __future__ import annotations

import socket
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from . import report, wire
from .servers import Process, Rig, Unavailable, Usage, bottleneck

ABOUT = "deliveries/s in one room, beside C, websockets' broadcast(), Node ws and Socket.IO"
SOCKETS = 1000
EVENT_BYTES = 200
WINDOWS = (1, 64)
ROUNDS = 3
CHATSERVER, EPOLL, BROADCAST, WS, SOCKETIO = (
    "chatserver",
    "C epoll",
    "websockets",
    "Node ws",
    "Socket.IO",
)
YARDSTICKS = (EPOLL, BROADCAST, WS, SOCKETIO)
WARM_SECONDS = 0.3
PATIENCE_SECONDS = 15.0
PING_BYTES = 2


class Publisher:
    """Keeps a number of messages in flight.

    One is in flight until the publisher, who joined last and is served last, has received it
    itself, and until it was acknowledged where the server does so.
    """

    def __init__(
        self, client: socket.socket, message: bytes, event: bytes, *, acknowledged: bool
    ) -> None:
        client.setblocking(True)
        self.client = client
        self._message = message
        self._event = event
        """What every event begins with."""
        self._acknowledged = acknowledged
        self._buffer = bytearray()
        self.window = 0
        self.sent = 0
        self.acks = 0
        self.refused = 0
        self.events = 0
        self.event_bytes = 0
        """Size on the wire of all events so far: the same for every receiver."""

    def in_flight(self) -> int:
        done = min(self.events, self.acks) if self._acknowledged else self.events
        return self.sent - self.refused - done

    def fill(self) -> None:
        missing = self.window - self.in_flight()
        if missing > 0:
            self.sent += missing
            self.client.sendall(self._message * missing)

    def receive(self) -> None:
        data = self.client.recv(1 << 20)
        if not data:
            raise RuntimeError("the server closed the publisher's connection")
        self._buffer += data
        for _, payload, size in wire.take_frames(self._buffer):
            if payload.startswith(self._event):
                self.events += 1
                self.event_bytes += size
            elif payload.startswith(wire.ACK):
                self.acks += 1
            elif payload.startswith(wire.ERROR):
                # Another takes its place. Its event may come yet, but never its ack.
                wire.note_refusal(payload)
                self.refused += 1
        self.fill()


@dataclass
class Subject:
    """A server with its receivers, and what was measured of it."""

    name: str
    publisher: Publisher
    sink: wire.Sink
    usage: Usage
    rates: dict[int, list[float]] = field(default_factory=dict)
    shares: dict[int, list[dict[str, float]]] = field(default_factory=dict)

    def measure(self, window: int, seconds: float) -> None:
        """Deliveries per second with so many messages in flight."""
        publisher, sink = self.publisher, self.sink
        events_before, event_bytes_before = publisher.events, publisher.event_bytes
        publisher.window = window
        publisher.fill()
        self._go_on(min(WARM_SECONDS, seconds))
        self.usage.start()
        bytes_before, began = sink.total(), time.perf_counter()
        self._go_on(seconds)
        # A server that is starved for a short stretch still has a rate, if a small one.
        self._until(lambda: sink.total() > bytes_before)
        received, elapsed = sink.total() - bytes_before, time.perf_counter() - began
        shares = self.usage.shares()
        self._drain()
        event_bytes = publisher.event_bytes - event_bytes_before
        event_size = event_bytes / (publisher.events - events_before)
        self.rates.setdefault(window, []).append(received / event_size / elapsed)
        self.shares.setdefault(window, []).append(shares)

    def _go_on(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            self.sink.poll()

    def _drain(self) -> None:
        """Let everything arrive, and see that every receiver got every event to the byte."""
        self.publisher.window = 0
        self._until(lambda: not self.publisher.in_flight())
        expected = self.publisher.event_bytes
        counts = self.sink.counts
        # Pings are spread over a day: whoever has had one had no second one.
        self._until(lambda: all(0 <= n - expected <= PING_BYTES for n in counts.values()))

    def _until(self, condition: Callable[[], bool]) -> None:
        deadline = time.perf_counter() + PATIENCE_SECONDS
        while not condition():
            self.sink.poll()
            if time.perf_counter() > deadline:
                raise RuntimeError(f"{self.name}: not every receiver got every event once, in time")


def subject_of(
    name: str,
    clients: list[socket.socket],
    message: bytes,
    usage: Usage,
    *,
    event: bytes = wire.MESSAGE,
    acknowledged: bool = False,
) -> Subject:
    publisher = Publisher(clients[-1], message, event, acknowledged=acknowledged)
    others = {publisher.client.fileno(): publisher.receive}
    return Subject(name, publisher, wire.Sink(clients[:-1], others), usage)


def chatserver(rig: Rig, worker: Process, store: Process, sockets: int) -> Subject:
    mint = wire.Mint(rig.secret)
    tokens = [mint.token(f"user-{index}") for index in range(sockets + 1)]
    clients = wire.enter(worker.port, tokens, lambda index: "bench")
    head = b'{"type":"message","room":"bench","offset":10000,"ts":1760000001234,"user":"user-1000"'
    body = b'{"text":"%b"}' % (b"x" * (EVENT_BYTES - len(head) - len(b',"body":{"text":""}}')))
    message = wire.client_frame(b'{"type":"send","id":1,"room":"bench","body":%b}' % body)
    usage = Usage(server=worker, store=store)
    return subject_of(CHATSERVER, clients, message, usage, acknowledged=True)


def _event(start: bytes, end: bytes) -> bytes:
    """What the servers without a protocol of their own pass on."""
    return start + b"x" * (EVENT_BYTES - len(start) - len(end)) + end


MESSAGE = _event(wire.MESSAGE + b',"text":"', b'"}')
SOCKETIO_EVENT = b'42["message",'


def epoll_send(rig: Rig, sockets: int) -> Subject:
    frame = wire.server_frame(MESSAGE)
    server = rig.epoll_send(sockets, len(frame))
    clients = [wire.connect(server.port, index) for index in range(sockets + 1)]
    return subject_of(EPOLL, clients, frame, Usage(server=server))


def broadcast(rig: Rig, sockets: int) -> Subject:
    server = rig.broadcast()
    clients = [_upgraded(server, index, "/")[0] for index in range(sockets + 1)]
    return subject_of(BROADCAST, clients, wire.client_frame(MESSAGE), Usage(server=server))


def ws(rig: Rig, sockets: int) -> Subject:
    server = rig.node("ws.mjs")
    clients = [_upgraded(server, index, "/")[0] for index in range(sockets + 1)]
    return subject_of(WS, clients, wire.client_frame(MESSAGE), Usage(server=server))


def socketio(rig: Rig, sockets: int) -> Subject:
    """Engine.IO's packets 0 (open) and 4 (message), Socket.IO's 0 (connect) and 2 (event)."""
    server = rig.node("socketio.mjs")
    clients = []
    for index in range(sockets + 1):
        client, rest = _upgraded(server, index, "/socket.io/?EIO=4&transport=websocket")
        wire.await_frame(client, b'0{"sid"', rest)
        client.sendall(wire.client_frame(b"40"))
        wire.await_frame(client, b'40{"sid"', bytearray())
        clients.append(client)
    message = wire.client_frame(_event(SOCKETIO_EVENT + b'{"text":"', b'"}]'))
    usage = Usage(server=server)
    return subject_of(SOCKETIO, clients, message, usage, event=SOCKETIO_EVENT)


def _upgraded(server: Process, index: int, path: str) -> tuple[socket.socket, bytearray]:
    """A WebSocket without a token, and what came after the answer to its handshake."""
    client = wire.connect(server.port, index)
    client.sendall(wire.upgrade(None, path))
    return client, wire.await_upgrade(client)


def run(seconds: float, sockets: int | None) -> dict[str, object]:
    """Rounds of all servers in turn, so that a noisy moment hits none of them alone."""
    sockets = min(sockets or SOCKETS, wire.descriptors_left() // 5)
    notes: list[str] = []
    with Rig() as rig:
        store = rig.store()
        # Bytes are compared, so there must be no pings among the events.
        worker = rig.worker(CHATSERVER_PING_INTERVAL="86400")
        subjects = [chatserver(rig, worker, store, sockets)]
        for yardstick in (epoll_send, broadcast, ws, socketio):
            try:
                subjects.append(yardstick(rig, sockets))
            except Unavailable as missing:
                notes.append(str(missing))
        for _ in range(ROUNDS):
            for window in WINDOWS:
                for subject in subjects:
                    subject.measure(window, seconds)
    rows = [_row(subject, window, subjects) for window in WINDOWS for subject in subjects]
    notes += [note for row in rows if (note := bottleneck(_who(row), row["cpu"]))]
    return {"sockets": sockets, "rows": rows, "notes": list(dict.fromkeys(notes))}


def _who(row: dict[str, Any]) -> str:
    return f"{row['server']}, W={row['window']}"


def _row(subject: Subject, window: int, subjects: list[Subject]) -> dict[str, Any]:
    rates = subject.rates[window]
    shares = {
        name: statistics.median(each[name] for each in subject.shares[window])
        for name in subject.shares[window][0]
    }
    row: dict[str, Any] = {
        "server": subject.name,
        "window": window,
        "deliveries": statistics.median(rates),
        "rounds": [round(rate) for rate in rates],
        "cpu": shares,
    }
    for other in subjects:
        if other is not subject:
            # Round by round: what shared a noisy moment is compared.
            ratios = [a / b for a, b in zip(rates, other.rates[window], strict=True)]
            row[f"x {other.name}"] = statistics.median(ratios)
    return row


def table(result: dict[str, Any]) -> report.Table:
    rows = []
    for row in result["rows"]:
        ratios = [f"{row[f'x {name}']:.2f}" if f"x {name}" in row else "-" for name in YARDSTICKS]
        shares = [report.share(row["cpu"], name) for name in ("server", "client", "store")]
        rows.append(
            [row["server"], str(row["window"]), f"{row['deliveries']:,.0f}", *ratios, *shares]
        )
    yardsticks = [f"× {name}" for name in YARDSTICKS]
    return report.Table(
        f"one room, {result['sockets']:,} receivers; W messages in flight; medians of rounds",
        ["server", "W", "deliveries/s", *yardsticks, "server CPU", "client", "store"],
        rows,
    )

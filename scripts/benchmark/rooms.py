"""Many small rooms: what a server does all day. One publisher in each room of ten."""

from __future__ import annotations

import re
import select
import socket
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from . import report, wire
from .servers import Process, Rig, Usage, bottleneck

ABOUT = "many small rooms, sends/s and latency"
ROOMS = 500
MEMBERS = 10
SOCKETS = ROOMS * MEMBERS
OPEN_RATE = 2000
PADDING = b"x" * 60
WARM_SECONDS = 0.5
_SENT_AT = re.compile(rb'"t":(\d+)')


def _send(room: int) -> bytes:
    """A message with the time in it."""
    body = b'{"t":%d,"text":"%b"}' % (time.perf_counter_ns(), PADDING)
    return wire.client_frame(b'{"type":"send","id":1,"room":"room-%d","body":%b}' % (room, body))


class ClosedLoop:
    """Each publisher sends its next message when the one before is acknowledged."""

    def __init__(self, clients: Sequence[socket.socket], rooms: int) -> None:
        publishers = clients[:rooms]
        calls = {
            client.fileno(): partial(self._receive, client, room)
            for room, client in enumerate(publishers)
        }
        self._sink = wire.Sink(clients[rooms:], calls)
        self._publishers = publishers
        self._running = True
        self._in_flight = 0
        self.acks = 0

    def run(self, seconds: float, usage: Usage) -> dict[str, Any]:
        for room, client in enumerate(self._publishers):
            self._publish(client, room)
        self._go_on(WARM_SECONDS)
        usage.start()
        acks, began = self.acks, time.perf_counter()
        self._go_on(seconds)
        rate = (self.acks - acks) / (time.perf_counter() - began)
        shares = usage.shares()
        self._running = False
        while self._in_flight:
            self._sink.poll()
        self._go_on(0.2)
        return {"sends": rate, "cpu": shares}

    def _go_on(self, seconds: float) -> None:
        until = time.perf_counter() + seconds
        while time.perf_counter() < until:
            self._sink.poll()

    def _publish(self, client: socket.socket, room: int) -> None:
        client.send(_send(room))
        self._in_flight += 1

    def _receive(self, client: socket.socket, room: int) -> None:
        # Replies of one connection are few and small: none is cut in two by the kernel.
        acks = client.recv(65536).count(wire.ACK)
        self.acks += acks
        self._in_flight -= acks
        if acks and self._running:
            self._publish(client, room)


class OpenLoop:
    """Messages at a fixed rate, whatever becomes of them; how long each delivery takes.

    ``epoll`` is one whose descriptor is below select()'s limit of 1024.
    """

    def __init__(self, epoll: select.epoll, clients: Sequence[socket.socket], rooms: int) -> None:
        self._publishers = clients[:rooms]
        self._epoll = epoll
        self._clients = {client.fileno(): client for client in clients}
        for client in clients:
            client.setblocking(False)
            self._epoll.register(client, select.EPOLLIN)
        self._latencies: list[int] = []

    def run(self, seconds: float, rate: float, usage: Usage) -> dict[str, Any]:
        usage.start()
        count, began = int(rate * seconds), time.perf_counter()
        latest = 0.0
        for number in range(count):
            due = began + number / rate
            self._receive_until(due)
            latest = max(latest, time.perf_counter() - due)
            room = number % len(self._publishers)
            self._publishers[room].send(_send(room))
        shares = usage.shares()
        self._receive_until(time.perf_counter() + 1.0)
        latencies = sorted(self._latencies)
        expected = count * MEMBERS
        if len(latencies) != expected:
            raise RuntimeError(f"{len(latencies):,} deliveries of {expected:,}")
        return {
            "rate": rate,
            "p50": latencies[expected // 2] / 1e6,
            "p99": latencies[expected * 99 // 100] / 1e6,
            "max": latencies[-1] / 1e6,
            "client_late": latest * 1000,
            "cpu": shares,
        }

    def _receive_until(self, moment: float) -> None:
        """Read what comes until then."""
        while (left := moment - time.perf_counter()) > 0:
            ready = self._epoll.poll(0, 256)
            if not ready:
                _sleep_at_most(self._epoll, left)
                continue
            for fd, _ in ready:
                data = self._clients[fd].recv(65536)
                now = time.perf_counter_ns()
                self._latencies += [now - int(sent) for sent in _SENT_AT.findall(data)]


def _sleep_at_most(epoll: select.epoll, seconds: float) -> None:
    # epoll's own timeout is in whole milliseconds.
    select.select([epoll], [], [], seconds)


def _enter(rig: Rig, worker: Process, rooms: int) -> list[socket.socket]:
    """Publishers first, one in each room, then everyone else."""
    mint = wire.Mint(rig.secret)
    tokens = [mint.token(f"user-{index:04}") for index in range(rooms * MEMBERS)]
    return wire.enter(worker.port, tokens, lambda index: f"room-{index % rooms}")


def run(seconds: float, sockets: int | None) -> dict[str, object]:
    rooms = max(1, min((sockets or SOCKETS), wire.descriptors_left()) // MEMBERS)
    with select.epoll() as epoll, Rig() as rig:
        store = rig.store()
        worker = rig.worker()
        clients = _enter(rig, worker, rooms)
        closed = ClosedLoop(clients, rooms).run(seconds, Usage(server=worker, store=store))
        opened = OpenLoop(epoll, clients, rooms).run(
            seconds, OPEN_RATE, Usage(server=worker, store=store)
        )
    notes = [
        bottleneck("closed loop", closed["cpu"]),
        bottleneck("open loop", opened["cpu"]),
    ]
    return {
        "rooms": rooms,
        "members": MEMBERS,
        "closed": closed,
        "open": opened,
        "notes": [note for note in notes if note],
    }


def table(result: dict[str, Any]) -> report.Table:
    closed, opened = result["closed"], result["open"]
    return report.Table(
        f"{result['rooms']} rooms of {result['members']}, a publisher in each",
        ["", "figure"],
        [
            ["closed loop, one in flight per room", f"{closed['sends']:,.0f} sends/s"],
            ["… server, client, store CPU", report.all_shares(closed["cpu"])],
            [f"open loop, {opened['rate']:,} sends/s: p50", f"{opened['p50']:.2f} ms"],
            ["… p99", f"{opened['p99']:.2f} ms"],
            ["… longest", f"{opened['max']:.2f} ms"],
            ["… the client's own longest delay", f"{opened['client_late']:.2f} ms"],
            ["… server, client, store CPU", report.all_shares(opened["cpu"])],
        ],
    )

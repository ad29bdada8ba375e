"""Readers that stop, and readers that crawl, in a busy room: what the others notice of them.

In turns: everyone reads; ten stop and ten read 1 kB/s; these twenty read on and catch up. In the
end each of them must have every event, once and in order.
"""

from __future__ import annotations

import json
import select
import socket
import statistics
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import report, wire
from .servers import Process, Rig

ABOUT = "readers that stop, and what the others notice"
SOCKETS = 200
STOPPED = 10
CRAWLING = 10
PROBES = 10
"""Members whose deliveries are timed. The rest only read, every 10 ms: they need a core less."""
RATE = 500
BODY = 1000
CRAWL = 1000
"""Bytes per second."""
SECONDS = 5.0
ROUNDS = 3
CATCH_UP_SECONDS = 20.0
HISTORY = 100_000
SMALL_BUFFER, LARGE_BUFFER = 4096, 1 << 18
"""Receive buffers of those who do not read, then of those who catch up: below one segment of
loopback the kernel waits 200 ms for each window."""


class Reader:
    """A member that looks at what it gets."""

    def __init__(self, client: socket.socket) -> None:
        self.client = client
        self.offsets: list[int] = []
        self.latencies: list[float] = []
        self.said: list[str] = []
        """Frames that are no messages."""
        self._buffer = bytearray()

    def read(self, most: int = 1 << 16) -> bool:
        """Whether there was anything."""
        try:
            data = self.client.recv(most)
        except BlockingIOError:
            return False
        now = time.perf_counter()
        if not data:
            self.said.append("closed")
            return False
        self._buffer += data
        for opcode, payload, _ in wire.take_frames(self._buffer):
            frame = json.loads(payload) if opcode == wire.TEXT else {"type": str(opcode)}
            if frame["type"] == "message":
                self.offsets.append(frame["offset"])
                self.latencies.append(now - frame["body"]["t"])
            elif frame["type"] == "bye":
                self.said.append(payload.decode())
        return True


class Room:
    """A publisher, and members who read each in their own way."""

    def __init__(self, server: Process, publisher: socket.socket) -> None:
        self._server = server
        self._publisher = publisher
        self.sent = 0

    def run(
        self,
        seconds: float,
        probes: Sequence[Reader],
        others: Sequence[socket.socket],
        crawling: Sequence[Reader] = (),
    ) -> dict[str, float]:
        """Publish for so long; latencies of the probes in ms, and the worker's memory in MB."""
        for probe in probes:
            probe.latencies.clear()
        calls = {probe.client.fileno(): probe.read for probe in probes}
        calls[self._publisher.fileno()] = lambda: bool(self._publisher.recv(1 << 16))
        sink = wire.Sink(others, calls)  # type: ignore[arg-type]
        began, first = time.perf_counter(), self.sent
        before = most = _memory(self._server)
        crawl_at = began
        while (now := time.perf_counter()) < began + seconds:
            while self.sent - first < (now - began) * RATE:
                self._publish()
            if now >= crawl_at:
                crawl_at += 1.0
                most = max(most, _memory(self._server))
                for reader in crawling:
                    reader.read(CRAWL)
            sink.poll()
        until = time.perf_counter() + 0.5
        while time.perf_counter() < until:
            sink.poll()
        times = sorted(latency for probe in probes for latency in probe.latencies)
        return {
            "p50": times[len(times) // 2] * 1000,
            "p99": times[len(times) * 99 // 100] * 1000,
            "grown": (most - before) / 1e6,
        }

    def _publish(self) -> None:
        self.sent += 1
        body = b'{"t":%.6f,"text":"%b"}' % (time.perf_counter(), b"x" * BODY)
        self._publisher.send(
            wire.client_frame(b'{"type":"send","id":1,"room":"room","body":%b}' % body)
        )


def _catch_up(readers: Sequence[Reader], top: int) -> float:
    """Seconds until all have the room's last event, or the time is over."""
    began = time.perf_counter()
    ready = select.epoll()
    by_fd = {reader.client.fileno(): reader for reader in readers}
    for fd in by_fd:
        ready.register(fd, select.EPOLLIN)
    while time.perf_counter() < began + CATCH_UP_SECONDS:
        for fd, _ in ready.poll(0.1):
            by_fd[fd].read()
        if all(reader.offsets and reader.offsets[-1] == top for reader in readers):
            break
    return time.perf_counter() - began


def _median(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}


def _receive_buffer(reader: Reader, size: int) -> None:
    reader.client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, size)


def _memory(server: Process) -> int:
    return int(Path(f"/proc/{server.pid}/statm").read_text().split()[1]) * 4096


def run(seconds: float, sockets: int | None) -> dict[str, object]:
    seconds = max(seconds, SECONDS)
    count = sockets or SOCKETS
    with Rig() as rig:
        rig.store()
        server = rig.worker(CHATSERVER_HISTORY=str(HISTORY))
        mint = wire.Mint(rig.secret)
        tokens = [mint.token(f"user-{n}") for n in range(count + 1)]
        *clients, publisher = wire.enter(
            server.port, tokens, lambda number: "room" if number < count else "elsewhere"
        )
        for client in clients:
            client.setblocking(False)
        readers = [Reader(client) for client in clients]
        stopped, crawling = readers[:STOPPED], readers[STOPPED : STOPPED + CRAWLING]
        probes = readers[STOPPED + CRAWLING :][:PROBES]
        rest = clients[STOPPED + CRAWLING + PROBES :]
        slow = [*stopped, *crawling]
        room = Room(server, publisher)
        room.run(seconds / 4, [*slow, *probes], rest)
        baselines, disturbances, times = [], [], []
        for _ in range(ROUNDS):
            baselines.append(room.run(seconds, [*slow, *probes], rest))
            for reader in slow:
                _receive_buffer(reader, SMALL_BUFFER)
            disturbances.append(room.run(seconds, probes, rest, crawling))
            for reader in slow:
                _receive_buffer(reader, LARGE_BUFFER)
            times.append(_catch_up(slow, room.sent))
        expected = list(range(1, room.sent + 1))
        complete = sum(reader.offsets == expected for reader in slow)
        for client in (*clients, publisher):
            client.close()
    return {
        "members": count,
        "seconds": seconds,
        "sent": room.sent,
        "baseline": _median(baselines),
        "disturbed": _median(disturbances),
        "ratios": sorted(
            after["p99"] / before["p99"]
            for before, after in zip(baselines, disturbances, strict=True)
        ),
        "complete": complete,
        "caught_up": max(times),
        "notes": sorted({said for reader in slow for said in reader.said})[:5],
    }


def table(result: dict[str, Any]) -> report.Table:
    before, after = result["baseline"], result["disturbed"]
    least, ratio, most = result["ratios"]
    return report.Table(
        f"{result['members']} members, {RATE} messages/s of {BODY} bytes; then {STOPPED} of them "
        f"stop reading and {CRAWLING} read 1 kB/s for {result['seconds']:.0f} s",
        ["medians of three rounds", "all read", f"{STOPPED + CRAWLING} do not"],
        [
            ["p50 of the others", f"{before['p50']:.2f} ms", f"{after['p50']:.2f} ms"],
            ["p99", f"{before['p99']:.2f} ms", f"{after['p99']:.2f} ms"],
            ["… ratio, of three rounds", f"{least:.2f}-{most:.2f}", f"{ratio:.2f}"],
            ["worker's memory, growth", f"{before['grown']:.1f} MB", f"{after['grown']:.1f} MB"],
        ],
        f"then these read on: {result['complete']} of {STOPPED + CRAWLING} have every event, once "
        f"and in order, after {result['caught_up']:.1f} s at most",
    )

"""Thousands of handshakes at once: how soon all are in, and what those already there notice."""

from __future__ import annotations

import errno
import heapq
import multiprocessing
import os
import re
import select
import socket
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from chatserver.settings import Settings

from . import report, wire
from .servers import Rig, Usage, bottleneck

ABOUT = "thousands of handshakes at once, and what the others notice"
SOCKETS = NEWCOMERS = 10_000
ROOMS = 20
MEMBERS = 10
RATE = 400
"""Messages per second to the bystanders, over all rooms."""
QUIET_SECONDS = 3.0
AT_ONCE = 64
"""So many connect before answers are read again."""
PATIENCE_SECONDS = 60.0
AGAIN_SECONDS = 1.0
_SENT_AT = re.compile(rb'"t":(\d+)')
_RETRY_AFTER = re.compile(rb"\r\nRetry-After: (\d+)\r\n")


class Bystanders:
    """Rooms in which a member speaks at a fixed rate, and how long each delivery took."""

    def __init__(self, clients: Sequence[socket.socket]) -> None:
        self._speakers = clients[:ROOMS]
        self._clients = {client.fileno(): client for client in clients}
        self._epoll = select.epoll()
        for client in clients:
            client.setblocking(False)
            self._epoll.register(client, select.EPOLLIN)
        self._sent = 0
        self._began = 0.0
        self._latencies: list[int] = []
        self._late = 0.0

    def begin(self) -> None:
        self._sent, self._began, self._latencies, self._late = 0, time.perf_counter(), [], 0.0

    def turn(self) -> None:
        """Send what is due, read what comes until the next is."""
        now = time.perf_counter()
        while (due := self._began + self._sent / RATE) <= now:
            self._late = max(self._late, now - due)
            room = self._sent % ROOMS
            body = b'{"t":%d}' % time.perf_counter_ns()
            self._speakers[room].send(
                wire.client_frame(b'{"type":"send","id":1,"room":"b-%d","body":%b}' % (room, body))
            )
            self._sent += 1
        # epoll's own timeout is in whole milliseconds.
        select.select([self._epoll], [], [], max(0.0, due - now))
        for fd, _ in self._epoll.poll(0, len(self._clients)):
            data = self._clients[fd].recv(65536)
            now_ns = time.perf_counter_ns()
            self._latencies += [now_ns - int(sent) for sent in _SENT_AT.findall(data)]

    def end(self) -> dict[str, float]:
        """What they noticed since ``begin``, in milliseconds."""
        expected = self._sent * MEMBERS
        deadline = time.perf_counter() + 2.0
        self._began = deadline  # nothing more is due until then
        while len(self._latencies) < expected and time.perf_counter() < deadline:
            self.turn()
        if len(self._latencies) != expected:
            raise RuntimeError(f"{len(self._latencies):,} deliveries of {expected:,}")
        ordered = sorted(self._latencies)
        return {
            "p50": ordered[expected // 2] / 1e6,
            "p99": ordered[expected * 99 // 100] / 1e6,
            "max": ordered[-1] / 1e6,
            "client_late": self._late * 1000,
        }


class Storm:
    """Newcomers who all come now, and who come again when they are told to."""

    def __init__(self, port: int, tokens: Sequence[str]) -> None:
        self._port = port
        self._requests = [wire.upgrade(token) for token in tokens]
        self._epoll = select.epoll()
        self._connecting: dict[int, tuple[socket.socket, int]] = {}
        self._waiting: dict[int, tuple[socket.socket, int]] = {}
        self._due = [(0.0, index) for index in range(len(tokens))]
        self.inside: list[socket.socket] = []
        self.waits: list[float] = []
        """Until each was inside, from its first attempt on."""
        self.told: list[int] = []
        """Retry-After of each 503."""
        self.failed = 0
        """Attempts that ended without an answer."""
        self._began = time.perf_counter()

    def run(self) -> None:
        while len(self.inside) < len(self._requests):
            if time.perf_counter() - self._began > PATIENCE_SECONDS:
                raise RuntimeError(f"only {len(self.inside):,} are inside")
            for _ in range(AT_ONCE):
                if not self._due or self._due[0][0] > time.perf_counter() - self._began:
                    break
                self._connect(heapq.heappop(self._due)[1])
            for fd, _ in self._epoll.poll(0.001, AT_ONCE):
                self._go_on(fd)

    def _connect(self, index: int) -> None:
        client = socket.socket()
        client.setblocking(False)
        client.setsockopt(socket.SOL_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
        client.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        client.bind((f"127.0.0.{2 + index % 4}", 0))
        if client.connect_ex(("127.0.0.1", self._port)) not in (0, errno.EINPROGRESS):
            client.close()
            self._come_again(index, AGAIN_SECONDS)
            return
        self._connecting[client.fileno()] = (client, index)
        self._epoll.register(client, select.EPOLLOUT)

    def _go_on(self, fd: int) -> None:
        if fd in self._connecting:
            client, index = self._waiting[fd] = self._connecting.pop(fd)
            if not client.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR):
                client.send(self._requests[index])
                self._epoll.modify(fd, select.EPOLLIN)
                return
            answer = b""
        else:
            client, index = self._waiting[fd]
            answer = _receive(client)
        del self._waiting[fd]
        self._epoll.unregister(fd)
        if answer.startswith(b"HTTP/1.1 101 "):
            assert wire.WELCOME in answer  # the server sends both in one write
            self.inside.append(client)
            self.waits.append(time.perf_counter() - self._began)
            return
        client.close()
        if told := _RETRY_AFTER.search(answer):
            self.told.append(int(told[1]))
            self._come_again(index, float(told[1]))
        else:
            self.failed += 1
            self._come_again(index, AGAIN_SECONDS)

    def _come_again(self, index: int, seconds: float) -> None:
        heapq.heappush(self._due, (time.perf_counter() - self._began + seconds, index))


def _receive(client: socket.socket) -> bytes:
    try:
        return client.recv(65536)
    except OSError:
        return b""


def _storm(port: int, tokens: Sequence[str], parent: Connection) -> None:
    """The process of the newcomers: they stay until the parent has what it wants."""
    # It shares a core with the store and the bystanders, and must not be what they wait for.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    storm = Storm(port, tokens)
    storm.run()
    waits = sorted(storm.waits)
    parent.send(
        {
            "inside": {
                "p50": waits[len(waits) // 2],
                "p99": waits[len(waits) * 99 // 100],
                "max": waits[-1],
            },
            "refused": len(storm.told),
            "told": [min(storm.told), max(storm.told)] if storm.told else [],
            "failed": storm.failed,
        }
    )
    parent.recv()


def run(seconds: float, newcomers: int | None) -> dict[str, object]:
    """Bystanders by themselves, then with the newcomers, at the default rate of admission."""
    count = min(newcomers or NEWCOMERS, wire.descriptors_left())
    rate = Settings.model_fields["admission_rate"].default
    with Rig() as rig:
        store = rig.store()
        worker = rig.worker(CHATSERVER_ADMISSION_RATE=str(rate))
        mint = wire.Mint(rig.secret)
        clients = wire.enter(
            worker.port,
            [mint.token(f"bystander-{index}") for index in range(ROOMS * MEMBERS)],
            lambda index: f"b-{index % ROOMS}",
        )
        tokens = [mint.token(f"user-{index}") for index in range(count)]
        bystanders = Bystanders(clients)
        bystanders.begin()
        until = time.perf_counter() + QUIET_SECONDS
        while time.perf_counter() < until:
            bystanders.turn()
        quiet = bystanders.end()
        mine, theirs = multiprocessing.Pipe()
        forking = multiprocessing.get_context("fork")
        storm = forking.Process(target=_storm, args=(worker.port, tokens, theirs), daemon=True)
        usage = Usage(server=worker, store=store)
        bystanders.begin()
        storm.start()
        while not mine.poll() and storm.is_alive():
            bystanders.turn()
        shares = usage.shares()
        disturbed = bystanders.end()
        result: dict[str, object] = mine.recv()
        mine.send("thank you")
        storm.join()
        for client in clients:
            client.close()
    more = {"newcomers": count, "rate": rate, "quiet": quiet, "storm": disturbed}
    found = bottleneck("storm", shares)
    return result | more | {"cpu": shares, "notes": [found] if found else []}


def table(result: dict[str, Any]) -> report.Table:
    before, after, inside = result["quiet"], result["storm"], result["inside"]
    rows = [
        [text, f"{before[name]:.2f} ms", f"{after[name]:.2f} ms"]
        for name, text in (
            ("p50", "delivery, p50"),
            ("p99", "p99"),
            ("max", "longest"),
            ("client_late", "the client's own longest delay"),
        )
    ]
    return report.Table(
        f"{result['newcomers']:,} handshakes at once, {result['rate']:,.0f} admitted a second; "
        f"{ROOMS} rooms of {MEMBERS}, {RATE} messages/s, before and meanwhile",
        ["", "quiet", "storm"],
        rows,
        f"inside: p50 {inside['p50']:.2f} s, p99 {inside['p99']:.2f} s, the last "
        f"{inside['max']:.2f} s; refused {result['refused']:,} (Retry-After {result['told']}), "
        f"without an answer {result['failed']:,}; server, client, store CPU "
        f"{report.all_shares(result['cpu'])}",
    )

"""A part of a crowd: ``-m benchmark.crowd_members PORT ROOM FIRST COUNT MESSAGES REPORT_FD``.

Joins ROOM with COUNT sockets, writes a line to REPORT_FD, and reads until each of them has had
MESSAGES messages. Then it writes what it saw, as JSON. Messages bear a number, from 1, and the
time at which they were to be sent; the clock is the same for all processes of a machine.
"""

from __future__ import annotations

import gc
import json
import os
import re
import resource
import select
import sys
import time
from collections import Counter, defaultdict

from . import wire

BUCKET_NS = 100_000
"""Latencies are told in steps of 0.1 ms."""
SILENCE_SECONDS = 10.0
"""After the first message: what has not come by then is lost."""
_MESSAGE = re.compile(rb'"n":(\d+),"due":(\d+)')


class Members:
    """Sockets in the room, and what they were sent."""

    def __init__(self, port: int, room: str, first: int, count: int) -> None:
        mint = wire.Mint(os.environ["CHATSERVER_SECRET"])
        tokens = [mint.token(f"user-{first + index}") for index in range(count)]
        clients = wire.enter(port, tokens, lambda index: room)
        self._buffers: dict[int, bytearray] = {}
        """Of the sockets with a part of a frame."""
        self._by_fd = {client.fileno(): client for client in clients}
        self._known: dict[bytes, tuple[int, int]] = {}
        """Number and time of messages, by their frames: these are the same for every socket, and
        all but the first need not be parsed."""
        self._last = dict.fromkeys(self._by_fd, 0)
        self._epoll = select.epoll()
        for client in clients:
            client.setblocking(False)
            self._epoll.register(client, select.EPOLLIN)
        self._latencies: defaultdict[int, Counter[int]] = defaultdict(Counter)
        """By message: how many sockets had it after so many steps."""
        self._lost = self._doubled = self._closed = 0

    def read(self, messages: int) -> None:
        """Until everyone has had so many, or nothing has come for a while."""
        missing = len(self._by_fd)
        heard_at: float | None = None
        while missing and (heard_at is None or time.monotonic() - heard_at < SILENCE_SECONDS):
            for fd, _ in self._epoll.poll(0.5, 512):
                before = self._last[fd]
                self._receive(fd)
                if self._last[fd] != before:
                    heard_at = time.monotonic()
                    missing -= self._last[fd] == messages

    def _receive(self, fd: int) -> None:
        try:
            data = self._by_fd[fd].recv(65536)
        except ConnectionError:
            data = b""
        now = time.perf_counter_ns()
        if (known := self._known.get(data)) and fd not in self._buffers:
            self._place(fd, known, now)
        elif data:
            self._parse(fd, data, now)
        else:
            self._closed += 1
            self._epoll.unregister(fd)

    def _parse(self, fd: int, data: bytes, now: int) -> None:
        buffer = self._buffers.pop(fd, bytearray())
        buffer += data
        for opcode, payload, size in wire.take_frames(buffer):
            if opcode == wire.PING:
                self._by_fd[fd].send(wire.client_frame(payload, wire.PONG))
            elif found := _MESSAGE.search(payload):
                message = (int(found[1]), int(found[2]))
                self._place(fd, message, now)
                if size == len(data):
                    self._known[data] = message
        if buffer:
            self._buffers[fd] = buffer

    def _place(self, fd: int, message: tuple[int, int], now: int) -> None:
        number, due = message
        last = self._last[fd]
        if number <= last:
            self._doubled += 1
            return
        self._lost += number - last - 1
        self._last[fd] = number
        self._latencies[number][(now - due) // BUCKET_NS] += 1

    def report(self, messages: int) -> dict[str, object]:
        return {
            "latencies": self._latencies,
            "lost": self._lost + sum(messages - last for last in self._last.values()),
            "doubled": self._doubled,
            "closed": self._closed,
            "repeated": len(wire.repeated),
        }


def main(port: int, room: str, first: int, count: int, messages: int, report: int) -> None:
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    members = Members(port, room, first, count)
    gc.freeze()
    os.write(report, b"\n")
    members.read(messages)
    with os.fdopen(report, "w") as output:
        json.dump(members.report(messages), output)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2], *map(int, sys.argv[3:]))

"""Thousands of clients in one process: each keeps its place in one room, and comes back to it.

They follow docs/protocol.md as any client does (positions, holes, full jitter), and count what
should not be: events lost, doubled, out of order.
"""

from __future__ import annotations

import asyncio
import json
import random
import socket
import time
from collections.abc import Callable
from typing import cast

from . import wire

LONGEST_WAIT = 30.0


class Tally:
    """What all clients saw together."""

    def __init__(self) -> None:
        self.events = 0
        self.doubled = 0
        self.lost = 0
        self.unrecovered = 0
        """Rejoins that the server could not prove to be without a gap."""
        self.resets = 0
        self.refused: dict[str, int] = {}
        """Handshakes that did not succeed, by status."""
        self.closed: dict[str, int] = {}
        """Connections that ended, by what the server said."""

    def count(self, what: dict[str, int], name: str) -> None:
        what[name] = what.get(name, 0) + 1


class Member(asyncio.Protocol):
    """One client in one room. ``run`` connects; ``lost`` makes it come back by itself."""

    def __init__(
        self,
        port: int,
        token: str,
        room: str,
        index: int,
        tally: Tally,
        on_event: Callable[[Member, dict[str, object]], None] = lambda member, event: None,
    ) -> None:
        self._port = port
        self._token = token
        self.room = room
        self._index = index
        self._tally = tally
        self._on_event = on_event
        self._buffer = bytearray()
        self._upgraded = False
        self._attempt = 0
        self._said = ""
        self._transport: asyncio.Transport | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._stopping = False
        self.epoch: str | None = None
        self.last = 0
        self.goal = 0
        """The room's top when it joined: behind it until then."""
        self.joined = asyncio.Event()
        self.caught_up_at = 0.0
        self.drops = 0

    # Coming and going.

    async def connect(self) -> None:
        loop = asyncio.get_running_loop()
        sock = socket.socket()
        sock.setsockopt(socket.SOL_IP, getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24), 1)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sock.setblocking(False)
        sock.bind((f"127.0.0.{2 + self._index % 4}", 0))
        try:
            async with asyncio.timeout(10.0):
                await loop.sock_connect(sock, ("127.0.0.1", self._port))
                await loop.create_connection(lambda: self, sock=sock)
        except (OSError, TimeoutError):
            sock.close()
            self._come_back("no connection")

    def stop(self) -> None:
        self._stopping = True
        for task in self._tasks:
            task.cancel()
        if self._transport is not None:
            self._transport.abort()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._buffer.clear()
        self._upgraded = False
        self._said = ""
        self._transport.write(wire.upgrade(self._token))

    def connection_lost(self, exc: Exception | None) -> None:
        self._transport = None
        if self.joined.is_set():
            self.drops += 1
        self.joined.clear()
        if not self._stopping:
            self._tally.count(self._tally.closed, self._said or "no goodbye")
            self._come_back(self._said)

    def _come_back(self, why: str) -> None:
        if self._stopping:
            return
        wait = random.random() * min(LONGEST_WAIT, 2.0**self._attempt)
        self._attempt += 1

        async def later() -> None:
            await asyncio.sleep(wait)
            await self.connect()

        task = asyncio.ensure_future(later())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # Frames.

    def data_received(self, data: bytes) -> None:
        self._buffer += data
        if not self._upgraded:
            head, separator, rest = self._buffer.partition(b"\r\n\r\n")
            if not separator:
                return
            status = head[9:12].decode()
            if status != "101":
                self._tally.count(self._tally.refused, status)
                self._said = status
                assert self._transport is not None
                self._transport.close()
                return
            self._upgraded = True
            self._buffer = bytearray(rest)
        for opcode, payload, _ in wire.take_frames(self._buffer):
            self._receive(opcode, payload)

    def _receive(self, opcode: int, payload: bytes) -> None:
        assert self._transport is not None
        if opcode == wire.PING:
            self._transport.write(wire.client_frame(payload, wire.PONG))
        elif opcode == wire.CLOSE:
            self._said = str(int.from_bytes(payload[:2], "big"))
            self._transport.write(wire.client_frame(payload, wire.CLOSE))
            self._transport.close()
        elif opcode == wire.TEXT:
            self._receive_event(json.loads(payload))

    def _receive_event(self, frame: dict[str, object]) -> None:
        match frame["type"]:
            case "welcome":
                self._join()
            case "ack":
                self._receive_ack(frame)
            case "message" | "skip":
                self._place(frame)
            case "reset":
                self._tally.resets += 1
                self.epoch, self.last = str(frame["epoch"]), _number(frame["offset"])
            case "epoch":
                self.epoch = str(frame["epoch"])
            case "error":
                self._join()  # the only command there is

    def _join(self) -> None:
        command: dict[str, object] = {"type": "join", "id": 1, "room": self.room}
        if self.epoch is not None:
            command["since"] = {"epoch": self.epoch, "offset": self.last}
        self.send(command)

    def send(self, command: dict[str, object]) -> None:
        assert self._transport is not None
        self._transport.write(wire.client_frame(json.dumps(command).encode()))

    def _receive_ack(self, frame: dict[str, object]) -> None:
        start = _number(frame["offset"]) - _number(frame["replay"])
        if self.epoch is not None:
            if frame["recovered"]:
                self._tally.lost += max(0, start - self.last)
                self._tally.doubled += max(0, self.last - start)
            else:
                self._tally.unrecovered += 1
        self.epoch, self.last, self.goal = str(frame["epoch"]), start, _number(frame["offset"])
        self._attempt = 0
        self.joined.set()
        self._look()

    def _place(self, frame: dict[str, object]) -> None:
        offset = _number(frame["offset"])
        self._tally.events += 1
        if offset <= self.last:
            self._tally.doubled += 1
            return
        self._tally.lost += offset - self.last - 1
        self.last = offset
        self._look()
        self._on_event(self, frame)

    def _look(self) -> None:
        if self.goal is not None and self.last >= self.goal:
            self.goal = 1 << 60
            self.caught_up_at = time.monotonic()

    # Not reading.

    def pause(self) -> None:
        if self._transport is not None:
            self._transport.pause_reading()

    def resume(self) -> None:
        if self._transport is not None:
            self._transport.resume_reading()


class Publisher(Member):
    """A member that also sends, each message with a key, until it is acked."""

    def __init__(self, port: int, token: str, room: str, index: int, tally: Tally) -> None:
        super().__init__(port, token, room, index, tally)
        self.acked: dict[str, int] = {}
        """The highest offset acked, by room."""
        self.sent = 0
        self._id = 1
        self._unacked: dict[int, dict[str, object]] = {}

    def publish(self, room: str, body: object) -> None:
        self._id += 1
        self.sent += 1
        command = {"type": "send", "id": self._id, "room": room, "body": body}
        self._unacked[self._id] = command | {"key": f"{self._index}-{self._id}"}
        if self.joined.is_set():
            self.send(self._unacked[self._id])

    @property
    def waiting(self) -> int:
        return len(self._unacked)

    def _receive_event(self, frame: dict[str, object]) -> None:
        answered = self._unacked.get(_number(frame.get("id", 0)))
        if answered is None:
            super()._receive_event(frame)
        elif frame["type"] == "ack":
            del self._unacked[_number(frame["id"])]
            room = str(frame["room"])
            self.acked[room] = max(self.acked.get(room, 0), _number(frame["offset"]))
        else:
            self.send(answered)

    def _receive_ack(self, frame: dict[str, object]) -> None:
        super()._receive_ack(frame)
        for command in self._unacked.values():
            self.send(command)


def _number(value: object) -> int:
    assert isinstance(value, int)
    return value

"""A TCP or Unix-socket proxy that does to bytes what bad networks do, switchable while it runs."""

from __future__ import annotations

import asyncio
import contextlib
import random
import socket
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from tests.support.worker import end

Address = tuple[str, int] | Path
"""A host and a port, or a Unix socket."""

CHUNK = 4096
QUEUED = 16
"""Chunks on their way in one direction; then it is no longer read from, and the sender notices."""
POLL_SECONDS = 0.01


@dataclass
class Weather:
    """What one direction of a link does. Times in seconds; whoever holds it may change it."""

    delay: float = 0.0
    jitter: float = 0.0
    """Up to so much more; bytes stay in order."""
    rate: float = 0.0
    """Bytes a second; 0 is as fast as can be."""
    frozen: bool = False
    """Nothing passes, and nothing is lost."""
    flip: float = 0.0
    """How likely one bit of a chunk is another one."""
    truncate: bool = False
    """The next chunk is cut in the middle, and the link ends politely."""


class _TruncatedError(Exception):
    """What was to be passed on has been, and the link is to end."""


class Link:
    """One connection through the proxy. Its weather is the proxy's until it gets its own."""

    def __init__(
        self,
        proxy: Proxy,
        inner: tuple[asyncio.StreamReader, asyncio.StreamWriter],
        outer: tuple[asyncio.StreamReader, asyncio.StreamWriter],
    ) -> None:
        self._proxy = proxy
        self._inner, self._outer = inner, outer
        self.up, self.down = proxy.up, proxy.down
        self._ended: set[bool] = set()
        """Ways, upwards or not, on which nothing goes any more."""
        peer = inner[1].get_extra_info("peername")
        self.port: int = peer[1] if isinstance(peer, tuple) else 0
        """The client's, which tells whose link it is."""

    async def run(self) -> None:
        try:
            async with asyncio.TaskGroup() as tasks:
                tasks.create_task(self._pass(self._inner[0], self._outer[1], upwards=True))
                tasks.create_task(self._pass(self._outer[0], self._inner[1], upwards=False))
        except* _TruncatedError:
            pass
        except* OSError:
            self.reset()
        finally:
            for _, writer in (self._inner, self._outer):
                writer.close()

    def reset(self) -> None:
        """End it with RST on both sides, and lose what is on its way."""
        for _, writer in (self._inner, self._outer):
            sock: socket.socket | None = writer.get_extra_info("socket")
            if sock is not None and sock.family != socket.AF_UNIX and sock.fileno() >= 0:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            writer.transport.abort()

    def half_close(self, *, upwards: bool = True) -> None:
        """One side hears that the other will say no more."""
        self._ended.add(upwards)
        writer = (self._outer if upwards else self._inner)[1]
        if writer.can_write_eof() and not writer.is_closing():
            writer.write_eof()

    def _weather(self, upwards: bool) -> Weather:
        return self.up if upwards else self.down

    async def _pass(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, upwards: bool
    ) -> None:
        # Read and written by two tasks: a delay must not be a rate.
        queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(QUEUED)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._read(reader, queue, upwards=upwards))
            tasks.create_task(self._write(queue, writer, upwards=upwards))

    async def _read(
        self,
        reader: asyncio.StreamReader,
        queue: asyncio.Queue[tuple[float, bytes]],
        *,
        upwards: bool,
    ) -> None:
        loop, due, chunk = asyncio.get_running_loop(), 0.0, b"-"
        while chunk:
            chunk = await reader.read(CHUNK)
            weather = self._weather(upwards)
            late = weather.delay + weather.jitter * self._proxy.random.random()
            due = max(due, loop.time() + late)
            await queue.put((due, chunk))

    async def _write(
        self,
        queue: asyncio.Queue[tuple[float, bytes]],
        writer: asyncio.StreamWriter,
        *,
        upwards: bool,
    ) -> None:
        loop = asyncio.get_running_loop()
        while True:
            due, chunk = await queue.get()
            if (late := due - loop.time()) > 0:
                await asyncio.sleep(late)
            while self._weather(upwards).frozen and not writer.is_closing():
                await asyncio.sleep(POLL_SECONDS)
            weather = self._weather(upwards)
            if not chunk:
                return self.half_close(upwards=upwards)
            if upwards in self._ended:
                continue
            if self._proxy.random.random() < weather.flip:
                chunk = self._flipped(chunk)
            if weather.truncate:
                weather.truncate = False
                writer.write(chunk[: len(chunk) // 2])
                await writer.drain()
                raise _TruncatedError
            writer.write(chunk)
            await writer.drain()
            if weather.rate:
                await asyncio.sleep(len(chunk) / weather.rate)

    def _flipped(self, chunk: bytes) -> bytes:
        self._proxy.flipped += 1
        place = self._proxy.random.randrange(len(chunk))
        bit = 1 << self._proxy.random.randrange(8)
        return chunk[:place] + bytes([chunk[place] ^ bit]) + chunk[place + 1 :]


class Proxy:
    """Listens, and passes every connection on to ``target``.

    ``up`` is the weather from the client to the target, ``down`` that of the way back.
    """

    def __init__(self, target: Address, *, seed: int = 0) -> None:
        self.target = target
        self.random = random.Random(seed)
        self.up, self.down = Weather(), Weather()
        self.links: set[Link] = set()
        self.flipped = 0
        """Bits so far."""
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server | None = None
        self.port = 0

    async def start(self, path: Path | None = None) -> None:
        """Listen on a Unix socket, or on any free port of 127.0.0.1."""
        if path is not None:
            self._server = await asyncio.start_unix_server(self._accept, path)
        else:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0, backlog=4096)
            self.port = self._server.sockets[0].getsockname()[1]

    async def close(self) -> None:
        if self._server is not None:
            self._server.close()
        self.reset()
        await end(self._tasks)

    def reset(self, links: Iterable[Link] | None = None) -> None:
        for link in list(self.links if links is None else links):
            link.reset()

    def calm(self) -> None:
        """Good weather for all, and for those who had their own."""
        self.up, self.down = Weather(), Weather()
        for link in self.links:
            link.up, link.down = self.up, self.down

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.create_task(self._serve(reader, writer))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            if isinstance(self.target, Path):
                outer = await asyncio.open_unix_connection(self.target)
            else:
                outer = await asyncio.open_connection(*self.target)
        except OSError:
            writer.transport.abort()
            return
        link = Link(self, (reader, writer), outer)
        self.links.add(link)
        with contextlib.suppress(OSError):
            await link.run()
        self.links.discard(link)

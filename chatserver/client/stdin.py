"""Reading standard input without a thread, and without taking more than is asked for."""

from __future__ import annotations

import asyncio
import codecs
import os
from collections import deque

CHUNK = 4096
# A line longer than this is taken in pieces, so that each fits into a frame (64 KiB by default)
# even if each became a JSON escape.
PIECE = 8_000


class Input:
    """The text of file descriptor ``fd``, as it comes; other bytes than UTF-8 are replaced.

    Reads only on demand, so what is not asked for stays in the pipe. Cancelling `read` loses
    nothing.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._ended = False

    async def read(self) -> str | None:
        """Wait for what comes next, which may be nothing yet; None at the end of the input."""
        if self._ended:
            return None
        await self._readable()
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return ""
        except OSError:
            # A terminal that has gone away (EIO): nothing more will come.
            data = b""
        self._ended = not data
        return self._decoder.decode(data, self._ended)

    async def _readable(self) -> None:
        loop = asyncio.get_running_loop()
        ready: asyncio.Future[None] = loop.create_future()
        blocking = os.get_blocking(self._fd)
        try:
            loop.add_reader(self._fd, _set, ready)
        except PermissionError:
            # Regular files and /dev/null cannot be polled, and are always ready.
            return
        try:
            # uvloop makes it non-blocking, and so every other holder of the same terminal: stdout,
            # and the shell afterwards. Reading only when there is something needs no such mode.
            os.set_blocking(self._fd, blocking)
            await ready
        finally:
            loop.remove_reader(self._fd)


class Lines:
    """The lines of an input, without their ends."""

    def __init__(self, input: Input) -> None:
        self._input = input
        self._lines: deque[str] = deque()
        self._rest = ""
        self._ended = False

    async def read(self) -> str | None:
        """Wait for the next line; None at the end of the input."""
        while not self._lines:
            if self._ended:
                return None
            self._feed(await self._input.read())
        return self._lines.popleft()

    def _feed(self, text: str | None) -> None:
        self._ended = text is None
        *whole, self._rest = (self._rest + (text or "")).split("\n")
        for line in whole:
            self._take(line.removesuffix("\r"))
        while len(self._rest) > PIECE:
            self._lines.append(self._rest[:PIECE])
            self._rest = self._rest[PIECE:]
        if self._ended and self._rest:
            self._take(self._rest)

    def _take(self, line: str) -> None:
        self._lines.extend(pieces(line))


def pieces(line: str) -> list[str]:
    """A line, or what it is cut into."""
    return [line[at : at + PIECE] for at in range(0, len(line), PIECE)] or [""]


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)

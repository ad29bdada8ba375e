"""Standard input, a line at a time, on the event loop: a terminal, a pipe or a file.

No thread: one blocked in a read would take a line that is no longer ours, or hold up the exit.
"""

from __future__ import annotations

import asyncio
import codecs
import os
from collections import deque

CHUNK = 65_536
# Longer lines are handed out in pieces of this many characters: bounded, and within the frame
# that a server takes by default even if each became a JSON escape.
PIECE = 8_000


class Lines:
    """The lines of file descriptor ``fd``, without their ends; other bytes than UTF-8 replaced.

    Reads only on demand, so what is not asked for stays in the pipe. Cancelling `read` loses
    nothing.
    """

    def __init__(self, fd: int) -> None:
        self._fd = fd
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._lines: deque[str] = deque()
        self._rest = ""
        self._ended = False

    async def read(self) -> str | None:
        """Wait for the next line; None at the end of the input."""
        while not self._lines:
            if self._ended:
                return None
            await self._readable()
            try:
                self._feed(os.read(self._fd, CHUNK))
            except BlockingIOError:
                continue
            except OSError:
                # A terminal that has gone away (EIO): nothing more will come.
                self._feed(b"")
        return self._lines.popleft()

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

    def _feed(self, data: bytes) -> None:
        self._ended = not data
        *whole, self._rest = (self._rest + self._decoder.decode(data, self._ended)).split("\n")
        for line in whole:
            self._take(line.removesuffix("\r"))
        while len(self._rest) > PIECE:
            self._lines.append(self._rest[:PIECE])
            self._rest = self._rest[PIECE:]
        if self._ended and self._rest:
            self._take(self._rest)

    def _take(self, line: str) -> None:
        pieces = (line[at : at + PIECE] for at in range(0, len(line), PIECE))
        self._lines.extend(pieces if line else ("",))


def _set(ready: asyncio.Future[None]) -> None:
    if not ready.done():
        ready.set_result(None)

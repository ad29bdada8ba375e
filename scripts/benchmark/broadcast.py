"""websockets' own server and ``broadcast()``: ``broadcast.py LISTENING_FD REPORT_FD``.

What one writes with the library's documentation at hand, on uvloop: whatever a client sends goes
to everyone, as it is. No tokens, no JSON, no store.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
import sys

import uvloop
from websockets.asyncio.server import ServerConnection, broadcast, serve

# A dict, for it keeps its order: the publisher comes last and is served last.
connections: dict[ServerConnection, None] = {}


async def handle(connection: ServerConnection) -> None:
    connections[connection] = None
    try:
        async for message in connection:
            broadcast(connections, message)
    finally:
        del connections[connection]


async def main(listening: int, report: int) -> None:
    logging.getLogger("websockets").disabled = True
    listener = socket.socket(fileno=listening)
    async with serve(handle, sock=listener, compression=None, ping_interval=None):
        os.write(report, b"\n")
        await asyncio.Future()


if __name__ == "__main__":
    uvloop.run(main(int(sys.argv[1]), int(sys.argv[2])))

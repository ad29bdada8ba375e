"""What a connection's socket is set to; the rest of net/connection.py is told by tests/e2e."""

from __future__ import annotations

import asyncio
import socket

import uvloop

from chatserver.net.connection import NOTSENT_LOWAT, prepare

TCP_NOTSENT_LOWAT = 25  # linux/tcp.h


async def _options_of_an_accepted_socket() -> tuple[int, int]:
    loop = asyncio.get_running_loop()
    accepted: asyncio.Future[asyncio.BaseTransport] = loop.create_future()

    class Accepted(asyncio.Protocol):
        def connection_made(self, transport: asyncio.BaseTransport) -> None:
            accepted.set_result(transport)

    listening = socket.create_server(("127.0.0.1", 0))
    prepare(listening)
    address = listening.getsockname()
    async with await loop.create_server(Accepted, sock=listening):
        with socket.create_connection(address):
            transport = await accepted
            raw = transport.get_extra_info("socket")
            transport.close()
            return (
                raw.getsockopt(socket.IPPROTO_TCP, TCP_NOTSENT_LOWAT),
                raw.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY),
            )


def test_an_accepted_socket_delays_nothing_and_buffers_little() -> None:
    """Neither is set on it: the one it inherits, the other is the event loop's doing."""
    assert uvloop.run(_options_of_an_accepted_socket()) == (NOTSENT_LOWAT, 1)

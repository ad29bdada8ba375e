"""A connection by itself, where no client can choose the moment; the rest is told by tests/e2e."""

from __future__ import annotations

import asyncio
import socket
from typing import Any

import uvloop
from websockets.datastructures import Headers
from websockets.http11 import Request

from chatserver.net.connection import NOTSENT_LOWAT, Connection, prepare

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


class Owner:
    """Is told of nothing but what is held until the end of the turn."""

    def holding(self, connection: Connection) -> None: ...


class Transport(asyncio.Transport):
    def __init__(self) -> None:
        super().__init__()
        self.written = b""

    def write(self, data: Any) -> None:
        self.written += data

    def get_write_buffer_size(self) -> int:
        return 0

    def is_closing(self) -> bool:
        return False

    def can_write_eof(self) -> bool:
        return False


def test_who_is_let_in_and_revoked_in_one_turn_hears_of_it_over_a_websocket() -> None:
    """And not instead of the answer to its request."""
    connection = Connection(Owner(), frame_bytes=1024)  # type: ignore[arg-type]
    connection.transport = transport = Transport()
    connection.open(Request("/v1/ws", Headers()), b"the 101, ")
    connection.sever(b"the farewell")

    assert transport.written == b"the 101, the farewell"

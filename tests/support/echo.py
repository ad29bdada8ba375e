"""The product's Connection as an echo server, in a process of its own: what conformance tests want.

What is the chat's and not WebSocket's is left out: who may come in, that messages are text of a
bounded size, and the ``bye`` before a close frame.
"""

from __future__ import annotations

import asyncio
import signal
import socket
import sys

import uvloop
from websockets.frames import Close, Frame, Opcode
from websockets.http11 import Request

from chatserver.core import errors
from chatserver.core.errors import Disconnect
from chatserver.net import connection as product
from chatserver.net.compression import SharedDeflate, compressed_frame, deflate
from chatserver.net.connection import Connection, Phase, text_frame
from chatserver.net.http import switch

MESSAGE_BYTES = 2**24


class EchoConnection(Connection):
    """Compresses all that it echoes, where that was negotiated."""

    __slots__ = ()
    _owner: Echo

    def send(self, payload: bytes) -> None:
        if self.phase is Phase.OPEN:
            self.write(self._frame(payload))

    def send_binary(self, payload: bytes) -> None:
        frame = self._frame(payload)
        self.write(bytes([frame[0] ^ Opcode.TEXT ^ Opcode.BINARY]) + frame[1:])

    def _frame(self, payload: bytes) -> bytes:
        if self.window_bits == 0:
            return text_frame(payload)
        return compressed_frame(deflate(payload, self.window_bits))

    def _deliver(self, text: bool, message: bytes) -> None:
        if text:
            super()._deliver(text, message)
        else:
            self._owner.received_binary(self, message)


class Echo:
    """Lets everybody in, and sends back what comes."""

    def connected(self, connection: Connection) -> None: ...

    def requested(self, connection: Connection, request: Request) -> None:
        accepted = connection.accept(request)
        assert accepted is not None
        connection.open(request, switch(accepted.key, None, accepted.extensions))
        connection.begin()

    def received(self, connection: Connection, message: bytes) -> None:
        try:
            message.decode()
        except UnicodeDecodeError:
            connection.close(errors.NOT_TEXT, None)
        else:
            connection.send(message)

    def received_binary(self, connection: EchoConnection, message: bytes) -> None:
        connection.send_binary(message)

    def violated(self, connection: Connection, why: Disconnect) -> None:
        connection.close(why, None)

    def stalled(self, connection: Connection) -> None: ...
    def drained(self, connection: Connection) -> None: ...

    def holding(self, connection: Connection) -> None:
        asyncio.get_running_loop().call_soon(connection.flush)

    def ended(self, connection: Connection) -> None: ...
    def lost(self, connection: Connection) -> None: ...


def _close_frame(why: Disconnect, after: int | None = None) -> bytes:
    payload = Close(why.code, why.reason).serialize()
    return Frame(Opcode.CLOSE, payload).serialize(mask=False)


async def _serve(door: socket.socket) -> None:
    loop = asyncio.get_running_loop()
    stopping = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, stopping.set)
    product.farewell = _close_frame
    product.WRITE_ABORT = 4 * MESSAGE_BYTES
    echo = Echo()
    extensions = [SharedDeflate()]
    await loop.create_server(lambda: EchoConnection(echo, MESSAGE_BYTES, extensions), sock=door)
    await stopping.wait()


if __name__ == "__main__":
    uvloop.run(_serve(socket.socket(fileno=int(sys.argv[1]))))

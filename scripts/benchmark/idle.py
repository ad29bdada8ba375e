"""CPU of idle sockets: thousands that have joined a room, say nothing, and answer pings."""

from __future__ import annotations

import select
import socket
from collections.abc import Sequence
from time import perf_counter
from typing import Any

from chatserver.settings import Settings

from . import report, wire
from .servers import Rig, Usage, bottleneck, cpu_seconds

ABOUT = "CPU of sockets that only answer pings"
SOCKETS = 15_000
MEMBERS = 10
INTERVALS = 2
"""Of pings: each socket is pinged so often while it is measured."""
PING, PONG = 9, 10
_PONG = wire.client_frame(b"", PONG)


def run(seconds: float, sockets: int | None) -> dict[str, object]:
    """Each socket with its own user and session, ten to a room."""
    asked = sockets or SOCKETS
    sockets = min(asked, wire.descriptors_left())
    interval = Settings.model_fields["ping_interval"].default
    timeout = Settings.model_fields["ping_timeout"].default
    with Rig() as rig:
        store = rig.store()
        worker = rig.worker(CHATSERVER_PING_TIMEOUT=str(timeout))
        mint = wire.Mint(rig.secret)
        tokens = [mint.token(f"user-{index:05}") for index in range(sockets)]
        clients = wire.enter(worker.port, tokens, lambda index: f"room-{index // MEMBERS:05}")
        answering = Answering(clients)
        answering.run(interval)  # the first pings are spread over one interval
        usage = Usage(server=worker, store=store)
        used, pings = cpu_seconds(worker.pid), answering.pings
        answering.run(INTERVALS * interval)
        shares = usage.shares()
        used, pings = cpu_seconds(worker.pid) - used, answering.pings - pings
        for client in clients:
            client.close()
    notes = [] if sockets == asked else [f"only {sockets:,} sockets: the descriptor limit"]
    if found := bottleneck("pings", shares):
        notes.append(found)
    return {
        "sockets": sockets,
        "interval": interval,
        "share": used / (INTERVALS * interval),
        "pings": pings / (INTERVALS * interval),
        "cpu": shares,
        "notes": notes,
    }


class Answering:
    """Sockets that answer pings and do nothing else."""

    def __init__(self, clients: Sequence[socket.socket]) -> None:
        self._epoll = select.epoll()
        self._clients = {client.fileno(): client for client in clients}
        self.pings = 0
        for client in clients:
            self._epoll.register(client, select.EPOLLIN)

    def run(self, seconds: float) -> None:
        until = perf_counter() + seconds
        while (left := until - perf_counter()) > 0:
            for fd, _ in self._epoll.poll(left):
                self._answer(self._clients[fd])

    def _answer(self, client: socket.socket) -> None:
        # Pings are two bytes and come one at a time: none is cut in two.
        for opcode, payload, _ in wire.take_frames(bytearray(client.recv(65536))):
            if opcode != PING:
                raise RuntimeError(f"an idle socket was told {payload!r}")
            self.pings += 1
            client.send(_PONG)


def table(result: dict[str, Any]) -> report.Table:
    return report.Table(
        f"{result['sockets']:,} sockets, pinged every {result['interval']:.0f} s, 10 to a room",
        ["", "figure"],
        [
            ["server CPU", f"{result['share']:.2%} of a core"],
            ["pings answered", f"{result['pings']:,.0f} per second"],
            ["client CPU", report.share(result["cpu"], "client")],
            ["store CPU", report.share(result["cpu"], "store")],
        ],
    )

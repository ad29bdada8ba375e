"""Revocation: from the call that revokes a user to the end of the user's last socket."""

from __future__ import annotations

import asyncio
import select
import socket
import statistics
import time
from typing import Any

from chatserver.core.session import Kind
from chatserver.store import revocations
from chatserver.store.link import Store

from . import report, wire
from .servers import Rig

ABOUT = "until a user's sockets are closed"
SOCKETS = 1000
ROUNDS = 5
PATIENCE_SECONDS = 5.0


async def _round(store: Store, user: str, clients: list[socket.socket]) -> dict[str, list[float]]:
    """Milliseconds until each socket had its close frame, and until its connection was closed."""
    began = time.perf_counter()
    await revocations.store_revocation(store.call, Kind.USER, user)
    # Nothing else runs on this loop from here on: what has come meanwhile waits in the kernel.
    return {name: _since(began, at) for name, at in _endings(clients).items()}


def _since(began: float, moments: list[float]) -> list[float]:
    return sorted((at - began) * 1000 for at in moments)


def _endings(clients: list[socket.socket]) -> dict[str, list[float]]:
    """Answer each close frame, as every WebSocket client does, and wait for the end."""
    epoll = select.epoll()
    open_clients = {client.fileno(): client for client in clients}
    for client in clients:
        client.setblocking(False)
        epoll.register(client, select.EPOLLIN)
    told: list[float] = []
    closed: list[float] = []
    until = time.perf_counter() + PATIENCE_SECONDS
    while open_clients and time.perf_counter() < until:
        for fd, _ in epoll.poll(0.1):
            try:
                data = open_clients[fd].recv(65536)
            except ConnectionResetError:
                data = b""
            if data:
                told += [time.perf_counter()] * _answer(open_clients[fd], data)
            if not data:
                closed.append(time.perf_counter())
                epoll.unregister(fd)
                del open_clients[fd]
    epoll.close()
    if open_clients:
        raise RuntimeError(f"{len(open_clients)} sockets outlived their user's revocation")
    return {"told": told, "closed": closed}


def _answer(client: socket.socket, data: bytes) -> int:
    """Answer a close frame if there is one. Returns how many there were."""
    closes = [
        payload for opcode, payload, _ in wire.take_frames(bytearray(data)) if opcode == wire.CLOSE
    ]
    for payload in closes:
        client.send(wire.client_frame(payload, wire.CLOSE))
    return len(closes)


async def _measure(rig: Rig, port: int, sockets: int) -> list[dict[str, list[float]]]:
    mint = wire.Mint(rig.secret)
    rounds = []
    async with Store(rig.store_url) as store:
        for index in range(ROUNDS):
            user = f"user-{index}"
            tokens = [mint.token(user) for _ in range(sockets)]
            clients = wire.enter(port, tokens, lambda number: f"room-{number // 10}")
            rounds.append(await _round(store, user, clients))
            for client in clients:
                client.close()
    return rounds


def run(seconds: float, sockets: int | None) -> dict[str, object]:
    sockets = min(sockets or SOCKETS, wire.descriptors_left())
    with Rig() as rig:
        rig.store()
        worker = rig.worker()
        rounds = asyncio.run(_measure(rig, worker.port, sockets))
    return {
        "sockets": sockets,
        "told": _summary([each["told"] for each in rounds]),
        "closed": _summary([each["closed"] for each in rounds]),
        "notes": [],
    }


def _summary(rounds: list[list[float]]) -> dict[str, float]:
    """Of each round's figure the median, and the worst of all."""
    return {
        "p50": statistics.median(each[len(each) // 2] for each in rounds),
        "p99": statistics.median(each[len(each) * 99 // 100] for each in rounds),
        "max": statistics.median(each[-1] for each in rounds),
        "worst": max(each[-1] for each in rounds),
    }


def table(result: dict[str, Any]) -> report.Table:
    names = {"told": "close frame received", "closed": "connection closed"}
    return report.Table(
        f"{result['sockets']:,} sockets of one user; ms since the call; medians of rounds",
        ["", "p50", "p99", "max", "worst round's max"],
        [
            [text, *(f"{result[name][part]:.1f}" for part in ("p50", "p99", "max", "worst"))]
            for name, text in names.items()
        ],
    )

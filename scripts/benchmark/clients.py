"""The Python client, thousands of times in one process: memory each, and what they take in.

Every client is connected by itself, has joined a room and has a task that iterates over it, as an
application of many users would. They share this process, one core, with nothing but the store.
"""

from __future__ import annotations

import asyncio
import contextlib
import gc
import os
import time
from pathlib import Path
from typing import Any

import uvloop

from chatserver.client import Client, Room, connect

from . import report, wire
from .servers import Rig

ABOUT = "the Python client, thousands in one process"
SOCKETS = CLIENTS = 5_000
MEMBERS = 10
"""Of each room."""
WARM = 500
"""Opened before the first look: importing and the first handshakes leave free memory behind."""
ENTERING = 100
ROUNDS = 20
"""Messages to each room, one after the other."""
PATIENCE_SECONDS = 120.0


class Crowd:
    """Clients, their rooms and the tasks that read them."""

    def __init__(self, port: int, tokens: list[str], first: int) -> None:
        self._url = f"ws://127.0.0.1:{port}/v1/ws"
        self._tokens = tokens
        self._first = first
        self._gate = asyncio.Semaphore(ENTERING)
        self._exit = contextlib.AsyncExitStack()
        self._readers: list[asyncio.Task[None]] = []
        self.clients: dict[str, Client] = {}
        """One of each room."""
        self.delivered = 0
        self._wanted = 0
        self._complete = asyncio.Event()

    async def enter(self) -> None:
        async with asyncio.timeout(PATIENCE_SECONDS):
            await asyncio.gather(*map(self._enter, range(len(self._tokens))))

    async def _enter(self, index: int) -> None:
        name = f"room-{(self._first + index) // MEMBERS:05}"
        async with self._gate:
            client = await self._exit.enter_async_context(
                connect(self._url, token=self._tokens[index])
            )
            room = await client.join(name)
        self.clients[name] = client
        self._readers.append(asyncio.create_task(self._read(room)))

    async def _read(self, room: Room) -> None:
        async for _ in room:
            self.delivered += 1
            if self.delivered == self._wanted:
                self._complete.set()

    async def talk(self, rounds: int) -> float:
        """So many messages to each room; returns the seconds until every member has all."""
        self._wanted = self.delivered + rounds * len(self._tokens)
        began = time.perf_counter()
        async with asyncio.timeout(PATIENCE_SECONDS):
            for _ in range(rounds):
                sends = (client.send(name, "x" * 100) for name, client in self.clients.items())
                await asyncio.gather(*sends)
            await self._complete.wait()
        return time.perf_counter() - began

    async def leave(self) -> None:
        for reader in self._readers:
            reader.cancel()
        await asyncio.gather(*self._readers, return_exceptions=True)
        await self._exit.aclose()


async def _measure(port: int, mint: wire.Mint, count: int) -> dict[str, object]:
    tokens = [mint.token(f"user-{index:05}") for index in range(WARM + count)]
    warm, crowd = Crowd(port, tokens[:WARM], 0), Crowd(port, tokens[WARM:], WARM)
    await warm.enter()
    before = _resident()
    began, cpu = time.perf_counter(), time.process_time()
    await crowd.enter()
    entered, cpu = time.perf_counter() - began, time.process_time() - cpu
    after = _resident()
    talked = await crowd.talk(ROUNDS)
    result = {
        "clients": count,
        "kilobytes": (after - before) / count / 1024,
        "kilobytes_later": (_resident() - before) / count / 1024,
        "entries": count / entered,
        "entry_cpu_ms": cpu / count * 1000,
        "deliveries": ROUNDS * count / talked,
    }
    await crowd.leave()
    await warm.leave()
    return result


def _resident() -> int:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def run(seconds: float, clients: int | None) -> dict[str, object]:
    asked = clients or CLIENTS
    count = min(asked, wire.descriptors_left() - WARM)
    with Rig() as rig:
        rig.store()
        worker = rig.worker()
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            result = runner.run(_measure(worker.port, wire.Mint(rig.secret), count))
    notes = [] if count == asked else [f"only {count:,} clients: the descriptor limit"]
    return result | {"notes": notes}


def table(result: dict[str, Any]) -> report.Table:
    return report.Table(
        f"{result['clients']:,} Python clients in one process, each with a room it reads",
        ["", "figure"],
        [
            ["resident memory per client", f"{result['kilobytes']:.1f} KB"],
            ["… after the messages", f"{result['kilobytes_later']:.1f} KB"],
            ["connected and joined", f"{result['entries']:,.0f} per second"],
            ["… the clients' CPU for each", f"{result['entry_cpu_ms']:.2f} ms"],
            ["messages taken in", f"{result['deliveries']:,.0f} per second"],
        ],
    )

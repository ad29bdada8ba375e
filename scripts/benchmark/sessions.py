"""Sessions: revoked one by one on two workers, refused at the door, rotated.

Each session has one socket on each worker. A revocation is timed from the call to the end of
both sockets, with the call's own return beside it, and once more with pub/sub killed just before.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from typing import Any

from chatserver.core.session import Kind
from chatserver.store import revocations
from chatserver.store.keyring import Keyring
from chatserver.store.link import Store
from chatserver.store.refresh import RefreshTokens
from chatserver.store.sessions import Sessions

from . import report, wire
from .servers import Process, Rig

ABOUT = "revoked one by one on two workers, and rotated"
SOCKETS = 10_000
REVOKED = 100
DEAF = 20
"""Revoked with pub/sub killed at the same moment: each may take a second."""
DOORS = 10
"""Handshakes tried after each revocation has returned, alternating between the workers."""
ROTATIONS = 2000
PATIENCE_SECONDS = 5.0


async def _revoke(store: Store, session: str, clients: list[socket.socket]) -> tuple[float, float]:
    """Milliseconds until the last socket was closed, and until the call returned."""
    began = time.perf_counter()

    async def closed(client: socket.socket) -> float:
        loop = asyncio.get_running_loop()
        buffer = bytearray()
        async with asyncio.timeout(PATIENCE_SECONDS):
            while data := await loop.sock_recv(client, 65536):
                buffer += data
                for opcode, payload, _ in wire.take_frames(buffer):
                    if opcode == wire.CLOSE:
                        await loop.sock_sendall(client, wire.client_frame(payload, wire.CLOSE))
        return time.perf_counter()

    async def returned() -> float:
        outcome = await revocations.revoke(store.call, Kind.SESSION, session)
        if outcome != (len(clients), True):
            raise RuntimeError(f"a revocation of {len(clients)} sockets told {outcome}")
        return time.perf_counter()

    ends = asyncio.gather(*map(closed, clients))
    back = await returned()
    return (max(await ends) - began) * 1000, (back - began) * 1000


def _accepted(ports: list[int], token: str) -> int:
    """How many of the handshakes with this token, which is revoked, were not refused with 401."""
    accepted = 0
    for number in range(DOORS):
        with wire.connect(ports[number % len(ports)]) as client:
            client.sendall(wire.upgrade(token))
            accepted += not client.recv(4096).startswith(b"HTTP/1.1 401 ")
    return accepted


def _enter(rig: Rig, workers: list[Process], count: int) -> dict[str, list[socket.socket]]:
    tokens = {session: _token(rig, session) for session in (f"s-{n}" for n in range(count))}
    entered = [
        wire.enter(worker.port, list(tokens.values()), lambda number: f"room-{number // 10}")
        for worker in workers
    ]
    return {session: [each[number] for each in entered] for number, session in enumerate(tokens)}


def _token(rig: Rig, session: str) -> str:
    return Keyring(rig.secret.encode()).issue(
        user=f"user of {session}",
        session=session,
        roles=["member"],
        issued_at=int(time.time()),
        token_id=secrets.token_hex(8),
    )


async def _rotate(rig: Rig, store: Store) -> list[float]:
    secret = rig.secret.encode()
    sessions = Sessions(store.call, Keyring(secret), RefreshTokens(secret))
    salt = await sessions.salt()
    token = (await sessions.begin("alice", ["member"])).refresh_token
    took = []
    for _ in range(ROTATIONS):
        began = time.perf_counter()
        token = (await sessions.rotate(token, salt)).refresh_token
        took.append((time.perf_counter() - began) * 1000)
    return took


async def _measure(rig: Rig, workers: list[Process], sockets: int) -> dict[str, object]:
    clients = _enter(rig, workers, sockets // len(workers))
    names = iter(clients)
    async with Store(rig.store_url) as store:
        closed, returned, accepted = [], [], 0
        for _ in range(REVOKED):
            session = next(names)
            token = _token(rig, session)
            for client in clients[session]:
                client.setblocking(False)
            ended, back = await _revoke(store, session, clients[session])
            closed.append(ended)
            returned.append(back)
            accepted += _accepted([worker.port for worker in workers], token)
        deaf = []
        for _ in range(DEAF):
            session = next(names)
            for client in clients[session]:
                client.setblocking(False)
            await store.call(["CLIENT", "KILL", "TYPE", "pubsub"])
            deaf.append((await _revoke(store, session, clients[session]))[0])
        rotated = await _rotate(rig, store)
    for pair in clients.values():
        for client in pair:
            client.close()
    return {
        "sockets": sockets,
        "closed": _summary(closed),
        "returned": _summary(returned),
        "deaf": _summary(deaf),
        "rotated": _summary(rotated),
        "tried": REVOKED * DOORS,
        "accepted": accepted,
    }


def run(seconds: float, sockets: int | None) -> dict[str, object]:
    sockets = min(sockets or SOCKETS, wire.descriptors_left())
    with Rig() as rig:
        rig.store()
        workers = [rig.worker(), rig.worker()]
        return asyncio.run(_measure(rig, workers, sockets)) | {"notes": []}


def _summary(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    return {
        "p50": times[len(times) // 2],
        "p99": times[len(times) * 99 // 100],
        "max": times[-1],
    }


def table(result: dict[str, Any]) -> report.Table:
    names = {
        "closed": "revoke: both sockets closed",
        "returned": "revoke: the call returned",
        "deaf": "revoke, pub/sub killed: closed",
        "rotated": "a refresh token rotated",
    }
    return report.Table(
        f"{result['sockets']:,} sockets on two workers, each session with one on both; ms",
        ["", "p50", "p99", "max"],
        [
            [text, *(f"{result[name][part]:.2f}" for part in ("p50", "p99", "max"))]
            for name, text in names.items()
        ],
        f"handshakes right after a revocation: {result['tried']}, accepted {result['accepted']}",
    )

"""Sessions: revoked one by one and many at once on two workers, refused at the door, rotated.

Each session has one socket on each worker, each user fifty sessions. A revocation is timed from
the call to the end of its sockets, with the call's own return beside it: of sessions one after the
other, of a hundred by as many calls at once, of a user's hundred sockets by one call, and of
sessions with pub/sub killed just before.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import time
from typing import Any

import uvloop

from chatserver.core.session import Kind
from chatserver.store import revocations
from chatserver.store.keyring import Keyring
from chatserver.store.link import Store
from chatserver.store.refresh import RefreshTokens
from chatserver.store.sessions import Sessions

from . import report, wire
from .servers import Process, Rig

ABOUT = "revoked on two workers one by one and a hundred at once; rotated"
SOCKETS = 10_000
LEAST = 2000
"""Fewer sockets would not last for all that is revoked."""
OF_A_USER = 50
REVOKED = 100
AT_ONCE = 100
ROUNDS = 5
DEAF = 20
"""Revoked with pub/sub killed at the same moment: each may take a second."""
DOORS = 10
"""Handshakes tried after each revocation has returned, alternating between the workers."""
ROTATIONS = 2000
PATIENCE_SECONDS = 5.0


def _ended(client: socket.socket) -> asyncio.Future[float]:
    """When the end of the stream will have come; a close frame is answered, as every client does.

    A callback, not a task for each socket: a hundred that end at once would wait for the client.
    """
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[float] = loop.create_future()
    buffer = bytearray()

    def receive() -> None:
        try:
            data = client.recv(65536)
        except ConnectionError:
            data = b""
        buffer.extend(data)
        for opcode, payload, _ in wire.take_frames(buffer):
            if opcode == wire.CLOSE:
                client.send(wire.client_frame(payload, wire.CLOSE))
        if not data:
            loop.remove_reader(client.fileno())
            ended.set_result(time.perf_counter())

    client.setblocking(False)
    loop.add_reader(client.fileno(), receive)
    return ended


async def _revoke(
    store: Store, kind: Kind, value: str, clients: list[socket.socket]
) -> tuple[list[float], float]:
    """Milliseconds until each socket was closed, and until the call returned."""
    ends = [_ended(client) for client in clients]
    began = time.perf_counter()
    outcome = await revocations.revoke(store.call, kind, value)
    returned = time.perf_counter()
    if outcome != (len(clients), True):
        raise RuntimeError(f"a revocation of {len(clients)} sockets told {outcome}")
    async with asyncio.timeout(PATIENCE_SECONDS):
        closed = await asyncio.gather(*ends)
    return [(at - began) * 1000 for at in closed], (returned - began) * 1000


def _accepted(ports: list[int], token: str) -> int:
    """How many of the handshakes with this token, which is revoked, were not refused with 401."""
    accepted = 0
    for number in range(DOORS):
        with wire.connect(ports[number % len(ports)]) as client:
            client.sendall(wire.upgrade(token))
            accepted += not client.recv(4096).startswith(b"HTTP/1.1 401 ")
    return accepted


def _enter(rig: Rig, workers: list[Process], count: int) -> list[list[socket.socket]]:
    """Of each session its sockets, one on each worker."""
    tokens = [_token(rig, number) for number in range(count)]
    entered = [
        wire.enter(worker.port, tokens, lambda number: f"room-{number // 10}") for worker in workers
    ]
    return [list(sockets) for sockets in zip(*entered, strict=True)]


def _session(number: int) -> str:
    return f"s-{number}"


def _user(number: int) -> str:
    return f"user-{number // OF_A_USER}"


def _token(rig: Rig, number: int) -> str:
    return Keyring(rig.secret.encode()).issue(
        user=_user(number),
        session=_session(number),
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


class Measurement:
    """Every session is revoked once: each step takes the next ones."""

    def __init__(self, rig: Rig, workers: list[Process], store: Store, sessions: int) -> None:
        self._rig = rig
        self._store = store
        self._ports = [worker.port for worker in workers]
        self._clients = _enter(rig, workers, sessions)
        self._next = 0

    async def _revoke_next(self) -> tuple[list[float], float]:
        number = self._next
        self._next += 1
        return await _revoke(self._store, Kind.SESSION, _session(number), self._clients[number])

    async def one_by_one(self) -> dict[str, object]:
        closed, returned, accepted = [], [], 0
        for _ in range(REVOKED):
            token = _token(self._rig, self._next)
            ended, back = await self._revoke_next()
            closed.append(max(ended))
            returned.append(back)
            accepted += _accepted(self._ports, token)
        return {
            "closed": _summary(closed),
            "returned": _summary(returned),
            "tried": REVOKED * DOORS,
            "accepted": accepted,
        }

    async def deaf(self) -> dict[str, float]:
        closed = []
        for _ in range(DEAF):
            await self._store.call(["CLIENT", "KILL", "TYPE", "pubsub"])
            ended, _ = await self._revoke_next()
            closed.append(max(ended))
        return _summary(closed)

    async def at_once(self) -> dict[str, object]:
        closed, returned = [], []
        for _ in range(ROUNDS):
            for ended, back in await asyncio.gather(*(self._revoke_next() for _ in range(AT_ONCE))):
                closed += ended
                returned.append(back)
        return {"closed": _summary(closed), "returned": _summary(returned)}

    async def users(self) -> dict[str, object]:
        """Users who have all their sessions yet."""
        closed, returned = [], []
        self._next += -self._next % OF_A_USER
        for _ in range(ROUNDS):
            theirs = range(self._next, self._next + OF_A_USER)
            self._next += OF_A_USER
            clients = [client for number in theirs for client in self._clients[number]]
            ended, back = await _revoke(self._store, Kind.USER, _user(theirs[0]), clients)
            closed += ended
            returned.append(back)
        return {"closed": _summary(closed), "returned": _summary(returned)}

    def end(self) -> None:
        for clients in self._clients:
            for client in clients:
                client.close()


async def _measure(rig: Rig, workers: list[Process], sockets: int) -> dict[str, object]:
    async with Store(rig.store_url) as store:
        measurement = Measurement(rig, workers, store, sockets // len(workers))
        result = await measurement.one_by_one()
        result["at_once"] = await measurement.at_once()
        result["user"] = await measurement.users()
        result["deaf"] = await measurement.deaf()
        result["rotated"] = _summary(await _rotate(rig, store))
        measurement.end()
    return result | {"sockets": sockets}


def run(seconds: float, sockets: int | None) -> dict[str, object]:
    sockets = min(max(LEAST, sockets or SOCKETS), wire.descriptors_left())
    with Rig() as rig, asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        rig.store()
        workers = [rig.worker(), rig.worker()]
        return runner.run(_measure(rig, workers, sockets)) | {"notes": []}


def _summary(times: list[float]) -> dict[str, float]:
    times = sorted(times)
    return {
        "p50": times[len(times) // 2],
        "p99": times[len(times) * 99 // 100],
        "max": times[-1],
    }


def table(result: dict[str, Any]) -> report.Table:
    once, user = result["at_once"], result["user"]
    figures = [
        ("a session revoked: both sockets closed", result["closed"]),
        ("… the call returned", result["returned"]),
        ("… with pub/sub killed: closed", result["deaf"]),
        (f"{AT_ONCE} sessions by {AT_ONCE} calls at once: each socket closed", once["closed"]),
        ("… each call returned", once["returned"]),
        (f"a user's {2 * OF_A_USER} sockets by one call: each closed", user["closed"]),
        ("… the call returned", user["returned"]),
        ("a refresh token rotated", result["rotated"]),
    ]
    return report.Table(
        f"{result['sockets']:,} sockets on two workers, each session with one on both; ms",
        ["", "p50", "p99", "max"],
        [
            [text, *(f"{each[part]:.1f}" for part in ("p50", "p99", "max"))]
            for text, each in figures
        ],
        f"handshakes right after a revocation: {result['tried']}, accepted {result['accepted']}",
    )

"""A worker is killed and its clients all come back at once: how long until each has caught up.

Two workers under their supervisor, messages all the time. What the clients missed is replayed,
so the figures come with a count of what was lost and doubled, which must be nought.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable
from typing import Any

import uvloop

from . import report, wire
from .servers import Process, Rig
from .swarm import Member, Publisher, Tally

ABOUT = "a worker is killed, until its clients are back"
SOCKETS = 10_000
MEMBERS = 100
"""Of each room."""
RATE = 100
"""Messages per second, over all rooms."""
PUBLISHERS = 4
ENTERING = 200
STEADY_SECONDS = 3.0
PATIENCE_SECONDS = 90.0


async def _enter(members: list[Member]) -> None:
    gate = asyncio.Semaphore(ENTERING)

    async def enter(member: Member) -> None:
        async with gate:
            await member.connect()
            await member.joined.wait()

    async with asyncio.timeout(PATIENCE_SECONDS):
        await asyncio.gather(*map(enter, members))


async def _publish(publishers: list[Publisher], rooms: int) -> None:
    began, sent = time.monotonic(), 0
    while True:
        while sent < (time.monotonic() - began) * RATE:
            sent += 1
            publishers[sent % PUBLISHERS].publish(f"room-{sent % rooms}", "x" * 100)
        await asyncio.sleep(0.002)


async def _until(condition: Callable[[], bool], what: str) -> None:
    deadline = time.monotonic() + PATIENCE_SECONDS
    while not condition():
        if time.monotonic() > deadline:
            raise RuntimeError(f"{PATIENCE_SECONDS:.0f} s were not enough until {what}")
        await asyncio.sleep(0.02)


async def _measure(rig: Rig, server: Process, count: int) -> dict[str, object]:
    tally = Tally()
    mint = wire.Mint(rig.secret)
    rooms = max(1, count // MEMBERS)
    members = [
        Member(server.port, mint.token(f"user-{n}"), f"room-{n % rooms}", n, tally)
        for n in range(count)
    ]
    publishers = [
        Publisher(server.port, mint.token(f"publisher-{n}"), f"publisher-{n}", n, tally)
        for n in range(PUBLISHERS)
    ]
    everyone: list[Member] = [*members, *publishers]
    began = time.monotonic()
    await _enter(everyone)
    entered = time.monotonic() - began
    publishing = asyncio.ensure_future(_publish(publishers, rooms))
    try:
        await asyncio.sleep(STEADY_SECONDS)
        victim = server.workers()[0]
        killed_at = time.monotonic()
        os.kill(victim, signal.SIGKILL)
        await _until(lambda: any(m.drops for m in members), "the kill was noticed")
        await asyncio.sleep(0.5)
        hit = [member for member in members if member.drops]
        await _until(lambda: all(m.caught_up_at > killed_at for m in hit), "all are back")
        await asyncio.sleep(1.0)
    finally:
        publishing.cancel()
    await _until(lambda: not any(p.waiting for p in publishers), "everything is acked")
    tops: dict[str, int] = {}
    for publisher in publishers:
        for room, offset in publisher.acked.items():
            tops[room] = max(tops.get(room, 0), offset)
    await _until(lambda: all(m.last >= tops.get(m.room, 0) for m in members), "all have it all")
    back = sorted(member.caught_up_at - killed_at for member in hit)
    for member in everyone:
        member.stop()
    await asyncio.sleep(0.1)
    return {
        "clients": count,
        "entered": count / entered,
        "hit": len(hit),
        "back": {
            "p50": back[len(back) // 2],
            "p99": back[len(back) * 99 // 100],
            "max": back[-1],
        },
        "sent": sum(publisher.sent for publisher in publishers),
        "delivered": tally.events,
        "lost": tally.lost,
        "doubled": tally.doubled,
        "unrecovered": tally.unrecovered,
        "refused": tally.refused,
        "closed": tally.closed,
    }


def run(seconds: float, sockets: int | None) -> dict[str, object]:
    count = min(sockets or SOCKETS, wire.descriptors_left())
    with Rig() as rig:
        rig.store()
        server = rig.serve(workers=2)
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            return runner.run(_measure(rig, server, count)) | {"notes": []}


def table(result: dict[str, Any]) -> report.Table:
    back = result["back"]
    return report.Table(
        f"{result['clients']:,} clients on two workers; one worker is killed, {result['hit']:,} "
        f"clients come back with full jitter; {result['sent']:,} messages meanwhile",
        ["", "figure"],
        [
            ["handshakes and joins before", f"{result['entered']:,.0f} per second"],
            ["back and caught up: p50", f"{back['p50']:.2f} s"],
            ["… p99", f"{back['p99']:.2f} s"],
            ["… the last", f"{back['max']:.2f} s"],
            ["delivered", f"{result['delivered']:,}"],
            ["lost, doubled", f"{result['lost']}, {result['doubled']}"],
            ["rejoins without proof", f"{result['unrecovered']}"],
            ["handshakes refused", str(result["refused"] or "none")],
        ],
    )

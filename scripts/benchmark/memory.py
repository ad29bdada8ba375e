"""Memory of idle sockets: what the server's process grows by, for each that has joined a room."""

from __future__ import annotations

import time
from typing import Any

from . import report, wire
from .servers import Rig, Usage, bottleneck

ABOUT = "per idle socket"
SOCKETS = 15_000
MEMBERS = 10
WARM_SOCKETS = 4_500
"""Opened before the first look: importing leaves up to 12 MB of free memory in the process (more
when modules were compiled), which would flatter whoever fills it: 0.8 KB for each of 15,000."""
SETTLE_SECONDS = 1.0


def run(seconds: float, sockets: int | None, *, compressed: bool = False) -> dict[str, object]:
    """Each socket with its own user and session, ten to a room."""
    asked = sockets or SOCKETS
    sockets = min(asked, wire.descriptors_left() - WARM_SOCKETS)
    with Rig() as rig:
        store = rig.store()
        worker = rig.worker(CHATSERVER_COMPRESSION="shared" if compressed else "off")
        mint = wire.Mint(rig.secret)
        tokens = [mint.token(f"user-{index:05}") for index in range(sockets + WARM_SOCKETS)]
        warm = wire.enter(worker.port, tokens[:WARM_SOCKETS], _room, compressed=compressed)
        before = worker.memory()
        usage = Usage(server=worker, store=store)
        began = time.perf_counter()
        clients = wire.enter(
            worker.port,
            tokens[WARM_SOCKETS:],
            lambda index: _room(index + WARM_SOCKETS),
            compressed=compressed,
        )
        elapsed = time.perf_counter() - began
        shares = usage.shares()
        time.sleep(SETTLE_SECONDS)
        after = worker.memory()
        for client in warm + clients:
            client.close()
    notes = [] if sockets == asked else [f"only {sockets:,} sockets: the descriptor limit"]
    if found := bottleneck("handshake and join", shares):
        notes.append(found)
    return {
        "sockets": sockets,
        "kilobytes": (after - before) / sockets / 1024,
        "before": before,
        "after": after,
        "entries": sockets / elapsed,
        "cpu": shares,
        "notes": notes,
    }


def _room(index: int) -> str:
    return f"room-{index // MEMBERS:05}"


def table(result: dict[str, Any]) -> report.Table:
    return report.Table(
        f"{result['sockets']:,} idle sockets, each its own user and session, 10 to a room",
        ["", "figure"],
        [
            ["resident memory per socket", f"{result['kilobytes']:.2f} KB"],
            ["handshake and join", f"{result['entries']:,.0f} per second"],
            ["server CPU meanwhile", report.share(result["cpu"], "server")],
            ["client CPU meanwhile", report.share(result["cpu"], "client")],
        ],
    )

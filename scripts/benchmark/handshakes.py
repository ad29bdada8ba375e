"""Handshakes per second: token, registration in the store and welcome; then with a join each."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

from . import report, wire
from .servers import Rig, Usage, cpu_seconds

ABOUT = "per second, without and with a join"
SOCKETS = 15_000
MEMBERS = 10
ROUNDS = 3
"""Of each kind. The sockets stay, as they would."""
WARM_SOCKETS = 500


def run(seconds: float, sockets: int | None) -> dict[str, object]:
    """Each socket with its own user and session, ten to a room where they join."""
    most = min(sockets or SOCKETS, wire.descriptors_left() - WARM_SOCKETS)
    size = max(1, most // (2 * ROUNDS))
    found: dict[str, list[dict[str, float]]] = {"alone": [], "joined": []}
    with Rig() as rig:
        store = rig.store()
        worker = rig.worker()
        mint = wire.Mint(rig.secret)
        usage = Usage(server=worker, store=store)

        def enter(count: int, room_of: Callable[[int], str | None]) -> dict[str, float]:
            tokens = [mint.token(f"user-{index:05}") for index in range(count)]
            usage.start()
            began, used = time.perf_counter(), cpu_seconds(worker.pid)
            clients.extend(wire.enter(worker.port, tokens, room_of))
            elapsed, used = time.perf_counter() - began, cpu_seconds(worker.pid) - used
            figures = {"rate": count / elapsed, "microseconds": used / count * 1e6}
            return figures | usage.shares()

        def room_of(index: int) -> str:
            return f"room-{(len(clients) + index) // MEMBERS:05}"

        clients = []
        enter(WARM_SOCKETS, room_of)
        for _ in range(ROUNDS):
            found["alone"].append(enter(size, lambda index: None))
            found["joined"].append(enter(size, room_of))
        for client in clients:
            client.close()
    medians = {
        kind: {name: statistics.median(each[name] for each in rounds) for name in rounds[0]}
        for kind, rounds in found.items()
    }
    return {"sockets": 2 * ROUNDS * size, "notes": [], **medians}


def table(result: dict[str, Any]) -> report.Table:
    rows = []
    for kind, text in (("alone", "handshake"), ("joined", "handshake and join")):
        found = result[kind]
        shares = [report.share(found, name) for name in ("server", "client", "store", "disturbed")]
        cost = found["microseconds"]
        rows.append([text, f"{found['rate']:,.0f}", f"{cost:.0f}", f"{1e6 / cost:,.0f}", *shares])
    return report.Table(
        f"{result['sockets']:,} sockets, each its own user and session; medians of rounds",
        [
            "",
            "per second",
            "server CPU, µs",
            "fills a core at",
            "server",
            "client",
            "store",
            "disturbed",
        ],
        rows,
    )

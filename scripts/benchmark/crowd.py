"""A crowd in one room: 40,000 members on three workers, and one message a second for all of them.

The server runs as it is run, a supervisor and its workers. No process has more than 20,000
descriptors, so the members are in as many processes as there are workers (crowd_members.py); the
publisher is here. Nothing is pinned: all of them take the machine's cores as they come.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

from . import report, wire
from .servers import TICKS, Process, Rig, cpu_seconds, resident_bytes

ABOUT = "one room on three workers, a message a second told to everyone"
SOCKETS = 40_000
WORKERS = 3
ROOM = "crowd"
BODY_BYTES = 105
"""Events of some 200 bytes."""
WARM_MESSAGES = 3
MESSAGES = 20
TOTAL = WARM_MESSAGES + MESSAGES
STEPS = 10
"""Steps of crowd_members.py in a millisecond."""
ENTER_SECONDS = 240.0
DRAIN_SECONDS = 30.0


class Spent:
    """Cores that groups of processes take from now on, and what others take of the machine."""

    def __init__(self, **groups: list[int]) -> None:
        self._groups = groups
        self._at = time.monotonic()
        self._began = self._now()

    def _now(self) -> dict[str, float]:
        used = {name: sum(map(cpu_seconds, pids)) for name, pids in self._groups.items()}
        user, nice, system, _idle, _iowait, *interrupts = _machine_ticks()
        used["others"] = sum((user, nice, system, *interrupts[:2])) / TICKS - sum(used.values())
        return used

    def cores(self) -> dict[str, float]:
        elapsed = time.monotonic() - self._at
        return {
            name: round((now - self._began[name]) / elapsed, 3) for name, now in self._now().items()
        }


def _machine_ticks() -> list[int]:
    line, _, _ = Path("/proc/stat").read_text().partition("\n")
    return [int(field) for field in line.split()[1:]]


def run(seconds: float, sockets: int | None) -> dict[str, object]:
    """``MESSAGES`` messages, one a second, whatever ``seconds`` says."""
    asked = sockets or SOCKETS
    with Rig(pinned=False) as rig:
        # Connections are spread by a hash: no worker gets exactly its share.
        count = min(asked, int(wire.descriptors_left() * 0.95) * WORKERS)
        store = rig.store()
        server = rig.serve(WORKERS)
        workers = server.workers()
        before = sum(map(resident_bytes, workers))
        began = time.perf_counter()
        members = _members(rig, server.port, count)
        for each in members:
            each.await_report(ENTER_SECONDS)
        entered = count / (time.perf_counter() - began)
        token = wire.Mint(rig.secret).token("publisher")
        (publisher,) = wire.enter(server.port, [token], lambda index: None)
        _publish(publisher, 1, WARM_MESSAGES)
        spent = Spent(workers=workers, members=[each.pid for each in members], store=[store.pid])
        _publish(publisher, WARM_MESSAGES + 1, TOTAL)
        used = spent.cores()
        after = sum(map(resident_bytes, workers))
        told = [json.loads(each.last_words(DRAIN_SECONDS)) for each in members]
    wire.repeated.extend(b"a member's" for each in told for _ in range(each["repeated"]))
    notes = [] if count == asked else [f"only {count:,} sockets: the descriptor limit"]
    if used["others"] > 0.2:
        notes.append(f"other processes had {used['others']:.1f} of the {os.cpu_count()} cores")
    return _summary(told) | {
        "sockets": count,
        "workers": WORKERS,
        "messages": MESSAGES,
        "entered": entered,
        "memory": after,
        "kilobytes": (after - before) / count / 1024,
        "cores": used,
        "notes": notes,
    }


def _members(rig: Rig, port: int, count: int) -> list[Process]:
    edges = [count * part // WORKERS for part in range(WORKERS + 1)]
    return [
        rig.members(port, ROOM, first=edge, count=end - edge, messages=TOTAL)
        for edge, end in pairwise(edges)
    ]


def _publish(publisher: socket.socket, first: int, last: int) -> None:
    """One message a second; each bears the time it was due."""
    began = time.perf_counter()
    for number in range(first, last + 1):
        due = began + number - first
        time.sleep(max(0.0, due - time.perf_counter()))
        body = b'{"n":%d,"due":%d,"text":"' % (number, due * 1e9)
        body += b"x" * (BODY_BYTES - len(body) - 2) + b'"}'
        wire.acknowledged(
            publisher,
            b'{"type":"send","id":1,"room":"%b","key":"%d","body":%b}'
            % (ROOM.encode(), number, body),
        )
    time.sleep(1.0)


def _summary(told: list[dict[str, Any]]) -> dict[str, object]:
    """Over all deliveries, and over the messages' last ones; milliseconds."""
    delivered: Counter[int] = Counter()
    last: list[int] = []
    for number in range(WARM_MESSAGES + 1, TOTAL + 1):
        steps: Counter[int] = Counter()
        for each in told:
            steps.update(
                {int(step): n for step, n in each["latencies"].get(str(number), {}).items()}
            )
        delivered += steps
        last.append(max(steps))
    latencies = sorted(delivered.elements())
    return {
        "deliveries": len(latencies),
        "p50": latencies[len(latencies) // 2] / STEPS,
        "p99": latencies[len(latencies) * 99 // 100] / STEPS,
        "max": latencies[-1] / STEPS,
        "last": {"p50": sorted(last)[len(last) // 2] / STEPS, "min": min(last) / STEPS},
        **{name: sum(each[name] for each in told) for name in ("lost", "doubled", "closed")},
    }


def table(result: dict[str, Any]) -> report.Table:
    cores = ", ".join(f"{result['cores'][name]:.2f}" for name in ("workers", "members", "store"))
    return report.Table(
        f"{result['sockets']:,} members of one room on {result['workers']} workers, one message "
        f"of some 200 bytes a second, {result['messages']} of them",
        ["", "figure"],
        [
            ["delivered, of everyone and every message: p50", f"{result['p50']:.0f} ms"],
            ["… p99", f"{result['p99']:.0f} ms"],
            ["… the last of all", f"{result['max']:.0f} ms"],
            ["until everyone has a message, median", f"{result['last']['p50']:.0f} ms"],
            ["deliveries", f"{result['deliveries']:,}"],
            ["lost, doubled, closed", f"{result['lost']}, {result['doubled']}, {result['closed']}"],
            ["memory of the workers, per socket", f"{result['kilobytes']:.2f} KB"],
            ["… of all three", f"{result['memory'] / 1e6:,.0f} MB"],
            ["cores taken by workers, members, store", cores],
            ["handshakes and joins before", f"{result['entered']:,.0f} per second"],
        ],
    )

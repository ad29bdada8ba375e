"""Compression: a large and a small room, off and on in turn; a delivery in bytes and CPU time."""

from __future__ import annotations

import itertools
import json
import socket
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from . import fanout, memory, report, wire
from .servers import ROOT, Process, Rig, Usage

ABOUT = "off and on in turn: a delivery in bytes and CPU time"
SOCKETS = RECEIVERS = 1000
FEW = 10
EVENT_BYTES = (200, 1000, 4000)
ROUNDS = 3
TEXTS = 40
"""Different texts of one size, sent in turn."""
IDLE_SOCKETS = 5000
MODES = ("off", "shared")
FIGURES = ("bytes", "cpu_us", "deliveries")


class Case(NamedTuple):
    receivers: int
    window: int
    """Messages in flight."""
    size: int


class Talker(fanout.Publisher):
    """Says another thing each time."""

    def __init__(self, client: socket.socket) -> None:
        super().__init__(client, b"", wire.MESSAGE, acknowledged=True)
        self._messages = itertools.cycle([b""])

    def talk_of(self, messages: Sequence[bytes]) -> None:
        self._messages = itertools.cycle(messages)

    def fill(self) -> None:
        missing = self.window - self.in_flight()
        if missing > 0:
            self.sent += missing
            self.client.sendall(b"".join(itertools.islice(self._messages, missing)))


class Room:
    """Clients that offer compression, on a worker that accepts it or does not."""

    def __init__(self, rig: Rig, store: Process, worker: Process, name: str, size: int) -> None:
        mint = wire.Mint(rig.secret)
        tokens = [mint.token(f"user-{index}") for index in range(size + 1)]
        clients = wire.enter(worker.port, tokens, lambda index: name, compressed=True)
        self._name = name
        self._talker = Talker(clients[-1])
        sink = wire.Sink(clients[:-1], {clients[-1].fileno(): self._talker.receive})
        usage = Usage(server=worker, store=store)
        self._subject = fanout.Subject(name, self._talker, sink, usage)

    def measure(self, texts: Sequence[str], window: int, seconds: float) -> dict[str, float]:
        """Per delivery, but for ``deliveries`` themselves, which are per second."""
        head = {"type": "send", "id": 1, "room": self._name}
        messages = [json.dumps(head | {"body": {"text": text}}).encode() for text in texts]
        talker, subject = self._talker, self._subject
        talker.talk_of([wire.client_frame(message) for message in messages])
        events_before, bytes_before = talker.events, talker.event_bytes
        subject.measure(window, seconds)
        rate, shares = subject.rates[window][-1], subject.shares[window][-1]
        return {
            "bytes": (talker.event_bytes - bytes_before) / (talker.events - events_before),
            "cpu_us": shares["server"] / rate * 1e6,
            "deliveries": rate,
            "disturbed": shares["disturbed"],
        }


def run(seconds: float, sockets: int | None) -> dict[str, object]:
    many = min(sockets or RECEIVERS, wire.descriptors_left() // 2 - FEW)
    cases = [
        Case(receivers, window, size)
        for receivers, window in ((many, 1), (many, 16), (FEW, 1))
        for size in EVENT_BYTES
    ]
    rounds: dict[tuple[Case, str], list[dict[str, float]]] = {}
    with Rig() as rig:
        store = rig.store()
        rooms = {}
        for mode in MODES:
            worker = rig.worker(CHATSERVER_PING_INTERVAL="86400", CHATSERVER_COMPRESSION=mode)
            for size in (many, FEW):
                # Both workers have the store in common; names of one length.
                rooms[mode, size] = Room(rig, store, worker, f"{mode[0]}-{size:05}", size)
        for _ in range(ROUNDS):
            for case in cases:
                texts = _texts(case.size)
                for mode in MODES:
                    room = rooms[mode, case.receivers]
                    figures = room.measure(texts, case.window, seconds)
                    rounds.setdefault((case, mode), []).append(figures)
    rows = [_row(case, *(rounds[case, mode] for mode in MODES)) for case in cases]
    idle = [memory.run(seconds, IDLE_SOCKETS, compressed=mode != "off") for mode in MODES]
    return {
        "rows": rows,
        "kilobytes": [each["kilobytes"] for each in idle],
        "notes": [note for row in rows if (note := _warning(row))],
    }


def _texts(event_bytes: int) -> list[str]:
    """English prose, pieces of the documentation: what makes an event of about this size."""
    pages = [page.read_text() for page in sorted((ROOT / "docs").glob("*.md"))]
    prose = " ".join(word for page in pages for word in page.split() if word.isascii())
    prose = prose.replace('"', "'").replace("\\", "/")
    frame = '{"type":"message","room":"o-01000","offset":10000,"ts":1760000001234'
    frame += ',"user":"user-1000","body":{"text":""}}'
    length = event_bytes - len(frame)
    step = (len(prose) - length) // TEXTS
    return [prose[start : start + length] for start in range(0, step * TEXTS, step)]


def _row(
    case: Case, off: list[dict[str, float]], on: list[dict[str, float]]
) -> dict[str, float | tuple[float, float]]:
    """For each figure its medians, off and on, and the median of the rounds' ratios."""
    row: dict[str, float | tuple[float, float]] = dict(case._asdict())
    for figure in FIGURES:
        pairs = [(a[figure], b[figure]) for a, b in zip(off, on, strict=True)]
        first, second = zip(*pairs, strict=True)
        row[figure] = statistics.median(first), statistics.median(second)
        row[f"{figure} x"] = statistics.median(b / a for a, b in pairs)
    row["disturbed"] = statistics.median(each["disturbed"] for each in off + on)
    return row


def _warning(row: dict[str, float | tuple[float, float]]) -> str | None:
    share = row["disturbed"]
    assert isinstance(share, float)
    if share <= 0.1:
        return None
    return (
        f"{row['size']} bytes to {row['receivers']}, W={row['window']}: other processes had the "
        f"server's core for {share:.0%}"
    )


def table(result: dict[str, Any]) -> report.Table:
    rows = []
    for row in result["rows"]:
        cells = [f"{row['receivers']:,} x {row['size']:,} bytes", str(row["window"])]
        for figure, digits in (("bytes", 0), ("cpu_us", 2), ("deliveries", 0)):
            cells += [f"{value:,.{digits}f}" for value in row[figure]]
            cells.append(f"{row[f'{figure} x']:.2f}")
        rows.append(cells)
    off, on = result["kilobytes"]
    head = ["receivers, event", "W", "bytes off", "on", "x", "CPU µs off", "on", "x"]
    return report.Table(
        "one room, clients that offer compression; off and on, and the ratio; W in flight; each "
        "figure is of one delivery",
        [*head, "deliveries/s off", "on", "x"],
        rows,
        f"memory per idle socket: {off:.2f} KB off, {on:.2f} KB on",
    )

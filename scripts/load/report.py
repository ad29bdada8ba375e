"""What is told of a run: the line while it goes on, the table in the end, and JSON."""

from __future__ import annotations

import json
import os
import platform
import shutil
import sys
import textwrap
import time
from pathlib import Path

from .advice import notices
from .options import Options
from .results import Results, Second, Verdict
from .tally import COUNTS, Measure, total

PLAIN_SECONDS = 5.0
"""Between lines where there is no terminal to rewrite one on."""
WIDTH = 100
"""Of a notice's lines."""
PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99)
LATENCIES = {
    Measure.CONNECT: "connect, until the welcome",
    Measure.JOIN: "join",
    Measure.ACK: "send, until its ack",
    Measure.DELIVERY: "send, until each delivery",
    Measure.LATE_DELIVERY: "delivery to who was away or slow",
    Measure.HISTORY: "history",
    Measure.LEAVE: "leave",
    Measure.REFRESH: "refresh",
    Measure.RECOVERY: "recovery, dropped until caught up",
    Measure.REVOCATION: "revoke, until the close",
    Measure.REVOKE_CALL: "revoke, until the call returned",
}
"""What each is called, in the order of a report."""
ALWAYS = ("connects", "sends", "acks", "deliveries", "lost", "doubled", "reordered")
"""Counts that are told even if they are nought."""


class Progress:
    """One line, rewritten on a terminal, and a new one every few seconds elsewhere."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._next = 0.0
        self._shown = False

    def show(self, phase: str, results: Results) -> None:
        if not self._terminal and time.monotonic() < self._next:
            return
        self._next = time.monotonic() + PLAIN_SECONDS
        line = progress_line(phase, results, results.latest())
        if self._terminal:
            columns = shutil.get_terminal_size().columns
            sys.stdout.write(f"\r\x1b[K{line[: columns - 1]}")
            self._shown = True
        else:
            sys.stdout.write(f"{line}\n")
        sys.stdout.flush()

    def clear(self) -> None:
        if self._shown:
            sys.stdout.write("\r\x1b[K")
            self._shown = False


def progress_line(phase: str, results: Results, latest: Second | None) -> str:
    parts = [f"{phase:<10}", f"{results.connected:,}/{results.options.sockets:,} connected"]
    if latest is not None:
        parts.insert(1, f"{latest.at + 1:>3} s")
        rates = [f"{latest.rates[n]:,.0f} {n}/s" for n in RATES if n in latest.rates]
        parts += rates
        if Measure.DELIVERY in latest.p99:
            parts.append(f"p99 {latest.p99[Measure.DELIVERY]:.1f} ms")
    for name in ("lost", "doubled", "refused", "error", "closed"):
        if number := total(results.counts, name):
            parts.append(f"{number:,} {name}")
    if latest is not None:
        parts.append(f"cpu {latest.cpu:.0%}")
    return "  ".join(parts)


RATES = ("connects", "sends", "acks", "deliveries", "refreshes", "reconnects", "revoked")


# -- in the end -------------------------------------------------------------------------------


def text(results: Results) -> str:
    """The tables, for a terminal."""
    blocks = [f"{results.options.scenario}: {describe(results.options)}"]
    if rows := latency_rows(results):
        blocks.append(_table(["ms", *(f"p{q:g}" for q in PERCENTILES), "max", "count"], rows))
    blocks.append(_table(["", "in all", "per second"], count_rows(results)))
    head = ["load test", "cpu, ramp", "cpu, load", "late p99, ramp", "late p99, load"]
    blocks.append(_table(head, effort_rows(results)))
    blocks += [textwrap.fill(f"! {notice}", WIDTH) for notice in notices(results)]
    blocks.append("\n".join(map(verdict_line, results.verdicts())))
    return "\n\n".join(filter(None, blocks))


def verdict_line(verdict: Verdict) -> str:
    required, value, met = verdict
    found = "nothing was measured" if value is None else f"{value:,.6g}"
    return f"{'met' if met else 'NOT MET'}: {required} ({found})"


def describe(options: Options) -> str:
    """What was done, in a line."""
    parts = [_count(options.clients, "client")]
    if options.rooms:
        parts.append(_count(options.rooms, "room"))
    if options.publishers:
        parts.append(_count(options.publishers, "publisher"))
        parts.append(
            f"{options.window} in flight each"
            if options.window
            else f"{options.rate:g} messages/s of {options.bytes} bytes"
        )
    elif options.rooms:
        parts.append(f"{options.rate:g} actions/s")
    if options.scenario in ("reconnect", "revoke", "slow"):
        parts.append(f"a share of {options.share:.0%}")
    processes = _count(options.processes, "process", "es")
    parts.append(f"{options.duration:g} s, from {processes}")
    return ", ".join(parts) + f"; {options.url}"


def _count(number: int, what: str, ending: str = "s") -> str:
    return f"{number:,} {what}" + ("" if number == 1 else ending)


def latency_rows(results: Results) -> list[list[str]]:
    rows = []
    for measure, name in LATENCIES.items():
        if histogram := results.latencies.get(measure):
            # A percentile that no value stands for is the highest one's, and says nothing.
            values = [
                f"{value / 1000:,.2f}" if histogram.count * (100 - q) >= 100 or q <= 50 else "-"
                for q, value in zip(PERCENTILES, histogram.percentiles(*PERCENTILES), strict=True)
            ]
            rows.append([name, *values, f"{histogram.highest / 1000:,.2f}", f"{histogram.count:,}"])
    return rows


def count_rows(results: Results) -> list[list[str]]:
    rows = []
    for name in COUNTS:
        number = total(results.counts, name)
        if number or name in ALWAYS:
            rows.append([name, f"{number:,}", f"{results.per_second(name):,.1f}"])
            rows += [
                [f"  {part.removeprefix(name)[1:]}", f"{results.counts[part]:,}", ""]
                for part in sorted(results.counts)
                if part.startswith(f"{name}_") and results.counts[part] and part not in COUNTS
            ]
    return rows


def effort_rows(results: Results) -> list[list[str]]:
    by_process: dict[int, dict[str, tuple[float, float]]] = {}
    for effort in results.efforts():
        by_process.setdefault(effort.process, {})[effort.phase] = (effort.cpu, effort.lag_p99)
    rows = []
    for process, phases in by_process.items():
        cpus = [f"{phases[p][0]:.0%}" if p in phases else "-" for p in ("ramp", "load")]
        lags = [f"{phases[p][1]:.1f} ms" if p in phases else "-" for p in ("ramp", "load")]
        rows.append([f"process {process + 1}", *cpus, *lags])
    return rows


def _table(head: list[str], rows: list[list[str]]) -> str:
    """The first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = []
    for row in (head, *rows):
        first, *figures = zip(row, widths, strict=True)
        lines.append(
            "  ".join([first[0].ljust(first[1]), *(t.rjust(w) for t, w in figures)]).rstrip()
        )
    return "\n".join(lines)


def as_json(results: Results) -> dict[str, object]:
    """Everything. Times in ms, rates per second, ``at`` in seconds since the ramp began."""
    options = results.options
    return {
        "scenario": options.scenario,
        "options": {
            name: getattr(options, name)
            for name in (
                "url",
                "processes",
                "clients",
                "ramp",
                "duration",
                "rooms",
                "publishers",
                "rate",
                "window",
                "bytes",
                "share",
                "grace",
                "run",
            )
        },
        "machine": {
            "cores": os.cpu_count(),
            "kernel": platform.release(),
            "python": platform.python_version(),
        },
        "ended_early": results.ended_early,
        "counts": {name: total(results.counts, name) for name in COUNTS}
        | {name: n for name, n in sorted(results.counts.items()) if name not in COUNTS},
        "per_second": {name: results.per_second(name) for name in COUNTS},
        "latencies": {
            measure: {
                "count": histogram.count,
                "mean": histogram.mean / 1000,
                "max": histogram.highest / 1000,
                "curve": [[q, value / 1000] for q, value in histogram.curve()],
            }
            for measure, histogram in results.latencies.items()
        },
        "seconds": [second._asdict() for second in results.seconds],
        "processes": [
            effort._asdict() | {"bottleneck": effort.bottleneck} for effort in results.efforts()
        ],
        "requirements": [
            {"text": str(verdict.requirement), "value": verdict.value, "met": verdict.met}
            for verdict in results.verdicts()
        ],
        "notices": notices(results),
    }


def write_json(results: Results, path: Path) -> None:
    path.write_text(json.dumps(as_json(results), indent=2) + "\n")

"""Measure the server against other things on the same machine, in the same run.

docs/performance.md says what is measured and what the figures mean.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import structlog
from benchmark import fanout, memory, revoke, rooms, sessions, slow, storm, wire

Result = dict[str, Any]
SECONDS = 2.0


def main() -> None:
    options = _parser().parse_args()
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    # Servers are ended on the way out, and a SIGTERM must take that way, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    names = list(BENCHMARKS) if options.benchmark == "all" else [options.benchmark]
    results: Result = {"machine": _machine()}
    print(_machine_line(results["machine"]))
    for name in names:
        run, show = BENCHMARKS[name]
        wire.repeated_joins.clear()
        result = results[name] = run(options)
        if times := len(wire.repeated_joins):
            result["notes"].append(f"{times} joins were answered unavailable, and repeated")
        print(f"\n{name}")
        show(result)
        for note in result["notes"]:
            print(f"  note: {note}")
    results["machine"]["load_after"] = os.getloadavg()[0]
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure the server on this machine. It runs on one core, its clients and its "
        "store on another; everything stays on loopback.",
    )
    parser.add_argument(
        "benchmark",
        nargs="?",
        choices=[*BENCHMARKS, "all"],
        default="all",
        help="fanout: deliveries/s in one room, beside a C epoll loop and websockets' broadcast(); "
        "memory: per idle socket; revoke: until a user's sockets are closed; "
        "sessions: revoked one by one on two workers, and rotated; rooms: many small "
        "rooms, sends/s and latency; storm: a worker is killed, until its clients are back; "
        "slow: readers that stop, and what the others notice "
        "(default: all)",
    )
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        default=SECONDS,
        metavar="S",
        help=f"length of each timed stretch of fanout and rooms (default: {SECONDS:g})",
    )
    parser.add_argument(
        "--sockets",
        type=_positive(int),
        metavar="N",
        help=f"sockets of each benchmark (default: fanout 1000 receivers, memory "
        f"{memory.SOCKETS}, revoke {revoke.SOCKETS}, sessions {sessions.SOCKETS}, "
        f"storm {storm.CLIENTS}, slow {slow.MEMBERS}, "
        f"rooms {rooms.ROOMS * rooms.MEMBERS})",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    return parser


def _positive(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        value = kind(text)
        if value <= 0:
            raise argparse.ArgumentTypeError("must be more than 0")
        return value

    return parse


def _machine() -> Result:
    cpu = Path("/proc/cpuinfo").read_text()
    models = [line.partition(":")[2] for line in cpu.splitlines() if line.startswith("model name")]
    return {
        "cpu": models[0].strip() if models else platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "load_before": os.getloadavg()[0],
    }


def _machine_line(machine: Result) -> str:
    line = (
        "{cores} cores, {cpu}; Linux {kernel}; Python {python}; load average {load_before:.2f}"
    ).format(**machine)
    if machine["cores"] < 2:
        line += "\nnote: there is one core: clients take their time from the server's."
    return line


def _table(head: list[str], rows: list[list[str]]) -> None:
    """The first column to the left, figures to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    for row in (head, ["-" * width for width in widths], *rows):
        first, *figures = zip(row, widths, strict=True)
        print("  " + "  ".join([first[0].ljust(first[1]), *(t.rjust(w) for t, w in figures)]))


def _percent(shares: dict[str, float], name: str) -> str:
    return f"{shares[name]:.0%}" if name in shares else "-"


def _show_fanout(result: Result) -> None:
    print(f"  one room, {result['sockets']:,} receivers; W messages in flight; medians of rounds")
    rows = []
    for row in result["rows"]:
        ratios = [f"{row[f'x {n}']:.2f}" if f"x {n}" in row else "-" for n in fanout.YARDSTICKS]
        shares = [_percent(row["cpu"], name) for name in ("server", "client", "store")]
        rows.append(
            [row["server"], str(row["window"]), f"{row['deliveries']:,.0f}", *ratios, *shares]
        )
    yardsticks = [f"x {name}" for name in fanout.YARDSTICKS]
    _table(["server", "W", "deliveries/s", *yardsticks, "server CPU", "client", "store"], rows)


def _show_memory(result: Result) -> None:
    print(f"  {result['sockets']:,} idle sockets, each its own user and session, 10 to a room")
    rows = [
        ["resident memory per socket", f"{result['kilobytes']:.2f} KB"],
        ["handshake and join", f"{result['entries']:,.0f} per second"],
        ["server CPU meanwhile", _percent(result["cpu"], "server")],
        ["client CPU meanwhile", _percent(result["cpu"], "client")],
    ]
    _table(["", "figure"], rows)


def _show_revoke(result: Result) -> None:
    print(f"  {result['sockets']:,} sockets of one user; ms since the call; medians of rounds")
    names = {"told": "close frame received", "closed": "connection closed"}
    rows = [
        [text, *(f"{result[name][part]:.1f}" for part in ("p50", "p99", "max", "worst"))]
        for name, text in names.items()
    ]
    _table(["", "p50", "p99", "max", "worst round's max"], rows)


def _show_sessions(result: Result) -> None:
    print(f"  {result['sockets']:,} sockets on two workers, each session with one on both; ms")
    names = {
        "closed": "revoke: both sockets closed",
        "returned": "revoke: the call returned",
        "deaf": "revoke, pub/sub killed: closed",
        "rotated": "a refresh token rotated",
    }
    rows = [
        [text, *(f"{result[name][part]:.2f}" for part in ("p50", "p99", "max"))]
        for name, text in names.items()
    ]
    _table(["", "p50", "p99", "max"], rows)
    print(f"  handshakes right after it: {result['tried']}, accepted {result['accepted']}")


def _show_rooms(result: Result) -> None:
    print(f"  {result['rooms']} rooms of {result['members']}, a publisher in each")
    closed, opened = result["closed"], result["open"]
    rows = [
        ["closed loop, one in flight per room", f"{closed['sends']:,.0f} sends/s"],
        ["  server, client, store CPU", _three(closed["cpu"])],
        [f"open loop, {opened['rate']:,} sends/s: p50", f"{opened['p50']:.2f} ms"],
        ["  p99", f"{opened['p99']:.2f} ms"],
        ["  longest", f"{opened['max']:.2f} ms"],
        ["  the client's own longest delay", f"{opened['client_late']:.2f} ms"],
        ["  server, client, store CPU", _three(opened["cpu"])],
    ]
    _table(["", "figure"], rows)


def _show_slow(result: Result) -> None:
    print(f"  {result['members']} members, {slow.RATE} messages/s of {slow.BODY} bytes; then")
    print(f"  {slow.STOPPED} of them stop reading and {slow.CRAWLING} read 1 kB/s for", end="")
    print(f" {result['seconds']:.0f} s")
    before, after = result["baseline"], result["disturbed"]
    least, ratio, most = result["ratios"]
    rows = [
        ["p50 of the others", f"{before['p50']:.2f} ms", f"{after['p50']:.2f} ms"],
        ["p99", f"{before['p99']:.2f} ms", f"{after['p99']:.2f} ms"],
        ["  ratio, of three rounds", f"{least:.2f}-{most:.2f}", f"{ratio:.2f}"],
        ["worker's memory, growth", f"{before['grown']:.1f} MB", f"{after['grown']:.1f} MB"],
    ]
    _table(["medians of three rounds", "all read", "20 do not"], rows)
    slow_ones = slow.STOPPED + slow.CRAWLING
    print(
        f"  then these read on: {result['complete']} of {slow_ones} have every event, once and in"
    )
    print(f"  order, after {result['caught_up']:.1f} s at most")


def _show_storm(result: Result) -> None:
    print(
        f"  {result['clients']:,} clients on two workers; one worker is killed, {result['hit']:,}"
    )
    print(f"  clients come back with full jitter; {result['sent']:,} messages meanwhile")
    back = result["back"]
    rows = [
        ["handshakes and joins before", f"{result['entered']:,.0f} per second"],
        ["back and caught up: p50", f"{back['p50']:.2f} s"],
        ["  p99", f"{back['p99']:.2f} s"],
        ["  the last", f"{back['max']:.2f} s"],
        ["delivered", f"{result['delivered']:,}"],
        ["lost, doubled", f"{result['lost']}, {result['doubled']}"],
        ["rejoins without proof", f"{result['unrecovered']}"],
        ["handshakes refused", str(result["refused"] or "none")],
    ]
    _table(["", "figure"], rows)


def _three(shares: dict[str, float]) -> str:
    return " ".join(_percent(shares, name) for name in ("server", "client", "store"))


BENCHMARKS: dict[str, tuple[Callable[[argparse.Namespace], Result], Callable[[Result], None]]] = {
    "fanout": (lambda options: fanout.run(options.seconds, options.sockets), _show_fanout),
    "memory": (lambda options: memory.run(options.sockets), _show_memory),
    "revoke": (lambda options: revoke.run(options.sockets), _show_revoke),
    "sessions": (lambda options: sessions.run(options.sockets), _show_sessions),
    "slow": (lambda options: slow.run(options.seconds, options.sockets), _show_slow),
    "storm": (lambda options: storm.run(options.sockets), _show_storm),
    "rooms": (lambda options: rooms.run(options.seconds, options.sockets), _show_rooms),
}

if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

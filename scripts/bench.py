"""Measure the server against other things on the same machine, in the same run.

docs/performance.md says what is measured and what the figures mean. Each benchmark is a module:
``ABOUT`` it in a few words, how many ``SOCKETS`` it has if nobody says otherwise,
``run(seconds, sockets)`` for the figures and ``table(result)`` to show them.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import signal
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from types import ModuleType
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

import structlog
from benchmark import (
    admission,
    chart,
    clients,
    compression,
    crowd,
    fanout,
    handshakes,
    idle,
    memory,
    report,
    revoke,
    rooms,
    sessions,
    slow,
    storm,
    wire,
)

Result = dict[str, Any]
SECONDS = 2.0
BENCHMARKS: dict[str, ModuleType] = {
    "fanout": fanout,
    "compression": compression,
    "crowd": crowd,
    "handshakes": handshakes,
    "admission": admission,
    "memory": memory,
    "idle": idle,
    "revoke": revoke,
    "sessions": sessions,
    "slow": slow,
    "storm": storm,
    "rooms": rooms,
    "clients": clients,
}


def main() -> None:
    parser = _parser()
    options = parser.parse_args()
    names = list(BENCHMARKS) if options.benchmark == "all" else [options.benchmark]
    if options.svg and "fanout" not in names:
        parser.error("--svg is a picture of fanout, which is not measured now")
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    # Servers are ended on the way out, and a SIGTERM must take that way, too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    results: Result = {"machine": _machine()}
    print(_machine_line(results["machine"]), flush=True)
    failed = False
    for name in names:
        wire.repeated.clear()
        try:
            result = results[name] = BENCHMARKS[name].run(options.seconds, options.sockets)
        except RuntimeError as error:
            # The others' figures are not lost for it.
            print(f"\n{name}\n  failed: {error}", flush=True)
            failed = True
            continue
        if times := len(wire.repeated):
            result["notes"].append(
                f"{times} joins, sends or handshakes were answered unavailable, and repeated"
            )
        print(f"\n{name}\n{BENCHMARKS[name].table(result).text(result['notes'])}", flush=True)
    results["machine"]["load_after"] = os.getloadavg()[0]
    _write(options, results)
    sys.exit(failed)


def _write(options: argparse.Namespace, results: Result) -> None:
    line = _machine_line(results["machine"])
    if options.json:
        options.json.write_text(json.dumps(results, indent=2) + "\n")
    if options.svg and "fanout" in results:
        options.svg.write_text(chart.picture(results["fanout"], fanout.CHATSERVER, line))
    if options.markdown:
        blocks = {"machine": line} | {
            name: BENCHMARKS[name].table(result).markdown(result["notes"])
            for name, result in results.items()
            if name in BENCHMARKS
        }
        if not options.markdown.exists():
            places = (f"<!-- {name} -->\n<!-- /{name} -->\n" for name in blocks)
            options.markdown.write_text("\n".join(places))
        page = options.markdown.read_text()
        options.markdown.write_text(report.fill(page, blocks))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/bench",
        description="Measure the server on this machine. It runs on one core, its clients and its\n"
        "store on another; everything stays on loopback.",
        epilog="benchmarks, and their sockets where --sockets does not say otherwise:\n"
        + "\n".join(
            f"  {name:9} {module.ABOUT} ({module.SOCKETS:,})" for name, module in BENCHMARKS.items()
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "benchmark",
        nargs="?",
        choices=[*BENCHMARKS, "all"],
        default="all",
        metavar="BENCHMARK",
        help="one of those below, or all (default)",
    )
    parser.add_argument(
        "--seconds",
        type=_positive(float),
        default=SECONDS,
        metavar="S",
        help=f"length of each timed stretch of fanout and rooms (default: {SECONDS:g})",
    )
    parser.add_argument(
        "--sockets", type=_positive(int), metavar="N", help="sockets of each benchmark"
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all figures there, too")
    parser.add_argument("--svg", type=Path, metavar="FILE", help="draw fanout's bars there")
    parser.add_argument(
        "--markdown",
        type=Path,
        metavar="FILE",
        help="write the tables there; in a page that has their places, such as "
        "docs/performance.md, replace them",
    )
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
        "uvloop": version("uvloop"),
        "websockets": version("websockets"),
        "day": time.strftime("%Y-%m-%d"),
        "load_before": os.getloadavg()[0],
    }


def _machine_line(machine: Result) -> str:
    line = (
        "{cores} cores, {cpu}; Linux {kernel}; Python {python}, uvloop {uvloop}, "
        "websockets {websockets}; {day}, load average {load_before:.2f}"
    ).format(**machine)
    if machine["cores"] < 2:
        line += "\nnote: there is one core: clients take their time from the server's."
    return line


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)

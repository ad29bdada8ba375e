"""Faults at random, by hand and for as long as one likes: scripts/soak."""

from __future__ import annotations

import argparse
import asyncio
import json
import logging
import random
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from tests.faults.checker import Report, check
from tests.faults.history import History
from tests.faults.nemesis import EVERY_SECONDS, FAULTS, QUIET_SECONDS, USUAL
from tests.faults.run import KINDS, Run, Shape, Verdict


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code: 1 for a promise that was broken."""
    options = _parser().parse_args(arguments)
    # What clients warn of is what a run is about.
    logging.basicConfig(level=logging.ERROR)
    if options.check is not None:
        return _check_again(options.check)
    seed = random.SystemRandom().randrange(2**32) if options.seed is None else options.seed
    history = options.history or Path(tempfile.gettempdir(), f"soak-{seed}.jsonl")
    _say(f"seed {seed}; the history goes to {history}")
    run = Run(
        seed,
        options.seconds,
        Shape(options.rooms, options.members, options.rate),
        faults=options.faults,
        every=options.every,
        lead=options.lead,
        clients=options.clients,
        history=history,
        say=_say,
    )
    verdict = asyncio.run(run.run())
    sys.stdout.write(f"\n{verdict}\n")
    if options.json is not None:
        options.json.write_text(json.dumps(_as_json(verdict), indent=2) + "\n")
    return 1 if verdict.violations else 0


def _check_again(path: Path) -> int:
    history = History.read(path)
    violations = check(history)
    sys.stdout.write(f"{Report.of(history)}\n{len(violations)} violations\n")
    for violation in violations:
        sys.stdout.write(f"  {violation}\n")
    return 1 if violations else 0


def _say(text: str) -> None:
    sys.stdout.write(f"{time.strftime('%H:%M:%S')} {text}\n")
    sys.stdout.flush()


def _as_json(verdict: Verdict) -> dict[str, object]:
    report = verdict.report
    return {
        "seed": verdict.seed,
        "seconds": verdict.seconds,
        "plan": [planned._asdict() for planned in verdict.plan],
        "skipped": verdict.skipped,
        "report": report._asdict()
        | {name: getattr(report, name)._asdict() for name in ("before", "calm", "faulty")},
        "told": verdict.told,
        "violations": [
            {"invariant": int(violation.invariant), "text": violation.text}
            for violation in verdict.violations
        ],
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/soak",
        description="Put a server with two workers under load, break what can be broken, and check "
        "every promise on the history of the run.",
    )
    parser.add_argument("--seconds", type=float, default=60.0, metavar="S", help="default: 60")
    parser.add_argument("--seed", type=int, help="of faults and load (default: any, printed)")
    usual = Shape()
    parser.add_argument("--rooms", type=int, default=usual.rooms, help=f"default: {usual.rooms}")
    parser.add_argument(
        "--members", type=int, default=usual.members, help=f"default: {usual.members}"
    )
    parser.add_argument(
        "--rate",
        type=float,
        default=usual.rate,
        help=f"messages a second (default: {usual.rate:g})",
    )
    parser.add_argument(
        "--faults",
        type=_faults,
        default=USUAL,
        metavar="A,B,C",
        help=f"only these, of: {', '.join(FAULTS)} (default: all that lose nothing)",
    )
    parser.add_argument(
        "--every",
        type=float,
        default=EVERY_SECONDS,
        metavar="S",
        help=f"a fault every so many seconds (default: {EVERY_SECONDS:g})",
    )
    parser.add_argument(
        "--lead",
        type=float,
        default=QUIET_SECONDS,
        metavar="S",
        help="the first fault comes after so many seconds: longer, to compare what deliveries take "
        f"before and between faults (default: {QUIET_SECONDS:g})",
    )
    parser.add_argument(
        "--clients",
        choices=KINDS,
        default="own",
        help="whose reading of the protocol the members are (default: own, this harness's)",
    )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the report there, too")
    parser.add_argument(
        "--history",
        type=Path,
        metavar="FILE",
        help="where the history goes (default: soak-SEED.jsonl in the temporary directory)",
    )
    parser.add_argument(
        "--check", type=Path, metavar="FILE", help="run nothing: check this history again"
    )
    return parser


def _faults(text: str) -> tuple[str, ...]:
    names = tuple(name for name in text.split(",") if name)
    if unknown := set(names) - set(FAULTS):
        raise argparse.ArgumentTypeError(f"no such fault: {', '.join(sorted(unknown))}")
    return names


if __name__ == "__main__":
    sys.exit(main())

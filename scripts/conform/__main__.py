"""scripts/conformance: play every case to a client, and print a table."""

from __future__ import annotations

import argparse
import asyncio
import sys
import time
from collections.abc import Sequence
from typing import NamedTuple

from conform.cases import CASES, rule
from conform.peer import Broken
from conform.stage import Stage

MOST = 120.0
"""Seconds that no case takes."""
EPILOG = """\
The program is started once for each case, with two more arguments: the URL, and the pair of tokens
of a login as JSON. docs/client-authors.md tells in one screen what it has to do, and
scripts/conform/glue has two of them. For example:

  scripts/conformance node --experimental-websocket scripts/conform/glue/javascript.mjs
"""


class Result(NamedTuple):
    name: str
    seconds: float
    why: str
    """Empty when it passed."""


def main() -> int:
    """Returns the exit code: 1 when a case failed."""
    options = _parser().parse_args()
    if options.list:
        for name in CASES:
            print(f"{name:32} {rule(name)}")
        return 0
    if not options.command:
        _parser().error("which program? Give its command, or --list.")
    names = options.case or list(CASES)
    results = asyncio.run(_run(options.command, names, options.jobs, options.patience))
    failed = sum(bool(result.why) for result in results)
    print(f"\n{len(results) - failed} passed, {failed} failed")
    return 1 if failed else 0


async def _run(
    command: Sequence[str], names: Sequence[str], jobs: int, patience: float
) -> list[Result]:
    places = asyncio.Semaphore(jobs)

    async def play(name: str) -> Result:
        async with places:
            result = await _play(command, name, patience)
        _print(result)
        return result

    return list(await asyncio.gather(*map(play, names)))


async def _play(command: Sequence[str], name: str, patience: float) -> Result:
    began = time.monotonic()
    why = ""
    stage = Stage(command, patience)
    try:
        async with asyncio.timeout(MOST * patience), stage.running():
            await CASES[name](stage)
    except Broken as broken:
        why = str(broken)
    except TimeoutError:
        why = f"it was not over in {MOST:g} s"
    except OSError as exc:
        why = f"the program does not start: {exc}"
    return Result(name, time.monotonic() - began, why)


def _print(result: Result) -> None:
    verdict = "FAIL" if result.why else "pass"
    print(f"{verdict}  {result.name:32} {result.seconds:5.1f} s  {rule(result.name)}")
    for line in result.why.splitlines():
        print(f"      {line}")
    sys.stdout.flush()


def _case(name: str) -> str:
    if name not in CASES:
        raise argparse.ArgumentTypeError(f"there is no case {name}: see --list")
    return name


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/conformance",
        description="Play every hard case of the protocol to a client in any language.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--list", action="store_true", help="list the cases, and run none")
    parser.add_argument(
        "--case", action="append", type=_case, metavar="NAME", help="only this one (repeatable)"
    )
    parser.add_argument(
        "--jobs", type=int, default=8, metavar="N", help="cases at the same time (default: 8)"
    )
    parser.add_argument(
        "--patience",
        type=float,
        default=1.0,
        metavar="X",
        help="allow X times as long for everything (default: 1)",
    )
    parser.add_argument("command", nargs=argparse.REMAINDER, help="the program under test")
    return parser


if __name__ == "__main__":
    sys.exit(main())

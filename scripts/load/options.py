"""The command line, checked: what to do, with how many, for how long."""

from __future__ import annotations

import argparse
import os
import resource
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from .scenarios import SCENARIOS, Scenario
from .thresholds import Requirement, parse_requirement

SPARE_DESCRIPTORS = 200
"""What a process needs beside its connections."""


class UsageError(Exception):
    """The command line is wrong; the message is for a person."""


@dataclass(frozen=True, slots=True)
class Options:
    """One run. Rates are per second, times in seconds."""

    scenario: str
    url: str
    control: str
    tokens: Path | None
    processes: int
    clients: int
    ramp: float
    duration: float
    rooms: int
    publishers: int
    rate: float
    """Of messages, in ``chat`` of everything clients do; 0 if there is a window."""
    window: int
    """Messages each publisher keeps in flight; 0 for an open loop."""
    bytes: int
    share: float
    grace: float
    json: Path | None
    html: Path | None
    requirements: tuple[Requirement, ...]
    run: str
    """Names this run: its rooms, users and keys begin with it."""

    @property
    def base(self) -> str:
        """The server's URL for HTTP, without a path."""
        parts = urlsplit(self.url)
        return f"{'https' if parts.scheme == 'wss' else 'http'}://{parts.netloc}"

    @property
    def behaviour(self) -> Scenario:
        return SCENARIOS[self.scenario]

    @property
    def sockets(self) -> int:
        return self.clients + self.publishers


def parse(arguments: Sequence[str] | None = None) -> Options:
    """Ends the process with 2, as argparse does, if something is wrong."""
    parser = _parser()
    given = parser.parse_args(arguments)
    try:
        return _complete(given)
    except UsageError as error:
        parser.error(str(error))


def _complete(given: argparse.Namespace) -> Options:
    scenario = SCENARIOS[given.scenario]
    rooms = (given.rooms or max(1, given.clients // 10)) if scenario.rooms else 0
    publishers = (given.publishers or rooms) if scenario.publishers else 0
    if given.window is not None and (given.rate is not None or not scenario.publishers):
        raise UsageError("--window is a closed loop of publishers: without --rate, and not in chat")
    senders = publishers or (given.clients if scenario.rooms else 0)
    rate = given.rate or senders * (2.0 if scenario.publishers else 0.5)
    processes = min(given.processes, given.clients + publishers)
    each = -(-(given.clients + publishers) // processes)
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1] - SPARE_DESCRIPTORS
    if each > most:
        raise UsageError(
            f"{each:,} connections in one process, and it may have {most:,} (ulimit -n): give more "
            f"--processes"
        )
    if scenario.control and not os.environ.get("CHATSERVER_CONTROL_KEY"):
        raise UsageError(
            f"{given.scenario} revokes through the control API: set CHATSERVER_CONTROL_KEY to the "
            "server's"
        )
    return Options(
        scenario=given.scenario,
        url=given.url,
        control=given.control.rstrip("/"),
        tokens=given.tokens,
        processes=processes,
        clients=given.clients,
        ramp=given.ramp,
        duration=given.duration,
        rooms=rooms,
        publishers=publishers,
        rate=0.0 if given.window else rate,
        window=given.window or 0,
        bytes=given.bytes,
        share=scenario.share if given.share is None else given.share,
        grace=given.grace,
        json=given.json,
        html=given.html,
        requirements=tuple(given.require),
        run=f"load-{secrets.token_hex(4)}",
    )


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="scripts/loadtest",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description="Put many clients on a chat server, and tell how long everything took, from "
        "the moment it\nwas meant to begin, and whether anything was lost or doubled.",
        epilog=EPILOG,
    )
    parser.add_argument(
        "scenario",
        choices=SCENARIOS,
        help="; ".join(f"{name}: {scenario.summary}" for name, scenario in SCENARIOS.items()),
    )
    where = parser.add_argument_group("where, and as whom")
    where.add_argument(
        "--url",
        type=_web_socket_url,
        default="ws://127.0.0.1:8000/v1/ws",
        help="default: %(default)s",
    )
    where.add_argument(
        "--tokens",
        type=Path,
        metavar="FILE",
        help="access tokens, one a line, or pairs, JSON objects with access_token and "
        "refresh_token, each for one client and for one run (default: tokens are made with "
        "CHATSERVER_SECRET, or with the secret of the development server on this machine)",
    )
    where.add_argument(
        "--control",
        default="http://127.0.0.1:8001",
        metavar="URL",
        help="the control API, for revoke; its key is CHATSERVER_CONTROL_KEY (default: "
        "%(default)s)",
    )
    much = parser.add_argument_group("how much")
    much.add_argument(
        "--processes",
        type=_number(int),
        metavar="N",
        default=max(2, (os.cpu_count() or 1) // 2),
        help="of the load test itself (default here: %(default)s)",
    )
    much.add_argument(
        "--clients", type=_number(int), default=100, metavar="N", help="default: %(default)s"
    )
    much.add_argument(
        "--ramp",
        type=_number(float),
        default=500.0,
        metavar="R",
        help="connects per second (default: 500)",
    )
    much.add_argument(
        "--duration",
        type=_number(float),
        default=10.0,
        metavar="S",
        help="seconds from when all are connected (default: 10)",
    )
    much.add_argument(
        "--rooms", type=_number(int), metavar="N", help="default: one for each 10 clients"
    )
    much.add_argument(
        "--publishers",
        type=_number(int),
        metavar="N",
        help="clients more that only send (default: one for each room)",
    )
    much.add_argument(
        "--rate",
        type=_number(float),
        metavar="R",
        help="open loop: messages per second in all, whatever the server does (default: 2 for each "
        "publisher); in chat: what clients do per second in all (default: 0.5 for each)",
    )
    much.add_argument(
        "--window",
        type=_number(int),
        metavar="W",
        help="closed loop: each publisher keeps W messages without an ack, and sends the next when "
        "one comes",
    )
    much.add_argument(
        "--bytes",
        type=_number(int),
        default=100,
        metavar="N",
        help="of text in a message (default: %(default)s)",
    )
    much.add_argument(
        "--share",
        type=_share,
        metavar="P",
        help="of the clients that reconnect drops (default: 1), that revoke ends or that slow "
        "stops (default: 0.1)",
    )
    much.add_argument(
        "--grace",
        type=_number(float),
        default=10.0,
        metavar="S",
        help="seconds to wait for what is still on its way: clients that are not in after the "
        "ramp, then acks and deliveries in the end (default: 10)",
    )
    outcome = parser.add_argument_group("outcome")
    outcome.add_argument(
        "--require",
        type=_requirement,
        action="append",
        default=[],
        metavar="EXPR",
        help="such as 'delivery_p99<200' (ms), 'lost==0', 'deliveries_per_second>10000'; may be "
        "repeated",
    )
    outcome.add_argument("--json", type=Path, metavar="FILE", help="everything, for a program")
    outcome.add_argument("--html", type=Path, metavar="FILE", help="a report with charts")
    return parser


EPILOG = """\
examples:
  scripts/loadtest connect --clients 5000 --ramp 1000
  scripts/loadtest fanout --clients 1000 --rooms 10 --rate 100 --require 'delivery_p99<200'
  scripts/loadtest fanout --rooms 1 --publishers 1 --window 16 --html report.html
  scripts/loadtest reconnect --clients 2000 --require 'lost==0' --require 'doubled==0'

exit codes:
  0   it is done, and every requirement was met
  1   a requirement was not met
  2   the command line is wrong
  69  the server, or the control API, let nobody in
  70  the load test failed
  130 Ctrl-C a second time; the first ends the load early and still reports

docs/loadtest.md says how to prepare a server, and what the figures mean."""


def _number(kind: Callable[[str], float]) -> Callable[[str], float]:
    def parse_number(text: str) -> float:
        value = kind(text)
        if not 0 < value < 1e9:
            raise argparse.ArgumentTypeError("must be more than 0")
        return value

    parse_number.__name__ = "number"
    return parse_number


def _share(text: str) -> float:
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError("must be more than 0 and at most 1")
    return value


def _web_socket_url(text: str) -> str:
    parts = urlsplit(text)
    if parts.scheme not in ("ws", "wss") or not parts.hostname or parts.query:
        raise argparse.ArgumentTypeError("must be like ws://host:8000/v1/ws or wss://…")
    return text


def _requirement(text: str) -> Requirement:
    try:
        return parse_requirement(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None

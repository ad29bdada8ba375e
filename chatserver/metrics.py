"""What a worker counts, and what each number means: the list of all metrics.

Counting lies in the way of every message, so it is adding to plain numbers: ``measured`` is this
process's. How they reach whoever asks is in reports.py, and how they look to Prometheus in
exposition.py, which runs in another process; a field's name is its metric's, less the prefix, and
less ``_total`` for a counter.

The values of every label are listed here, so that nobody outside can make them more: no room, no
user, no session and no connection is one.
"""

# ruff: noqa: RUF009 (the defaults are dataclasses' fields, made by functions)

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping
from dataclasses import Field, dataclass, field, fields
from enum import Enum, auto
from typing import Any, NamedTuple

from chatserver.core import errors
from chatserver.core.errors import Disconnect, Refusal, ReplyCode
from chatserver.core.session import Kind

PREFIX = "chatserver_"
ACCEPTED = "accepted"
STORED = "stored"
DUPLICATE = "duplicate"
OTHER = "other"
"""What a value counts as that is not in its list."""

BOUNDS = (
    *(0.0001, 0.00025, 0.0005),
    *(0.001, 0.0025, 0.005),
    *(0.01, 0.025, 0.05),
    *(0.1, 0.25, 0.5),
    *(1.0, 2.5, 5.0, 10.0),
)
"""Upper ends of the histograms' buckets, in seconds: from the store's round trip on a machine of
its own to what nobody waits for any more."""

_REFUSALS = (
    *(each for each in vars(errors).values() if isinstance(each, Refusal)),
    *errors.TOKEN_REFUSALS.values(),
)
_DISCONNECTS = (each for each in vars(errors).values() if isinstance(each, Disconnect))

REFUSALS = tuple(sorted({refusal.code for refusal in _REFUSALS}))
REPLIES = tuple(code.value for code in ReplyCode)
ABNORMAL = "1006"
"""No close frame came or went (RFC 6455, section 7.1.5)."""
_BROKEN_FRAMING = 1002
GOODBYES = (1000, 1001, 1005)
"""What a peer closes with that has no complaint; 1005 is a close frame without a code."""
_CODES = {*GOODBYES, int(ABNORMAL), _BROKEN_FRAMING, *(each.code for each in _DISCONNECTS)}
CLOSES = tuple(map(str, sorted(_CODES)))
LANES = ("publish", "read", "sessions", "poll")
SUBSCRIPTION = "subscription"


class Tally(dict[str, int]):
    """A counter for each value of a label."""

    def __init__(self, values: Iterable[str]) -> None:
        super().__init__(dict.fromkeys((*values, OTHER), 0))

    def count(self, value: str, number: int = 1) -> None:
        self[value if value in self else OTHER] += number


@dataclass(slots=True)
class Histogram:
    """How often a time fell between two of BOUNDS, and the sum of all."""

    counts: list[int] = field(default_factory=lambda: [0] * (len(BOUNDS) + 1))
    sum: float = 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        if seconds < 0.0:  # Of two clocks, one may be a little ahead.
            seconds = 0.0
        self.counts[bisect_left(BOUNDS, seconds)] += times
        self.sum += seconds * times


# --- what is to be said about each ----------------------------------------------------------


class Type(Enum):
    COUNTER = auto()
    GAUGE = auto()
    HISTOGRAM = auto()


class About(NamedTuple):
    """One metric. ``values`` are those of its label, if it has one."""

    type: Type
    meaning: str
    label: str = ""
    values: tuple[str, ...] = ()
    name: str = ""
    """Where it is not the field's."""
    together: Callable[[list[float]], float] = sum
    """One slot's gauge, of the processes in it: there are two during a rolling restart."""


def _field(default: Callable[[], object], about: About) -> Any:
    return field(default_factory=default, metadata={"about": about})


def _counter(meaning: str, name: str = "") -> Any:
    return _field(int, About(Type.COUNTER, meaning, name=name))


def _tally(label: str, values: tuple[str, ...], meaning: str) -> Any:
    about = About(Type.COUNTER, meaning, label, (*values, OTHER))
    return _field(lambda: Tally(values), about)


def _gauge(meaning: str, together: Callable[[list[float]], float] = sum) -> Any:
    return _field(float, About(Type.GAUGE, meaning, together=together))


def _histogram(meaning: str) -> Any:
    return _field(Histogram, About(Type.HISTOGRAM, meaning))


def _histograms(label: str, values: tuple[str, ...], meaning: str) -> Any:
    values = (*values, OTHER)
    about = About(Type.HISTOGRAM, meaning, label, values)
    return _field(lambda: {value: Histogram() for value in values}, about)


@dataclass(slots=True)
class Metrics:
    """One worker's numbers. Gauges are set by whoever knows them, some just before a report."""

    # Who is here.
    connections: float = _gauge("Connections that are open.")
    rooms: float = _gauge("Rooms with members here.")
    lagging_connections: float = _gauge(
        "Connections whose reader is behind: they are fed from the log, or closed with 4430."
    )
    pending_handshakes: float = _gauge(
        "Sockets that were accepted and are no connections: not yet, or refused and not yet closed."
    )
    ready: float = _gauge("1 while newcomers are accepted, as `/readyz` says; else 0.", max)
    handshakes: Tally = _tally(
        "outcome",
        (ACCEPTED, *REFUSALS),
        "Handshakes, and what else is asked of the public port and refused, by code.",
    )
    closes: Tally = _tally(
        "code",
        CLOSES,
        "Connections that ended, by close code: 1000, 1001 and 1005 are the peer's, 1006 is no "
        "goodbye at all, `other` is any other code of the peer's; the rest are the server's.",
    )

    # What they say, and what they are told.
    received_frames: int = _counter("Frames from clients: commands, well formed or not.")
    received_bytes: int = _counter("Bytes read from clients, as they are inside TLS.")
    sent_bytes: int = _counter("Bytes written to clients, as they are inside TLS.")
    sends: Tally = _tally(
        "outcome",
        (STORED, DUPLICATE, *REPLIES),
        "Sends by outcome, each room of a cross-post by itself: in the log, in it already under "
        "the same key, or the code of the error.",
    )
    refusals: Tally = _tally(
        "code", REPLIES, "Commands refused, and rooms of a cross-post, by the code of the error."
    )
    deliveries: int = _counter("Events written to members, replayed ones included.")
    replayed_events: int = _counter(
        "Events written to members that were behind: they had joined, resumed, or read slowly."
    )
    publish_latency_seconds: Histogram = _histogram(
        "From a send's arrival to the store's answer, just before its ack."
    )
    delivery_latency_seconds: Histogram = _histogram(
        "From an event's `ts`, when the store took it, until the last of a batch of members was "
        "written to; once for each delivery that is no replay. The store tells milliseconds: it is "
        "never too short, and up to 1 ms too long."
    )

    # Tokens and revocation.
    refreshes: Tally = _tally(
        "outcome", (ACCEPTED, *REPLIES), "Tokens renewed on their connection (`refresh`)."
    )
    rotations: Tally = _tally(
        "outcome",
        (ACCEPTED, *REFUSALS),
        "Refresh tokens traded over HTTP (`POST /v1/tokens/refresh`).",
    )
    logouts: Tally = _tally(
        "outcome",
        tuple(dict.fromkeys((ACCEPTED, *REFUSALS, *REPLIES))),
        "Sessions ended by their owner, on the connection or over HTTP.",
    )
    revocations: Tally = _tally("kind", tuple(map(str, Kind)), "Revocations applied here.")
    revocation_lag_seconds: Histogram = _histogram(
        "From a revocation's entry in the store until it was applied here: its connections closed, "
        "its tokens refused. To the millisecond, as the delivery latency."
    )
    mirror_confirmed_timestamp_seconds: float = _gauge(
        "When the list of revocations was last known to be complete, in Unix time; 0: not yet. "
        "After 3 s without, nobody is let in and nothing is delivered.",
        min,
    )
    clock_offset_seconds: float = _gauge(
        "How far the clock here is ahead of the store's. Beyond 5 s, either way, tokens cannot be "
        "judged, and are refused.",
        max,
    )

    # The store, and the log as the source of what pub/sub has lost.
    store_round_trip_seconds: dict[str, Histogram] = _histograms(
        "lane", LANES, "A pipeline's round trip to the store, by what it is for."
    )
    store_commands: Tally = _tally(
        "lane", LANES, "Commands in those pipelines: divided by the round trips, their size."
    )
    store_failures: Tally = _tally(
        "lane",
        (*LANES, SUBSCRIPTION),
        "Connections to the store that were lost, or could not be made.",
    )
    repairs: int = _counter("Readings of a room's log for events that pub/sub may have lost.")
    resets: int = _counter("Members told with `reset` that something of a room may be lost.")
    garbage_messages: int = _counter("Messages on the internal channels that made no sense.")

    # The process.
    event_loop_lag_seconds: Histogram = _histogram(
        "How late the event loop was, looked at four times a second."
    )
    process_cpu_seconds: float = _counter("Processor time, user and system.", "process_cpu_seconds")

    def report(self) -> dict[str, dict[str, object]]:
        """Everything as orjson takes it: ``gauges``, and ``counts`` which outlive the process."""
        parts: dict[str, dict[str, object]] = {"gauges": {}, "counts": {}}
        for name, about in ABOUT.items():
            part = "gauges" if about.type is Type.GAUGE else "counts"
            parts[part][name] = getattr(self, name)
        return parts


def _about(each: Field[Any]) -> About:
    about: About = each.metadata["about"]
    return about._replace(name=about.name or PREFIX + each.name)


ABOUT: Mapping[str, About] = {each.name: _about(each) for each in fields(Metrics)}
"""By field, in the order above."""

measured = Metrics()
"""This process's. Only a worker's is ever reported."""

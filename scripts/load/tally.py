"""What one process counts and measures, handed over in samples that add up."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from enum import StrEnum

from .histogram import Histogram


class Measure(StrEnum):
    """Everything that is timed, from the moment it was meant to begin."""

    CONNECT = "connect"
    """Until the welcome."""
    JOIN = "join"
    ACK = "ack"
    """From a send to its ack."""
    DELIVERY = "delivery"
    """From a send to each member that reads."""
    LATE_DELIVERY = "late_delivery"
    """To members that were away, or did not read for a while."""
    LEAVE = "leave"
    HISTORY = "history"
    REFRESH = "refresh"
    RECOVERY = "recovery"
    """From the end of a connection until a member has all that it missed."""
    REVOCATION = "revocation"
    """From the call until a connection of the session was closed with 4503."""
    REVOKE_CALL = "revoke_call"
    """Until the call returned."""
    LAG = "lag"
    """How late this process itself was: every 10 ms it looks."""


COUNTS = {
    "connects": "handshakes that ended in a welcome",
    "refused": "handshakes that did not, by status",
    "sends": "messages sent, each once however often it was repeated",
    "acks": "sends that were acknowledged",
    "error": "commands that were answered with an error, by code",
    "deliveries": "events received",
    "lost": "events missing where offsets leave a hole",
    "doubled": "events received twice",
    "reordered": "events received after a later one",
    "overdue": "events that were acked but had not arrived when the patience (--grace) ended",
    "stray": "events of a room that was not joined",
    "unanswered": "sends without an answer when the patience ended",
    "joins": "rooms joined",
    "leaves": "rooms left",
    "histories": "pages of history read",
    "refreshes": "tokens put in place of another on the open socket",
    "closed": "connections that the server ended, by close code",
    "dropped": "connections that the scenario cut",
    "reconnects": "clients that came back",
    "recovered": "rejoins proved to be without a gap",
    "unrecovered": "rejoins without that proof",
    "told_gap": "events that the server said could not be replayed",
    "resets": "rooms that the server began anew",
    "left": "rooms whose access the server ended",
    "revoked": "sessions revoked",
    "accepted_after_revocation": "handshakes accepted with a revoked token",
    "absent": "clients that were not connected at the end, without having been revoked",
}
"""Every count and its meaning. ``refused``, ``error`` and ``closed`` are families: ``closed_4430``
is one of the counts that add up to ``closed``."""

FAMILIES = ("refused", "error", "closed")


def total(counts: Counter[str], name: str) -> int:
    """A count, or the sum of its family: of all names that go on after ``name_``."""
    family = f"{name}_"
    return sum(n for key, n in counts.items() if key == name or key.startswith(family))


@dataclass(slots=True)
class Sample:
    """What happened in one process since its last sample."""

    process: int
    phase: str
    at: int
    """When it ended, in nanoseconds of the monotonic clock."""
    seconds: float
    cpu: float
    """Seconds on a processor."""
    connected: int
    """Connections at its end."""
    counts: Counter[str] = field(default_factory=Counter)
    latencies: dict[str, Histogram] = field(default_factory=dict)


class Tally:
    """The counts of a process since the last sample."""

    def __init__(self, process: int) -> None:
        self._process = process
        self.phase = "ramp"
        self.connected = 0
        self._began = time.monotonic_ns()
        self._cpu = time.process_time()
        self._clear()

    def _clear(self) -> None:
        self.counts: Counter[str] = Counter()
        self._latencies: defaultdict[str, Histogram] = defaultdict(Histogram)

    def record(self, measure: Measure, due: int, now: int) -> None:
        """Both in nanoseconds."""
        self._latencies[measure].record((now - due) // 1000)

    def record_each(self, measure: Measure, dues: list[int], now: int) -> None:
        if len(dues) == 1:
            self._latencies[measure].record((now - dues[0]) // 1000)
        else:
            self._latencies[measure].record_all([(now - due) // 1000 for due in dues])

    def sample(self) -> Sample:
        """Hand over what there is, and begin anew."""
        now, cpu = time.monotonic_ns(), time.process_time()
        sample = Sample(
            self._process,
            self.phase,
            now,
            (now - self._began) / 1e9,
            cpu - self._cpu,
            self.connected,
            self.counts,
            dict(self._latencies),
        )
        self._began, self._cpu = now, cpu
        self._clear()
        return sample

"""What all processes found, second by second and in all."""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import NamedTuple

from .agenda import SECOND
from .histogram import Histogram
from .options import Options
from .tally import COUNTS, Measure, Sample, total
from .thresholds import PER_SECOND, Requirement, statistic_of

BUSY = 0.9
LATE_MS = 50.0
"""A process above either was itself what was measured."""
OPEN_SECONDS = 3
"""How long samples for a second may still come."""


class Second(NamedTuple):
    """One second of the run, of all processes together; times in ms."""

    at: int
    """Seconds since the ramp began."""
    phase: str
    connected: int
    rates: dict[str, float]
    """Each count, per second."""
    p50: dict[str, float]
    p99: dict[str, float]
    cpu: float
    """Of the busiest process, as a share of a core."""


class Verdict(NamedTuple):
    requirement: Requirement
    value: float | None
    met: bool


class Effort(NamedTuple):
    """What the load took out of one process, while it ramped up or while the load was on."""

    process: int
    phase: str
    cpu: float
    """Share of a core."""
    lag_p99: float
    """In ms."""

    @property
    def bottleneck(self) -> bool:
        return self.strain > 1.0

    @property
    def strain(self) -> float:
        """How near it came to a limit, the nearer of the two; above 1 it was too much."""
        return max(self.cpu / BUSY, self.lag_p99 / LATE_MS)


@dataclass(slots=True)
class _Part:
    """One process in one phase."""

    cpu: float = 0.0
    seconds: float = 0.0
    counts: Counter[str] = field(default_factory=Counter)
    lag: Histogram = field(default_factory=Histogram)


class Results:
    """Samples add up in here. ``began`` is when the ramp began, in monotonic nanoseconds."""

    def __init__(self, options: Options, began: int) -> None:
        self.options = options
        self.began = began
        self.counts: Counter[str] = Counter()
        self.latencies: defaultdict[str, Histogram] = defaultdict(Histogram)
        self.seconds: list[Second] = []
        self.ended_early = False
        self.send_rate = 0.0
        """What the server lets a connection send per second; 0 if nobody was let in."""
        self._parts: defaultdict[tuple[int, str], _Part] = defaultdict(_Part)
        self._connected: dict[int, int] = {}
        self._open: dict[int, list[Sample]] = {}

    @property
    def connected(self) -> int:
        return sum(self._connected.values())

    def add(self, sample: Sample) -> None:
        self._connected[sample.process] = sample.connected
        self.counts.update(sample.counts)
        for measure, histogram in sample.latencies.items():
            self.latencies[measure].add(histogram)
        part = self._parts[sample.process, sample.phase]
        part.cpu += sample.cpu
        part.seconds += sample.seconds
        part.counts.update(sample.counts)
        if (lag := sample.latencies.get(Measure.LAG)) is not None:
            part.lag.add(lag)
        # One that comes on the stroke is of the second before.
        second = max(0, (sample.at - self.began - SECOND // 2) // SECOND)
        self._open.setdefault(second, []).append(sample)
        self.finish(second - OPEN_SECONDS)

    def finish(self, until: int | None = None) -> None:
        """Turn the samples of every second before ``until``, or of all, into its figures."""
        for at in sorted(self._open):
            if until is None or at < until:
                self.seconds.append(_second(at, self._open.pop(at)))

    def latest(self) -> Second | None:
        """The last second of which every process has told."""
        told = [
            at
            for at, samples in self._open.items()
            if len({sample.process for sample in samples}) == self.options.processes
        ]
        if told:
            return _second(max(told), self._open[max(told)])
        return self.seconds[-1] if self.seconds else None

    # Figures.

    def phase_seconds(self, phase: str) -> float:
        return max((p.seconds for (_, name), p in self._parts.items() if name == phase), default=0)

    def per_second(self, name: str) -> float:
        """A count per second of the load; connects per second of the ramp."""
        phase = "ramp" if name in ("connects", "refused", "joins") else "load"
        seconds = self.phase_seconds(phase)
        parts = [part for (_, of), part in self._parts.items() if of == phase]
        return sum(total(part.counts, name) for part in parts) / seconds if seconds else 0.0

    def milliseconds(self, measure: str, statistic: str) -> float | None:
        """Such as p99.9, max or mean; None if nothing of the kind was measured."""
        histogram = self.latencies.get(measure)
        if not histogram:
            return None
        match statistic:
            case "max":
                return histogram.highest / 1000
            case "mean":
                return histogram.mean / 1000
            case "count":
                return float(histogram.count)
            case _:
                return histogram.percentiles(float(statistic[1:]))[0] / 1000

    def value(self, name: str) -> float | None:
        """What a requirement calls by this name."""
        if (found := statistic_of(name)) is not None:
            return self.milliseconds(*found)
        if name == "cpu":
            return max((100 * effort.cpu for effort in self.efforts()), default=None)
        if name.endswith(PER_SECOND):
            return self.per_second(name.removesuffix(PER_SECOND))
        return float(total(self.counts, name))

    def verdicts(self) -> list[Verdict]:
        found = [(required, self.value(required.name)) for required in self.options.requirements]
        return [Verdict(required, value, required.met_by(value)) for required, value in found]

    def efforts(self) -> list[Effort]:
        return [
            Effort(
                process,
                phase,
                part.cpu / part.seconds if part.seconds else 0.0,
                part.lag.percentiles(99)[0] / 1000,
            )
            for (process, phase), part in sorted(self._parts.items())
            if phase != "settle"
        ]


def _second(at: int, samples: list[Sample]) -> Second:
    counts: Counter[str] = Counter()
    latencies: defaultdict[str, Histogram] = defaultdict(Histogram)
    connected: dict[int, int] = {}
    spent: Counter[int] = Counter()
    cpu: defaultdict[int, float] = defaultdict(float)
    phases: defaultdict[str, float] = defaultdict(float)
    for sample in samples:
        counts.update(sample.counts)
        connected[sample.process] = sample.connected
        spent[sample.process] += int(sample.seconds * SECOND)
        cpu[sample.process] += sample.cpu
        phases[sample.phase] += sample.seconds
        for measure, histogram in sample.latencies.items():
            latencies[measure].add(histogram)
    seconds = max(max(spent.values()) / SECOND, 1e-3)
    return Second(
        at,
        max(phases, key=lambda phase: phases[phase]),
        sum(connected.values()),
        {name: total(counts, name) / seconds for name in COUNTS if total(counts, name)},
        {measure: h.percentiles(50)[0] / 1000 for measure, h in latencies.items()},
        {measure: h.percentiles(99)[0] / 1000 for measure, h in latencies.items()},
        max(cpu[process] / max(ns / SECOND, 1e-3) for process, ns in spent.items()),
    )

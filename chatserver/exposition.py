"""How metrics look to Prometheus: what all workers of this host have reported, in one answer.

One series per worker *slot*, whichever processes were or are in it: few, and they live as long as
the host. reports.py says why a slot's counters never go back; its gauges are those of the processes
that are there now, and none at all when there is none.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import accumulate
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, ProcessCollector
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4, generate_latest
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector

from chatserver.metrics import ABOUT, BOUNDS, PREFIX, About, Type
from chatserver.reports import Living, Slot, read

OPENMETRICS = "application/openmetrics-text"
WORKER = "worker"

PROCESSES = PREFIX + "worker_processes"
REPORTED = PREFIX + "report_timestamp_seconds"
BUILD = PREFIX + "build"
OF_PROCESSES = {
    PROCESSES: "Processes in a worker's slot: 1, in a rolling restart 2, and 0 after a death until "
    "the next one serves.",
    REPORTED: "When the worker last told its numbers, in Unix time: once a second, unless it "
    "hangs.",
    BUILD: "1, for each release that is running.",
}
FROM_SYSTEM: Mapping[str, str] = {
    "process_resident_memory_bytes": "Memory resident.",
    "process_virtual_memory_bytes": "Address space.",
    "process_open_fds": "Open descriptors; each connection is one.",
    "process_max_fds": "The limit of descriptors.",
    "process_start_time_seconds": "When the newest process of the slot started, in Unix time.",
}
"""Read from the system, so that no worker has to count 20,000 descriptors."""

_ALONE = ("process_max_fds", "process_start_time_seconds")
"""Of two processes in one slot the higher one, not the sum."""


def exposition(directory: Path | None, workers: int, accept: str) -> tuple[bytes, str]:
    """The answer and its content type, OpenMetrics for whoever accepts it.

    ``workers`` is the number of slots. It reads files, and must not run on an event loop.
    """
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Host(directory, workers))
    if OPENMETRICS in accept:
        answer: bytes = openmetrics.generate_latest(registry)  # type: ignore[no-untyped-call]
        return answer, openmetrics.CONTENT_TYPE_LATEST
    return generate_latest(registry), CONTENT_TYPE_PLAIN_0_0_4


Slots = Sequence[tuple[str, Slot]]
"""Each with its label, in their order."""


def describe() -> Iterator[tuple[str, str, str, str]]:
    """Every metric's name, type, labels and meaning, as docs/metrics.md lists them."""
    for about in ABOUT.values():
        total = "_total" if about.type is Type.COUNTER else ""
        name = about.name + total
        yield name, about.type.name.lower(), ", ".join(_labels(about)), about.meaning
    yield PROCESSES, "gauge", WORKER, OF_PROCESSES[PROCESSES]
    yield REPORTED, "gauge", WORKER, OF_PROCESSES[REPORTED]
    yield BUILD + "_info", "gauge", f"{WORKER}, version", OF_PROCESSES[BUILD]
    for name, meaning in FROM_SYSTEM.items():
        yield name, "gauge", WORKER, meaning


class _Host(Collector):
    def __init__(self, directory: Path | None, workers: int) -> None:
        self._directory = directory
        self._workers = workers

    def collect(self) -> Iterator[Metric]:
        if self._directory is None or not self._directory.is_dir():
            return  # Rather nothing than zeros: they would say that all workers are down.
        known = dict.fromkeys(range(self._workers), Slot({}, [])) | read(self._directory)
        slots = [(str(number), known[number]) for number in sorted(known)]
        for field, about in ABOUT.items():
            match about.type:
                case Type.GAUGE:
                    yield _gauge(field, about, slots)
                case Type.COUNTER:
                    yield _counter(field, about, slots)
                case Type.HISTOGRAM:
                    yield _histogram(field, about, slots)
        yield from _processes(slots)
        yield from _from_system(slots)


def _gauge(field: str, about: About, slots: Slots) -> Metric:
    family = GaugeMetricFamily(about.name, about.meaning, labels=[WORKER])
    for worker, slot in slots:
        told = [living.gauges[field] for living in slot.living if field in living.gauges]
        if told:
            family.add_metric([worker], about.together(told))
    return family


def _counter(field: str, about: About, slots: Slots) -> Metric:
    family = CounterMetricFamily(about.name, about.meaning, labels=_labels(about))
    for labels, number in _counted(field, about, slots):
        family.add_metric(labels, number or 0)
    return family


def _histogram(field: str, about: About, slots: Slots) -> Metric:
    family = HistogramMetricFamily(about.name, about.meaning, labels=_labels(about))
    ends = (*map(str, BOUNDS), "+Inf")
    for labels, histogram in _counted(field, about, slots):
        counts = histogram["counts"] if histogram else []
        if len(counts) != len(ends):  # Nothing yet, or the work of another release.
            counts = [0] * len(ends)
        buckets = list(zip(ends, accumulate(counts), strict=True))
        family.add_metric(labels, buckets, histogram["sum"] if histogram else 0.0)
    return family


def _labels(about: About) -> list[str]:
    return [WORKER, about.label] if about.label else [WORKER]


def _counted(field: str, about: About, slots: Slots) -> Iterator[tuple[list[str], Any]]:
    """Each series' labels, and what was counted of it; None where that is nothing."""
    for worker, slot in slots:
        counted = slot.counts.get(field)
        if not about.label:
            yield [worker], counted
            continue
        for value in about.values:
            yield [worker, value], counted.get(value) if counted else None


def _processes(slots: Slots) -> Iterable[Metric]:
    processes = GaugeMetricFamily(PROCESSES, OF_PROCESSES[PROCESSES], labels=[WORKER])
    reported = GaugeMetricFamily(REPORTED, OF_PROCESSES[REPORTED], labels=[WORKER])
    build = InfoMetricFamily(BUILD, OF_PROCESSES[BUILD], labels=[WORKER])
    for worker, slot in slots:
        processes.add_metric([worker], len(slot.living))
        if slot.living:
            # The one that is silent longest: the other one cannot speak for it.
            reported.add_metric([worker], min(living.at for living in slot.living))
        for version in sorted({living.version for living in slot.living}):
            build.add_metric([worker], {"version": version})
    return processes, reported, build


def _from_system(slots: Slots) -> Iterable[Metric]:
    families = {
        name: GaugeMetricFamily(name, meaning, labels=[WORKER])
        for name, meaning in FROM_SYSTEM.items()
    }
    for worker, slot in slots:
        seen = [_of_process(living) for living in slot.living]
        for name, family in families.items():
            values = [values[name] for values in seen if name in values]
            if values:
                family.add_metric([worker], max(values) if name in _ALONE else sum(values))
    return families.values()


def _of_process(living: Living) -> dict[str, float]:
    """Of a process that has ended a moment ago: nothing."""
    collector = ProcessCollector(pid=lambda: living.pid, registry=None)
    return {sample.name: sample.value for each in collector.collect() for sample in each.samples}

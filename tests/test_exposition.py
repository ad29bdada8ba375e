"""What Prometheus gets, as its own parser reads it."""

from __future__ import annotations

import os
import tomllib
from collections.abc import Iterable
from pathlib import Path

import pytest
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families

from chatserver import __version__
from chatserver.exposition import OPENMETRICS, describe, exposition
from chatserver.metrics import BOUNDS, Metrics
from chatserver.reports import Report, Reports

LABELS = {"worker", "outcome", "code", "kind", "lane", "version", "le"}


def parsed(directory: Path | None, workers: int = 2, accept: str = "") -> list[Metric]:
    text, kind = exposition(directory, workers, accept)
    if kind.startswith(OPENMETRICS):
        families = openmetrics.text_string_to_metric_families(text.decode())  # type: ignore[no-untyped-call]
        return list(families)
    assert kind.startswith("text/plain; version=0.0.4")
    return list(text_string_to_metric_families(text.decode()))


def value(families: Iterable[Metric], name: str, **labels: str) -> list[float]:
    """Of all samples of the name that have these labels."""
    return [
        sample.value
        for family in families
        for sample in family.samples
        if sample.name == name and labels.items() <= sample.labels.items()
    ]


@pytest.mark.parametrize("accept", ["", "*/*", "application/openmetrics-text;version=1.0.0,*/*"])
def test_every_metric_is_there_from_the_start_at_zero(tmp_path: Path, accept: str) -> None:
    """rate() of a series that begins with its first event would miss that event."""
    families = parsed(tmp_path, accept=accept)
    samples = [sample for family in families for sample in family.samples]

    assert value(families, "chatserver_deliveries_total") == [0, 0]
    assert value(families, "chatserver_closes_total", code="1006") == [0, 0]
    assert value(families, "chatserver_delivery_latency_seconds_count") == [0, 0]
    assert value(families, "chatserver_worker_processes") == [0, 0]
    assert value(families, "chatserver_connections") == []
    assert {label for sample in samples for label in sample.labels} <= LABELS


def test_the_numbers_of_a_slot_are_those_of_its_processes(tmp_path: Path) -> None:
    host = Reports(tmp_path)
    for connections, ready, confirmed in ((3, 0, 100.0), (4, 1, 200.0)):
        metrics = Metrics(
            connections=connections, ready=ready, mirror_confirmed_timestamp_seconds=confirmed
        )
        metrics.handshakes.count("accepted", 2)
        metrics.delivery_latency_seconds.observe(0.02)
        Report(host.begin(1)).write(metrics)
    families = parsed(tmp_path)

    assert value(families, "chatserver_connections", worker="1") == [7]
    assert value(families, "chatserver_ready", worker="1") == [1]
    assert value(families, "chatserver_mirror_confirmed_timestamp_seconds") == [100]
    assert value(families, "chatserver_handshakes_total", worker="1", outcome="accepted") == [4]
    assert value(families, "chatserver_worker_processes") == [0, 2]
    assert value(families, "chatserver_build_info") == [1]
    assert value(families, "chatserver_build_info", version=__version__) == [1]
    buckets = value(families, "chatserver_delivery_latency_seconds_bucket", worker="1")
    assert buckets == [0.0 if bound < 0.02 else 2.0 for bound in BOUNDS] + [2.0]
    assert value(families, "chatserver_delivery_latency_seconds_sum", worker="1") == [0.04]


def test_memory_and_descriptors_are_the_processes_own(tmp_path: Path) -> None:
    Report(Reports(tmp_path).begin(0)).write(Metrics())
    families = parsed(tmp_path, workers=1)

    [memory] = value(families, "process_resident_memory_bytes", worker="0")
    [descriptors] = value(families, "process_open_fds", worker="0")
    assert memory > 1_000_000
    assert descriptors == pytest.approx(len(os.listdir("/proc/self/fd")), abs=3)


def test_another_releases_numbers_that_mean_nothing_here_are_none(tmp_path: Path) -> None:
    host = Reports(tmp_path)
    metrics = Metrics(deliveries=5)
    metrics.delivery_latency_seconds.counts = [1, 2, 3]
    del metrics.closes["1006"]
    Report(host.begin(0)).write(metrics)
    families = parsed(tmp_path, workers=1)

    assert value(families, "chatserver_deliveries_total") == [5]
    assert value(families, "chatserver_delivery_latency_seconds_count") == [0]
    assert value(families, "chatserver_closes_total", code="1006") == [0]


def test_without_reports_there_is_nothing_to_show() -> None:
    assert parsed(None) == []


def test_of_a_directory_that_was_taken_away_nothing_is_shown(tmp_path: Path) -> None:
    assert parsed(tmp_path / "gone") == []


def test_everything_that_is_described_is_shown_and_the_reverse(tmp_path: Path) -> None:
    Report(Reports(tmp_path).begin(0)).write(Metrics())
    shown = {}
    for family in parsed(tmp_path, workers=1):
        name = family.name + ("_total" if family.type == "counter" else "")
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        shown[name] = (family.type, labels, family.documentation)
    described = {
        name: (kind, set(labels.split(", ")), meaning) for name, kind, labels, meaning in describe()
    }

    assert shown == described


def test_the_release_that_is_told_is_the_packages() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]

    assert project["version"] == __version__

"""The files in which workers tell what they count: whole, added up once, gone when they should."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path
from typing import Any

import orjson
import pytest

from chatserver import reports
from chatserver.metrics import Metrics
from chatserver.reports import Report, Reports, add, read


def counted(deliveries: int, connections: int = 0) -> Metrics:
    metrics = Metrics()
    metrics.deliveries = deliveries
    metrics.connections = connections
    metrics.closes.count("1000", deliveries)
    metrics.delivery_latency_seconds.observe(0.5, deliveries)
    metrics.store_round_trip_seconds["poll"].observe(2.0, deliveries)
    return metrics


def deliveries(directory: Path) -> dict[int, int]:
    return {slot: found.counts["deliveries"] for slot, found in read(directory).items()}


def test_what_is_reported_is_read_back(tmp_path: Path) -> None:
    path = Reports(tmp_path).begin(3)
    Report(path).write(counted(2, connections=7))

    [(slot, found)] = read(tmp_path).items()
    assert slot == 3
    assert found.counts["closes"]["1000"] == 2
    assert found.counts["delivery_latency_seconds"]["sum"] == 1.0
    assert sum(found.counts["store_round_trip_seconds"]["poll"]["counts"]) == 2
    [living] = found.living
    assert living.pid == os.getpid()
    assert living.gauges["connections"] == 7
    assert "connections" not in found.counts


def test_counters_outlive_a_process_and_gauges_do_not(tmp_path: Path) -> None:
    host = Reports(tmp_path)
    first, second = host.begin(0), host.begin(0)
    Report(first).write(counted(2, connections=7))
    Report(second).write(counted(3, connections=1))
    together = read(tmp_path)[0]
    host.retire(first)
    after = read(tmp_path)[0]
    host.retire(second)
    empty = read(tmp_path)[0]

    assert together.counts == after.counts == empty.counts
    assert after.counts["deliveries"] == 5
    assert after.counts["delivery_latency_seconds"]["sum"] == 2.5
    assert [living.gauges["connections"] for living in after.living] == [1]
    assert empty.living == []
    assert [path.name for path in tmp_path.iterdir()] == [reports.ENDED]


def test_slots_are_kept_apart(tmp_path: Path) -> None:
    host = Reports(tmp_path)
    paths = [host.begin(slot) for slot in (0, 1, 0, 1)]
    for number, path in enumerate(paths):
        Report(path).write(counted(10**number))
    host.retire(paths[0])
    host.retire(paths[1])

    assert deliveries(tmp_path) == {0: 101, 1: 1010}


def test_one_that_died_before_its_first_report_leaves_nothing(tmp_path: Path) -> None:
    host = Reports(tmp_path)
    path = host.begin(0)
    (tmp_path / "0-1.new").write_bytes(b'{"half')
    assert read(tmp_path) == {}
    host.retire(path)

    assert list(tmp_path.iterdir()) == []


def test_a_reader_counts_everything_once_while_processes_come_and_go(tmp_path: Path) -> None:
    """Each of them counts one, and is there before the last is gone. Until it has been read a few
    times, and three hundred of them at least."""
    host = Reports(tmp_path)
    seen: list[int] = []
    over = threading.Event()

    def watch() -> None:
        while not over.is_set():
            found = read(tmp_path)
            if found:
                seen.append(found[0].counts["deliveries"])

    watcher = threading.Thread(target=watch)
    watcher.start()
    last = host.begin(0)
    Report(last).write(counted(1))
    processes = 1
    while processes <= 300 or len(seen) <= 10:
        processes += 1
        following = host.begin(0)
        Report(following).write(counted(1))
        host.retire(last)
        last = following
    over.set()
    watcher.join()

    assert seen == sorted(seen)
    assert seen[-1] <= processes
    assert deliveries(tmp_path) == {0: processes}


@pytest.mark.parametrize(
    ("one", "other", "both"),
    [
        ({"a": 1}, {"b": 2.5}, {"a": 1, "b": 2.5}),
        ({"a": {"x": 1}}, {"a": {"x": 2, "y": 3}}, {"a": {"x": 3, "y": 3}}),
        ([1, 2], [3, 4], [4, 6]),
        ([1, 2], [3, 4, 5], [3, 4, 5]),
        ({"a": 1}, {"a": {"x": 1}}, {"a": {"x": 1}}),
    ],
    ids=["apart", "nested", "buckets", "other-buckets", "other-shape"],
)
def test_numbers_of_any_release_add_up(one: Any, other: Any, both: Any) -> None:
    assert add(one, other) == both


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'"x"', b"{}"])
def test_what_is_no_report_is_passed_over(tmp_path: Path, content: bytes) -> None:
    """The supervisor must outlive whatever a release to come may write."""
    host = Reports(tmp_path)
    path = host.begin(0)
    path.write_bytes(content)
    host.retire(path)

    assert read(tmp_path).get(0, reports.Slot({}, [])) == reports.Slot({}, [])


def test_a_directory_that_cannot_be_written_to_stops_nobody(tmp_path: Path) -> None:
    Report(tmp_path / "gone" / "0-1").write(counted(1))
    Reports(tmp_path / "gone").retire(tmp_path / "gone" / "0-1")


def test_the_directory_is_private_and_goes_with_the_host() -> None:
    with reports.kept() as host:
        assert host is not None
        directory = host.directory
        Report(host.begin(0)).write(counted(1))
        assert directory.stat().st_mode & 0o077 == 0

    assert not directory.exists()


def test_what_a_killed_host_left_is_removed_and_what_is_in_use_is_not(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reports, "MEMORY", tmp_path)
    long_ago = time.time() - 2 * reports.LEFT_SECONDS
    for name in ("chatserver-metrics-left", "chatserver-metrics-used", "another"):
        (tmp_path / name).mkdir()
        Report(tmp_path / name / "0-1").write(counted(1))
        os.utime(tmp_path / name, (long_ago, long_ago))
    (tmp_path / "chatserver-metrics-link").symlink_to(tmp_path / "another")
    Report(tmp_path / "chatserver-metrics-used" / "0-1").write(counted(2))
    with reports.kept():
        pass

    there = sorted(path.name for path in tmp_path.iterdir())
    assert there == ["another", "chatserver-metrics-link", "chatserver-metrics-used"]
    assert (tmp_path / "another" / "0-1").exists()


def test_a_host_without_a_place_for_files_serves_on(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(reports, "MEMORY", tmp_path / "none")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "neither"))
    with reports.kept() as host:
        assert host is None


def test_a_report_is_small(tmp_path: Path) -> None:
    assert len(orjson.dumps(counted(10**12).report())) < 8000

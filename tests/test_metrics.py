"""What is counted, and under which names: nothing that somebody outside could make more of."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from chatserver.core.frames import message_parts, taken_at
from chatserver.metrics import ABOUT, BOUNDS, CLOSES, OTHER, REFUSALS, Histogram, Metrics, Tally

PROTOCOL = (Path(__file__).parents[1] / "docs" / "protocol.md").read_text()


def test_a_value_that_is_not_listed_counts_as_other() -> None:
    tally = Tally(("a", "b"))
    for value in ("a", "a", "b", "c", "", "user-1", OTHER):
        tally.count(value)

    assert tally == {"a": 2, "b": 1, OTHER: 4}


@pytest.mark.parametrize(
    ("seconds", "bucket"),
    [(0.0, 0), (0.0001, 0), (0.00011, 1), (0.001, 3), (10.0, 15), (10.1, 16), (1e9, 16)],
)
def test_a_time_falls_into_the_first_bucket_that_holds_it(seconds: float, bucket: int) -> None:
    histogram = Histogram()
    histogram.observe(seconds, 3)

    assert [place for place, count in enumerate(histogram.counts) if count] == [bucket]
    assert histogram.counts[bucket] == 3
    assert histogram.sum == 3 * seconds


def test_a_clock_that_is_ahead_takes_nothing_away() -> None:
    histogram = Histogram()
    histogram.observe(-0.5)

    assert (histogram.counts[0], histogram.sum) == (1, 0.0)


def test_bounds_ascend() -> None:
    assert list(BOUNDS) == sorted(set(BOUNDS))


def test_nothing_is_labelled_by_room_user_session_or_connection() -> None:
    assert {about.label for about in ABOUT.values()} == {"", "outcome", "code", "kind", "lane"}


def test_names_and_units_are_as_prometheus_has_them() -> None:
    for about in ABOUT.values():
        assert re.fullmatch(r"(chatserver|process)(_[a-z]+)+", about.name)
        assert not re.search(r"_(total|count|sum|bucket|ms|milliseconds|kb|info)$", about.name)
        assert about.meaning.endswith(".")


def test_two_processes_count_apart() -> None:
    one, other = Metrics(), Metrics()
    one.closes.count("1000")
    one.delivery_latency_seconds.observe(1.0)
    one.store_round_trip_seconds["publish"].observe(1.0)

    assert other == Metrics()
    assert one != other


def test_every_code_of_the_protocol_has_its_series() -> None:
    connecting = PROTOCOL.partition("## Connecting")[2].partition("## Commands")[0]
    rows = re.findall(r"^\| (?:[45]\d\d )?\| (.*?) \|", connecting, re.MULTILINE)
    refusals = set(re.findall(r"`(\w+)`", " ".join(rows)))
    the_end = PROTOCOL.partition("## The end, and coming back")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| (\d{4}) \|(.*)", the_end, re.MULTILINE)
    codes = {code for code, meaning in rows if "reserved" not in meaning}

    assert {"token_missing", "draining"} <= refusals <= set(REFUSALS)
    assert {"1012", "4503"} <= codes <= set(CLOSES)


def test_an_event_tells_when_the_store_took_it_whatever_its_sender_writes() -> None:
    fake = b'{"x":",\\"offset\\":1,\\"ts\\":5,"}'
    head, tail = message_parts("r", '","offset":1,"ts":7,', fake, None)  # type: ignore[arg-type]

    assert taken_at(head + b'12,"ts":1760000001234' + tail) == 1760000001.234
    assert taken_at(head + b"12" + tail) is None

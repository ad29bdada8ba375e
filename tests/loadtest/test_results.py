"""Samples of several processes put together, what is required of them, and what is said."""

from __future__ import annotations

import json
import re
from collections import Counter
from typing import Any

import pytest

from load import page, report
from load.advice import notices
from load.agenda import SECOND
from load.histogram import Histogram
from load.options import parse
from load.results import Results
from load.tally import Sample

WORDS = ("fanout", "--clients", "10", "--processes", "2")


def results(*samples: Sample, words: tuple[str, ...] = WORDS) -> Results:
    found = Results(parse(words), 0)
    for sample in samples:
        found.add(sample)
    found.finish()
    return found


def sample(second: int = 1, process: int = 0, phase: str = "load", **what: Any) -> Sample:
    """One that ends on the stroke of a second; ``lag`` and ``delivery`` in ms."""
    return Sample(
        process,
        phase,
        second * SECOND,
        what.get("seconds", 1.0),
        what.get("cpu", 0.1),
        what.get("connected", 5),
        Counter(what.get("counts", {})),
        {
            name: Histogram(int(1000 * ms) for ms in what[name])
            for name in ("lag", "delivery")
            if name in what
        },
    )


def test_processes_add_up_second_by_second() -> None:
    found = results(
        sample(1, 0, counts={"sends": 10}, delivery=[1, 2]),
        sample(1, 1, counts={"sends": 30, "closed_1012": 2}, delivery=[3, 4]),
        sample(2, 0, counts={"sends": 20}, cpu=0.5),
        sample(2, 1, connected=4),
    )

    first, second = found.seconds
    assert (first.rates, first.connected) == ({"sends": 40, "closed": 2}, 10)
    assert (second.rates, second.connected, second.cpu) == ({"sends": 20}, 9, 0.5)
    assert (first.p50["delivery"], first.p99["delivery"]) == (2, 4)
    assert found.per_second("sends") == 30
    assert found.value("sends_per_second") == 30


def test_one_of_a_kind_is_said_as_one() -> None:
    many = parse(("fanout", "--clients", "1000", "--rooms", "2", "--processes", "2"))
    one = parse(("fanout", "--clients", "1", "--publishers", "1", "--processes", "1"))

    assert report.describe(many).startswith("1,000 clients, 2 rooms, 2 publishers, ")
    assert ", from 2 processes; " in report.describe(many)
    assert report.describe(one).startswith("1 client, 1 room, 1 publisher, ")
    assert ", from 1 process; " in report.describe(one)


def test_a_rate_is_of_the_load_and_not_of_the_ramp() -> None:
    found = results(
        sample(1, phase="ramp", counts={"connects": 50}),
        sample(2, counts={"sends": 10}),
        sample(3, phase="settle", counts={"sends": 100}),
    )

    assert (found.per_second("sends"), found.per_second("connects")) == (10, 50)


@pytest.mark.parametrize(
    ("required", "value", "met"),
    [
        ("delivery_p99<200", 198.015, True),
        ("delivery_max<200", 200, False),
        ("delivery_count==200", 200, True),
        ("history_p50<1", None, False),
        ("lost==0", 0, True),
        ("closed==3", 3, True),
        ("closed_4430==1", 1, True),
        ("cpu<50", 10, True),
    ],
)
def test_requirements_are_held_against_the_figures(
    required: str, value: float | None, met: bool
) -> None:
    found = results(
        sample(
            delivery=range(1, 201),
            counts={"closed_4430": 1, "closed_1012": 2, "lost": 0},
        ),
        words=(*WORDS, "--require", required),
    )

    (verdict,) = found.verdicts()
    assert verdict.met is met
    assert verdict.value == value


BOTTLENECK = "The load test itself was the bottleneck"


@pytest.mark.parametrize(
    ("cpu", "lag", "said"),
    [
        (0.5, 5.0, ""),
        (0.95, 5.0, "Give it more --processes"),
        (0.2, 80.0, "Others had the processor"),
    ],
)
@pytest.mark.parametrize("phase", ["ramp", "load"])
def test_a_load_test_that_was_itself_the_bottleneck_says_so(
    phase: str, cpu: float, lag: float, said: str
) -> None:
    quiet = sample(1, 0, phase, lag=[1.0] * 100)
    said_of = notices(results(quiet, sample(1, 1, phase, cpu=cpu, lag=[1.0] * 90 + [lag] * 10)))

    assert [BOTTLENECK in notice and said in notice for notice in said_of] == [True] * bool(said)
    assert not said or f"process 2 took {cpu:.0%} of a core in the {phase}" in said_of[0]


def test_what_happens_while_it_settles_is_nobodys_bottleneck() -> None:
    assert not notices(results(sample(phase="settle", cpu=1.0, lag=[500.0])))


@pytest.mark.parametrize(
    ("counted", "setting"),
    [
        ("refused_429_rate_limited", "CHATSERVER_HANDSHAKE_RATE"),
        ("refused_429_too_many_connections", "CHATSERVER_USER_CONNECTIONS"),
        ("refused_401_token_invalid", "CHATSERVER_SECRET"),
        ("error_rate_limited", "CHATSERVER_SEND_RATE"),
        ("error_room_limit", "CHATSERVER_ROOMS"),
        ("closed_4430", "CHATSERVER_SLOW_SECONDS"),
        ("closed_4505", "CHATSERVER_USER_CONNECTIONS"),
        ("unrecovered", "CHATSERVER_HISTORY"),
        ("overdue", "--grace"),
    ],
)
def test_a_limit_that_was_hit_is_named(counted: str, setting: str) -> None:
    (notice,) = notices(results(sample(counts={counted: 3, "connects": 11})))

    assert setting in notice


def test_a_revoked_session_is_no_reason_for_advice() -> None:
    assert not notices(results(sample(counts={"closed_4503": 3, "connects": 11})))


def test_only_seconds_of_which_everyone_told_are_shown_while_it_runs() -> None:
    found = Results(parse(WORDS), 0)
    found.add(sample(1, 0, counts={"sends": 10}))
    assert found.latest() is None

    found.add(sample(1, 1, counts={"sends": 10}, delivery=[7]))
    found.add(sample(2, 0))
    line = report.progress_line("loading", found, found.latest())

    assert "20 sends/s" in line
    assert "p99 7.0 ms" in line
    assert "10/11 connected" in line


RICH = (
    sample(1, 0, "ramp", counts={"connects": 11, "refused_<b>&": 1}),
    sample(2, 0, counts={"sends": 4, "lost": 1}, delivery=[0.5, 3, 700], lag=[1]),
    sample(4, 0, counts={"acks": 4}),
)


def test_the_table_has_faults_even_where_there_are_none() -> None:
    text = report.text(results(*RICH))

    assert re.search(r"^doubled +0 +0\.0$", text, re.MULTILINE)
    assert re.search(r"^send, until each delivery +3\.00 .* 700\.00 +3$", text, re.MULTILINE)
    assert "Events were lost." in text


def test_json_has_everything() -> None:
    found = json.loads(json.dumps(report.as_json(results(*RICH))))

    assert found["counts"]["lost"] == 1
    assert found["latencies"]["delivery"]["curve"][-1] == [100, 700]
    assert [second["at"] for second in found["seconds"]] == [0, 1, 3]


def test_the_page_needs_nothing_from_elsewhere_and_escapes_what_it_shows() -> None:
    text = page.html(results(*RICH, words=(*WORDS, "--url", "ws://127.0.0.1/<script>&")))

    assert "<script" not in text
    assert "&lt;script&gt;&amp;" in text
    assert "&lt;b&gt;&amp;" in text
    assert not re.search(r"(src|href)=|url\(|@import|https?://", text)
    assert "prefers-color-scheme: dark" in text
    assert text.count("<svg") == text.count("</svg>") >= 5
    assert "nan" not in text


def test_a_page_can_be_made_of_nothing() -> None:
    assert "</html>" in page.html(results())

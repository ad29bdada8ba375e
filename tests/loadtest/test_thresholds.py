"""What may be required, and when it is met."""

from __future__ import annotations

import pytest

from load.tally import COUNTS, Measure
from load.thresholds import Requirement, parse_requirement


@pytest.mark.parametrize(
    ("text", "parsed"),
    [
        ("delivery_p99<200", Requirement("delivery_p99", "<", 200)),
        (" ack_p99.9 <= 12.5 ", Requirement("ack_p99.9", "<=", 12.5)),
        ("revocation_max<250", Requirement("revocation_max", "<", 250)),
        ("late_delivery_mean<5", Requirement("late_delivery_mean", "<", 5)),
        ("lost==0", Requirement("lost", "==", 0)),
        ("refused_429!=0", Requirement("refused_429", "!=", 0)),
        ("deliveries_per_second>10000", Requirement("deliveries_per_second", ">", 10_000)),
        ("cpu<80", Requirement("cpu", "<", 80)),
    ],
)
def test_a_requirement_has_a_name_a_comparison_and_a_number(text: str, parsed: Requirement) -> None:
    assert parse_requirement(text) == parsed


@pytest.mark.parametrize("name", [*COUNTS, *(f"{measure}_p50" for measure in Measure)])
def test_everything_counted_or_timed_can_be_required(name: str) -> None:
    assert parse_requirement(f"{name}>=1").name == name


@pytest.mark.parametrize("text", ["", "lost", "lost=0", "lost<", "lost<x", "<5", "lost==0 or 1"])
def test_what_is_no_requirement_is_told_how_one_looks(text: str) -> None:
    with pytest.raises(ValueError, match="is not like 'delivery_p99<200'"):
        parse_requirement(text)


@pytest.mark.parametrize("name", ["delivery", "delivery_p100", "delivery_median", "losses", "p99"])
def test_a_name_that_means_nothing_is_told_what_there_is(name: str) -> None:
    with pytest.raises(ValueError, match=r"there is no .*delivery_p99.*, lost,"):
        parse_requirement(f"{name}<1")


@pytest.mark.parametrize(
    ("comparison", "met"),
    [("<", [1]), ("<=", [1, 2]), ("==", [2]), ("!=", [1, 3]), (">=", [2, 3]), (">", [3])],
)
def test_comparisons(comparison: str, met: list[int]) -> None:
    requirement = Requirement("lost", comparison, 2)

    assert [value for value in (1, 2, 3) if requirement.met_by(value)] == met


def test_what_was_not_measured_meets_nothing() -> None:
    assert not Requirement("history_p99", "<", 1000).met_by(None)

"""The histogram against the values themselves."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from load.histogram import Histogram

VALUES = st.lists(st.integers(0, 10**10), min_size=1, max_size=200)
PERCENTS = (0, 1, 50, 90, 99, 99.9, 100)


@given(VALUES)
def test_a_percentile_is_never_too_low_and_at_most_a_thousandth_too_high(values: list[int]) -> None:
    ordered = sorted(values)

    for percent, found in zip(PERCENTS, Histogram(values).percentiles(*PERCENTS), strict=True):
        exact = ordered[max(1, math.ceil(percent * len(values) / 100 - 1e-9)) - 1]
        assert exact <= found <= exact * (1 + 1 / 1024)


@given(VALUES, VALUES)
def test_what_is_added_up_is_as_if_it_had_been_recorded_in_one(
    some: list[int], others: list[int]
) -> None:
    added, whole = Histogram(some), Histogram([*some, *others])
    added.add(Histogram(others))

    assert added.percentiles(*PERCENTS) == whole.percentiles(*PERCENTS)
    assert (added.count, added.highest, added.mean) == (whole.count, whole.highest, whole.mean)


def test_the_999th_of_a_thousand_is_their_p99_9() -> None:
    assert Histogram(range(1, 1001)).percentiles(50, 99, 99.9, 100) == [500, 990, 999, 1000]


def test_hours_fit_into_a_few_thousand_counters() -> None:
    histogram = Histogram(range(0, 4 * 3_600_000_000, 100_000))

    assert len(histogram._counts) < 20_000


def test_nothing_recorded_is_nought() -> None:
    assert Histogram().percentiles(50, 99) == [0, 0]
    assert Histogram().mean == 0


@pytest.mark.parametrize(("count", "last"), [(50, 95), (100, 99), (10_000, 99.99)])
def test_a_curve_ends_where_there_are_no_values_to_tell_of(count: int, last: float) -> None:
    curve = Histogram(range(count)).curve()

    assert [percent for percent, _ in curve][-2:] == [last, 100]
    assert curve[-1][1] == count - 1


def test_a_clock_that_ran_backwards_is_no_time() -> None:
    assert Histogram([-5]).percentiles(100) == [0]

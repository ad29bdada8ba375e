"""What the offsets of a room say."""

from __future__ import annotations

from collections import Counter

import pytest

from load.positions import Position


def taken(*offsets: int, last: int = 0) -> Counter[str]:
    """What a member counts that gets these after ``last``, without what is nought."""
    position, counts = Position("e", last), Counter[str]()
    for offset in offsets:
        position.take(offset, offset, counts)
    return +counts


@pytest.mark.parametrize(
    ("offsets", "counted"),
    [
        ((1, 2, 3), {}),
        ((1, 4), {"lost": 2}),
        ((1, 2, 2, 3), {"doubled": 1}),
        ((1, 3, 2, 4), {"reordered": 1}),
        ((2, 1, 1), {"reordered": 1, "doubled": 1}),
        ((3, 2), {"lost": 1, "reordered": 1}),
        ((1, 5, 2, 2, 1), {"lost": 2, "reordered": 1, "doubled": 2}),
    ],
)
def test_a_hole_is_lost_a_repetition_doubled_and_a_late_one_reordered(
    offsets: tuple[int, ...], counted: dict[str, int]
) -> None:
    assert taken(*offsets) == counted


def test_a_run_of_events_counts_as_each_of_them() -> None:
    position, counts = Position("e", 10), Counter[str]()
    position.take(11, 15, counts)
    position.take(14, 18, counts)
    position.take(21, 22, counts)

    assert position.last == 22
    assert +counts == {"doubled": 2, "lost": 2}


@pytest.mark.parametrize(
    ("start", "recovered", "gap", "counted"),
    [
        (7, True, 0, {"recovered": 1}),
        (9, True, 0, {"recovered": 1, "lost": 2}),
        (4, True, 0, {"recovered": 1, "doubled": 3}),
        (20, False, 13, {"unrecovered": 1, "told_gap": 13}),
    ],
)
def test_a_proof_that_nothing_is_missing_must_go_on_where_the_member_was(
    start: int, recovered: bool, gap: int, counted: dict[str, int]
) -> None:
    position, counts = Position("e", 7), Counter[str]()
    position.rejoin("f", start, recovered, gap, counts)

    assert +counts == counted
    assert (position.epoch, position.last) == ("f", start)


def test_after_a_reset_the_offsets_of_before_mean_nothing() -> None:
    position, counts = Position("e", 0), Counter[str]()
    position.take(5, 5, counts)
    position.reset("f", 2)
    position.take(3, 4, counts)

    assert +counts == {"lost": 4}

from __future__ import annotations

import heapq
from collections import deque
from itertools import count

import pytest
from hypothesis import given
from hypothesis import strategies as st

from chatserver.core.flow import (
    FLOOD_HARD,
    FLOOD_PAUSE,
    FLOOD_REFUSALS,
    FLOOD_SECONDS,
    LONGEST_WAIT,
    Admission,
    Budget,
    Budgets,
    Limits,
    Patience,
    Verdict,
    judge_reader,
)

# --- limits --------------------------------------------------------------------------------


def test_the_default_burst_allows_rejoining_every_room_at_once() -> None:
    limits = Limits()

    assert limits.command_burst >= limits.rooms


# --- budgets -------------------------------------------------------------------------------


def test_a_budget_gives_its_burst_at_once_and_nothing_more() -> None:
    budget = Budget(10.0, 3, 100.0)

    waits = [budget.spend(100.0) for _ in range(4)]

    assert waits[:3] == [0.0, 0.0, 0.0]
    assert waits[3] == pytest.approx(0.1)


def test_a_refused_spend_takes_nothing() -> None:
    budget = Budget(8.0, 1, 100.0)
    budget.spend(100.0)

    waits = [budget.spend(100.0) for _ in range(3)]

    assert waits == [0.125, 0.125, 0.125]
    assert budget.spend(100.125) == 0.0


def test_a_budget_refills_at_its_rate() -> None:
    budget = Budget(2.0, 5, 100.0)
    for _ in range(5):
        budget.spend(100.0)

    waits = [budget.spend(101.0) for _ in range(3)]

    assert waits[:2] == [0.0, 0.0]
    assert waits[2] == pytest.approx(0.5)


def test_a_long_silence_saves_up_no_more_than_the_burst() -> None:
    budget = Budget(10.0, 3, 100.0)

    granted = [budget.spend(1_000_000.0) == 0.0 for _ in range(5)]

    assert granted == [True, True, True, False, False]


def test_a_clock_that_steps_back_takes_no_budget_away() -> None:
    budget = Budget(1.0, 2, 100.0)
    budget.spend(100.0)

    assert budget.spend(40.0) == 0.0
    assert budget.spend(40.0) == pytest.approx(1.0)
    assert budget.spend(41.0) == 0.0


@given(
    rate=st.floats(0.1, 100.0),
    burst=st.integers(1, 50),
    pauses=st.lists(st.floats(0.0, 5.0), min_size=1, max_size=80),
)
def test_no_stretch_of_time_gets_more_than_burst_and_rate(
    rate: float, burst: int, pauses: list[float]
) -> None:
    now = 1000.0
    budget = Budget(rate, burst, now)
    granted: list[float] = []
    for pause in pauses:
        now += pause
        if budget.spend(now) == 0.0:
            granted.append(now)

    for first, begin in enumerate(granted):
        for last, end in enumerate(granted[first:], first):
            assert last - first + 1 <= burst + rate * (end - begin) + 1e-6


@given(
    rate=st.floats(0.1, 100.0),
    burst=st.integers(1, 50),
    pauses=st.lists(st.floats(0.0, 1.0), min_size=1, max_size=80),
)
def test_whoever_waits_as_long_as_told_is_served(
    rate: float, burst: int, pauses: list[float]
) -> None:
    now = 1000.0
    budget = Budget(rate, burst, now)
    for pause in pauses:
        now += pause
        wait = budget.spend(now)

        assert 0.0 <= wait <= 1.0 / rate
        if wait:
            now += wait + 0.001
            assert budget.spend(now) == 0.0


# --- admission -----------------------------------------------------------------------------


def turns(admission: Admission, now: float) -> int:
    """How many there are at this moment."""
    return sum(iter(lambda: admission.turn(now), False))


def line(admission: Admission, now: float) -> int:
    """So many come at once, until one is refused."""
    return next(waiting for waiting in count() if not admission.admits(waiting, now))


@pytest.mark.parametrize("now", [100.0, 105.0, 1e9])
def test_after_a_quiet_time_the_turns_of_a_burst_are_there(now: float) -> None:
    admission = Admission(8.0, burst=0.25, patience=1.0)
    line(admission, 100.0)

    assert admission.admits(0, now)
    assert turns(admission, now) == 3


def test_turns_come_at_the_rate() -> None:
    admission = Admission(8.0, burst=0.0, patience=1.0)
    line(admission, 100.0)

    there = [turns(admission, now) for now in (100.0, 100.1, 100.125, 100.3, 100.5)]

    assert there == [1, 0, 1, 1, 2]


def test_what_a_busy_loop_has_missed_is_made_up_for() -> None:
    admission = Admission(8.0, burst=0.0, patience=1.0)
    waiting = line(admission, 100.0)

    assert admission.admits(waiting, 101.0)
    assert turns(admission, 101.0) == 9


def test_who_would_wait_too_long_is_refused() -> None:
    admission = Admission(8.0, burst=0.0, patience=0.5)

    assert line(admission, 100.0) == 5
    assert admission.turn(100.125)
    assert [admission.admits(waiting, 100.125) for waiting in (3, 4, 5)] == [True, True, False]


def test_who_leaves_lets_those_behind_move_up() -> None:
    admission = Admission(1.0, burst=0.0, patience=3.0)
    waiting = line(admission, 100.0)

    assert not admission.admits(waiting, 100.0)
    assert admission.admits(1, 100.0)
    assert turns(admission, 101.0) == 2


def test_those_refused_come_back_one_by_one_behind_those_who_wait() -> None:
    admission = Admission(10.0, burst=0.0, patience=0.35)
    waiting = line(admission, 100.0)

    waits = [admission.come_back(waiting, 100.0) for _ in range(3)]

    assert waits == pytest.approx([0.4, 0.5, 0.6])
    assert admission.come_back(waiting, 100.2) == pytest.approx(0.5)


def test_nobody_is_sent_away_for_longer_than_a_minute() -> None:
    admission = Admission(1.0, burst=0.0, patience=2.0)
    waiting = line(admission, 100.0)

    waits = [admission.come_back(waiting, 100.0) for _ in range(1000)]

    assert waits[0] == 3.0
    assert max(waits) == LONGEST_WAIT


def test_a_storm_is_served_at_the_rate_and_each_is_refused_once_at_most() -> None:
    """Ten thousand at once, a thousand a second: ten seconds."""
    admission = Admission(1000.0, burst=0.005, patience=2.5)
    coming = [(100.0, number) for number in range(10_000)]
    waiting = 0
    served: list[float] = []
    refusals: dict[int, int] = {}

    for tick in range(2200):
        now = 100.0 + tick * 0.005
        while coming and coming[0][0] <= now:
            _, number = heapq.heappop(coming)
            if admission.admits(waiting, now):
                waiting += 1
            else:
                refusals[number] = refusals.get(number, 0) + 1
                heapq.heappush(coming, (now + admission.come_back(waiting, now), number))
        while waiting and admission.turn(now):
            waiting -= 1
            served.append(now)

    assert len(served) == 10_000
    assert max(served) == pytest.approx(110.0, abs=0.1)
    assert len(refusals) == pytest.approx(7500, abs=10)
    assert set(refusals.values()) == {1}


@given(
    st.floats(0.1, 1e4),
    st.floats(0.0, 5.0),
    st.lists(st.floats(0.0, 5.0), min_size=1, max_size=50),
)
def test_whoever_is_admitted_has_its_turn_within_the_patience(
    rate: float, patience: float, gaps: list[float]
) -> None:
    admission = Admission(rate, burst=0.005, patience=patience)
    now, until = 100.0, deque[float]()

    for gap in gaps:
        now += gap
        while until and admission.turn(now):
            until.popleft()
        assert not until or until[0] >= now - 1e-6
        if admission.admits(len(until), now):
            until.append(now + patience)
        else:
            assert 0.0 <= admission.come_back(len(until), now) <= LONGEST_WAIT


# --- patience ------------------------------------------------------------------------------


def test_a_burst_of_a_thousand_refusals_is_borne() -> None:
    patience = Patience()

    verdicts = {patience.refused(100.0) for _ in range(1000)}

    assert verdicts == {Verdict.BEAR}


def test_twice_as_many_at_once_are_a_flood() -> None:
    patience = Patience()

    verdicts = [patience.refused(100.0) for _ in range(FLOOD_HARD)]

    assert verdicts == [Verdict.BEAR] * (FLOOD_HARD - 1) + [Verdict.DISCONNECT]


def test_refusals_that_go_on_for_five_seconds_are_a_flood() -> None:
    patience = Patience()

    verdicts = [patience.refused(100.0 + tick / 32) for tick in range(161)]

    assert verdicts[:160] == [Verdict.BEAR] * 160
    assert verdicts[160] is Verdict.DISCONNECT
    assert FLOOD_SECONDS == 160 / 32


def test_few_refusals_are_borne_however_long_they_go_on() -> None:
    patience = Patience()

    verdicts = [patience.refused(100.0 + tick) for tick in range(FLOOD_REFUSALS)]

    assert verdicts == [Verdict.BEAR] * (FLOOD_REFUSALS - 1) + [Verdict.DISCONNECT]


def test_a_pause_is_forgiveness() -> None:
    patience = Patience()
    for _ in range(FLOOD_HARD - 1):
        patience.refused(100.0)

    after_pause = patience.refused(100.0 + FLOOD_PAUSE + 0.1)

    assert after_pause is Verdict.BEAR
    assert patience.refused(100.0 + FLOOD_PAUSE + 0.1) is Verdict.BEAR


def test_a_clock_that_steps_back_is_no_flood() -> None:
    patience = Patience()
    for _ in range(FLOOD_HARD - 1):
        patience.refused(100.0)

    assert patience.refused(50.0) is Verdict.BEAR


# --- budgets by name -----------------------------------------------------------------------


def test_each_name_has_a_budget_of_its_own() -> None:
    budgets = Budgets(1.0, 2)

    waits = [budgets.spend(name, 100.0) for name in ("a", "a", "a", "b")]

    assert waits == [0.0, 0.0, 1.0, 0.0]


def test_of_too_many_names_the_one_used_longest_ago_is_forgotten() -> None:
    budgets = Budgets(1.0, 1, most=2)
    for name in ("a", "b", "a", "c"):
        budgets.spend(name, 100.0)

    assert budgets.spend("a", 100.0) == 1.0
    assert budgets.spend("b", 100.0) == 0.0


@pytest.mark.parametrize(
    ("missing", "behind_for", "verdict"),
    [
        (0, 0.0, Verdict.BEAR),
        (0, 30.0, Verdict.BEAR),
        (0, 30.1, Verdict.DISCONNECT),
        (1, 0.0, Verdict.DISCONNECT),
        (-5, 1.0, Verdict.BEAR),
    ],
)
def test_a_slow_reader_is_borne_while_the_log_has_what_it_needs_and_for_so_long(
    missing: int, behind_for: float, verdict: Verdict
) -> None:
    assert judge_reader(missing=missing, behind_for=behind_for, slow_seconds=30.0) is verdict

from __future__ import annotations

import pytest

from chatserver.client.pace import Pace
from chatserver.client.pulse import Pulse, Verdict


def test_a_burst_goes_at_once_and_the_rest_at_the_rate() -> None:
    pace = Pace(rate=10, burst=3, now=0)
    for _ in range(3):
        assert pace.wait(0) == 0
        pace.take()

    assert pace.wait(0) == pytest.approx(0.1)
    assert pace.wait(0.05) == pytest.approx(0.05)
    assert pace.wait(0.11) == 0


def test_no_more_than_a_burst_is_saved_and_a_clock_that_steps_back_takes_nothing() -> None:
    pace = Pace(rate=10, burst=2, now=0)
    pace.take()
    assert pace.wait(-50) == 0
    pace.wait(1000)
    pace.take()
    pace.take()

    assert pace.wait(1000) == pytest.approx(0.1)


def test_silence_a_little_longer_than_the_servers_interval_is_asked_about() -> None:
    pulse = Pulse(interval=25, patience=10)

    assert pulse.judge(0, None, 29.9) is Verdict.ALIVE
    assert pulse.wake_at(0, None) == 30
    assert pulse.judge(0, None, 30) is Verdict.PROBE
    assert pulse.wake_at(0, 30) == 40
    assert pulse.judge(0, 30, 39.9) is Verdict.ALIVE
    assert pulse.judge(0, 30, 40) is Verdict.DEAD


def test_any_byte_is_a_sign_of_life() -> None:
    pulse = Pulse(interval=25, patience=10)
    pulse.judge(0, None, 30)

    assert pulse.judge(31, None, 45) is Verdict.ALIVE
    assert pulse.wake_at(31, None) == 61


def test_an_answer_that_is_owed_makes_silence_suspicious_sooner() -> None:
    pulse = Pulse(interval=25, patience=10)

    assert pulse.judge(0, 20, 29) is Verdict.ALIVE
    assert pulse.wake_at(0, 20) == 30
    assert pulse.judge(5, 6, 16) is Verdict.PROBE
    assert pulse.judge(5, 6, 26) is Verdict.DEAD


def test_a_process_that_slept_does_not_take_its_own_silence_for_the_servers() -> None:
    pulse = Pulse(interval=25, patience=10)

    assert pulse.judge(0, None, 3600) is Verdict.PROBE
    assert pulse.judge(3600.1, 3600, 3601) is Verdict.ALIVE

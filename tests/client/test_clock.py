from __future__ import annotations

import pytest

from chatserver.client import clock
from chatserver.client.clock import Clock


class Times:
    """Both of a machine's clocks."""

    def __init__(self) -> None:
        self.steady, self.wall = 50.0, 1_000_000.0

    def monotonic(self) -> float:
        return self.steady

    def time(self) -> float:
        return self.wall


@pytest.fixture
def times(monkeypatch: pytest.MonkeyPatch) -> Times:
    times = Times()
    monkeypatch.setattr(clock, "time", times)
    return times


def test_it_goes_on_while_the_machine_sleeps(times: Times) -> None:
    since = Clock()
    times.steady += 1
    times.wall += 1200

    assert since.now() == 1200


def test_a_wall_clock_that_is_set_back_does_not_hold_it_up(times: Times) -> None:
    since = Clock()
    times.steady += 10
    times.wall -= 3600
    assert since.now() == 10

    times.steady += 5
    times.wall += 5
    assert since.now() == 15

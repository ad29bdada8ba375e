"""A clock for what another machine counts, too."""

from __future__ import annotations

import time


class Clock:
    """Seconds since it was made, with those in which this machine slept.

    The steady clock may stand still meanwhile, and the wall's may be set back: whichever has gone
    further since the last look is believed.
    """

    __slots__ = ("_now", "_steady", "_wall")

    def __init__(self) -> None:
        self._now = 0.0
        self._steady, self._wall = time.monotonic(), time.time()

    def now(self) -> float:
        steady, wall = time.monotonic(), time.time()
        self._now += max(steady - self._steady, wall - self._wall)
        self._steady, self._wall = steady, wall
        return self._now

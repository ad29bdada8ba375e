"""How long something took, of the time that this process was given."""

from __future__ import annotations

import threading
import time
from typing import Self

TICK_SECONDS = 0.01
LONGEST_SECONDS = 2 * TICK_SECONDS
"""What a tick counts for at most: beyond that the process was held up, and with it, as a rule, all
that it waits for."""


class Stopwatch:
    """A bound on ``seconds`` is one on the server, and not on the machine: while that stands still,
    or has other work, they do not go on. Never more than have passed by the clock."""

    def __init__(self) -> None:
        self.seconds = 0.0
        self._over = threading.Event()
        self._ticking = threading.Thread(target=self._tick, daemon=True)

    def __enter__(self) -> Self:
        self._ticking.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._ticking.join()

    def _tick(self) -> None:
        last = time.monotonic()
        while not self._over.wait(TICK_SECONDS):
            now = time.monotonic()
            self.seconds += min(now - last, LONGEST_SECONDS)
            last = now

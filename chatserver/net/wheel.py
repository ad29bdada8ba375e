"""One timer for all connections: buckets of a quarter second, swept in order."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Generic, TypeVar

TICK_SECONDS = 0.25

T = TypeVar("T")


class Wheel(Generic[T]):
    """Calls ``on_due(item)`` within a tick after an item's time. ``run`` must be a task.

    A task and a handle for each of 20,000 sockets would cost more memory than the sockets.
    An item cannot be taken back: whoever is called checks whether it is still of interest.
    """

    def __init__(self, on_due: Callable[[T], None]) -> None:
        self._on_due = on_due
        self._buckets: dict[int, list[T]] = {}
        self._swept = 0

    def schedule(self, item: T, at: float) -> None:
        """``at`` by the event loop's clock; a time that has passed means the next tick."""
        bucket = max(int(at / TICK_SECONDS), self._swept) + 1
        self._buckets.setdefault(bucket, []).append(item)

    async def run(self) -> None:
        loop = asyncio.get_running_loop()
        self._swept = int(loop.time() / TICK_SECONDS)
        while True:
            await asyncio.sleep(TICK_SECONDS - loop.time() % TICK_SECONDS)
            self.sweep(loop.time())

    def sweep(self, now: float) -> None:
        current = int(now / TICK_SECONDS)
        # A process that was stopped has buckets to catch up with; most do not exist.
        due = sorted(bucket for bucket in self._buckets if bucket <= current)
        self._swept = current
        for bucket in due:
            for item in self._buckets.pop(bucket):
                self._on_due(item)

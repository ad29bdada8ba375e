"""Deadlines for those that this process waits for, and not for itself."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from types import TracebackType

STILL_SECONDS = 0.05
"""A loop that comes so late to a deadline stood still, and did not give the others their time."""


class Deadline:
    """As ``asyncio.timeout``: TimeoutError when it takes longer than ``seconds``. A loop that stood
    still over it has as much time again: the answer may be there, yet to be read."""

    __slots__ = ("_look", "_seconds", "_timeout")

    def __init__(self, seconds: float) -> None:
        self._seconds = seconds

    async def __aenter__(self) -> None:
        self._timeout = asyncio.timeout(None)
        await self._timeout.__aenter__()
        loop = asyncio.get_running_loop()
        due = loop.time() + self._seconds
        self._look = loop.call_at(due, self._fall_due, due)

    def _fall_due(self, due: float) -> None:
        now = asyncio.get_running_loop().time()
        self._timeout.reschedule(now + (self._seconds if _stood_still(now, due) else 0.0))

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._look.cancel()
        await self._timeout.__aexit__(kind, error, trace)


def call_later(seconds: float, callback: Callable[[], None]) -> None:
    """As the loop's, with the same patience."""
    loop = asyncio.get_running_loop()
    due = loop.time() + seconds

    def fall_due() -> None:
        if _stood_still(loop.time(), due):
            loop.call_later(seconds, callback)
        else:
            callback()

    loop.call_at(due, fall_due)


def _stood_still(now: float, due: float) -> bool:
    return now > due + STILL_SECONDS

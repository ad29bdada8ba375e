"""One piece of work for all who want its result at the same time."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from typing import Any, Generic, TypeVar

T = TypeVar("T")


class Flight(Generic[T]):
    """Runs ``work`` once for those who `join` while it is under way.

    It goes on when they give up: what it has begun may have to be finished. `close` waits for it,
    or ends it.
    """

    __slots__ = ("_task", "_work")

    def __init__(self, work: Callable[[], Coroutine[Any, Any, T]]) -> None:
        self._work = work
        self._task: asyncio.Task[T] | None = None

    @property
    def under_way(self) -> bool:
        return self._task is not None

    async def join(self) -> T:
        """The result, or what the work raises."""
        if self._task is None:
            self._task = asyncio.create_task(self._work())
            self._task.add_done_callback(self._land)
        return await asyncio.shield(self._task)

    def _land(self, task: asyncio.Task[T]) -> None:
        self._task = None
        if not task.cancelled():
            # It may be that nobody waits any more; who does, gets it all the same.
            task.exception()

    async def close(self, *, cancel: bool) -> None:
        if self._task is not None:
            task = self._task
            if cancel:
                task.cancel()
            await asyncio.wait([task])

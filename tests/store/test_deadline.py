from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
import uvloop

from chatserver.store import deadline
from chatserver.store.deadline import Deadline

Run = Callable[[Coroutine[Any, Any, None]], None]


@pytest.fixture(params=[asyncio.run, uvloop.run], ids=["asyncio", "uvloop"])
def run(request: pytest.FixtureRequest) -> Run:
    return request.param  # type: ignore[no-any-return]


async def _after_turns(turns: int) -> None:
    """As what was there all along, and takes a few turns of the loop to be read."""
    for _ in range(turns):
        await asyncio.sleep(0)


def test_what_never_comes_is_a_timeout(run: Run) -> None:
    async def main() -> None:
        async with Deadline(0.01):
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        run(main())


def test_what_comes_in_time_is_none_and_nothing_is_left_behind(run: Run) -> None:
    async def main() -> None:
        failures: list[dict[str, Any]] = []
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: failures.append(context))
        over = asyncio.Event()
        async with Deadline(0.01):
            await _after_turns(3)
        loop.call_later(0.02, over.set)  # timers come in their order
        await over.wait()

        assert failures == []

    run(main())


def test_who_stood_still_over_it_has_as_much_time_again(run: Run) -> None:
    async def main() -> None:
        async with Deadline(1.0):
            time.sleep(1.1)  # noqa: ASYNC251  As if it was not running.
            await _after_turns(5)

    run(main())


def test_who_stood_still_does_not_wait_for_ever(run: Run) -> None:
    async def main() -> None:
        async with Deadline(0.1):
            time.sleep(0.2)  # noqa: ASYNC251
            await asyncio.Event().wait()

    with pytest.raises(TimeoutError):
        run(main())


def test_a_call_waits_for_who_stood_still_too(run: Run) -> None:
    async def main() -> None:
        called = asyncio.Event()
        deadline.call_later(0.2, called.set)
        time.sleep(0.3)  # noqa: ASYNC251
        await _after_turns(5)
        early = called.is_set()
        await called.wait()

        assert not early

    run(main())


def test_a_call_comes_when_its_time_has_come(run: Run) -> None:
    async def main() -> None:
        called = asyncio.Event()
        deadline.call_later(0.01, called.set)
        await called.wait()

    run(main())

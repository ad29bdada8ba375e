"""Things happen when they are due, and are told when that was."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator

import pytest

from load.agenda import SECOND, Agenda
from tests.support.worker import eventually

MS = 1_000_000


@pytest.fixture
async def agenda() -> AsyncIterator[Agenda]:
    agenda = Agenda()
    yield agenda
    agenda.close()


async def test_actions_run_in_the_order_of_their_moments_and_never_before(agenda: Agenda) -> None:
    ran: list[tuple[int, int]] = []
    now = time.monotonic_ns()
    dues = [now + 30 * MS, now + 10 * MS, now + 20 * MS, now - 5 * MS]
    for due in dues:
        agenda.at(due, lambda due: ran.append((due, time.monotonic_ns())))

    await eventually(lambda: len(ran) == 4)

    assert [due for due, _ in ran] == sorted(dues)
    assert all(at >= due for due, at in ran)


async def test_a_loop_that_was_held_up_makes_up_for_every_time(agenda: Agenda) -> None:
    dues: list[int] = []
    began = time.monotonic_ns()
    agenda.every(began, 5 * MS, dues.append)
    await eventually(lambda: dues)
    time.sleep(0.05)  # noqa: ASYNC251  The loop stands still, as in a process that is too busy.
    await eventually(lambda: len(dues) >= 12)

    assert dues == [began + 5 * MS * n for n in range(len(dues))]


async def test_what_was_due_before_the_end_is_made_up_for(agenda: Agenda) -> None:
    """A process that was held up hears of the end first, and its timer was to ring before."""
    dues: list[int] = []
    now = time.monotonic_ns()
    agenda.every(now - 3 * SECOND, SECOND, dues.append)
    agenda.at(now + 1000 * SECOND, dues.append)
    agenda.make_up()
    agenda.clear()

    assert dues[:3] == [now - n * SECOND for n in (3, 2, 1)]
    assert all(due <= time.monotonic_ns() for due in dues)


async def test_what_was_cleared_does_not_happen(agenda: Agenda) -> None:
    ran: list[int] = []
    agenda.every(time.monotonic_ns(), MS, ran.append)
    await eventually(lambda: ran)
    agenda.clear()
    seen, over = len(ran), asyncio.Event()
    agenda.at(time.monotonic_ns() + 10 * MS, lambda due: over.set())
    await over.wait()

    assert len(ran) == seen

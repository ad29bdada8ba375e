"""The door's queue, by itself: who comes when, whatever befalls one of them."""

from __future__ import annotations

import asyncio
from typing import Any

from chatserver.core.errors import StoreUnavailable
from chatserver.core.handshake import Attempt
from chatserver.net.connection import Phase
from chatserver.net.listener import Listener, Newcomer
from tests.support.worker import eventually


class Hub:
    """Meets a bug of its own with the first token, and knows nothing of the others."""

    def verify(self, token: str) -> None:
        if token == "t0":
            raise RuntimeError("a bug")
        raise StoreUnavailable("away")


class Waiting:
    """A connection that has asked to be let in."""

    phase = Phase.HANDSHAKE

    def __init__(self) -> None:
        self.answers: list[Any] = []

    def respond(self, response: Any) -> None:
        self.answers.append(response)


def door(*, rate: float = 100) -> Listener:
    return Listener(
        Hub(),  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        frame_bytes=1024,
        extensions=[],
        handshake_rate=1000,
        admission_rate=rate,
        handshake_seconds=5,
        connections=10,
        sockets=10,
    )


def queue_up(listener: Listener, number: int) -> Waiting:
    waiting = Waiting()
    attempt = Attempt(f"t{number}", "192.0.2.1", None, True, None)
    listener._queue_up(Newcomer(waiting, None, attempt, None))  # type: ignore[arg-type]
    return waiting


async def test_a_bug_met_by_one_newcomer_does_not_stop_the_queue() -> None:
    seen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
    listener = door()
    _, first, second = (queue_up(listener, number) for number in (1, 0, 2))

    await eventually(lambda: second.answers)

    assert [answer.status_code for answer in second.answers] == [503]
    assert first.answers == []
    assert [str(context["exception"]) for context in seen] == ["a bug"]


async def test_when_the_host_goes_nobody_waits_for_a_turn_any_more() -> None:
    listener = door(rate=0.5)
    waiting = [queue_up(listener, number) for number in range(1, 3)]
    listener.stop()
    late = queue_up(listener, 3)
    immediately = list(late.answers)

    await eventually(lambda: all(each.answers for each in waiting), within=1.5)

    assert b"unavailable" in waiting[0].answers[0].body
    assert b"draining" in waiting[1].answers[0].body
    assert [b"draining" in answer.body for answer in immediately] == [True]

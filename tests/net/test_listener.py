"""The door's queue, by itself: who comes when, whatever befalls one of them."""

from __future__ import annotations

import asyncio
from typing import Any

import pytest
from websockets.datastructures import Headers
from websockets.http11 import Request

from chatserver.core.errors import StoreUnavailable
from chatserver.core.handshake import Attempt, Policy
from chatserver.net import listener
from chatserver.net.connection import Accepted, Phase
from chatserver.net.listener import Listener, Newcomer
from chatserver.store.registry import Registered
from tests.support.worker import eventually


class Hub:
    """Meets a bug of its own with two of the tokens, and knows nothing of the others."""

    def __init__(self) -> None:
        self.registered: Registered | None = None
        self.unregistered: list[object] = []

    def __len__(self) -> int:
        return 0

    def verify(self, token: str) -> None:
        if token == "t0":
            raise RuntimeError("a bug")
        if token != "registered":
            raise StoreUnavailable("away")

    def register(self, _: object, identity: None, address: str, done: Registered) -> None:
        self.registered = done

    def vouch(self, identity: None) -> None:
        raise RuntimeError("a bug")

    def unregister(self, connection: object, identity: None) -> None:
        self.unregistered.append(connection)

    def fresh(self) -> bool:
        return True

    def remove(self, connection: object, ending: str) -> None:
        """None of them was let in."""


class Waiting:
    """A connection that has asked to be let in."""

    phase = Phase.HANDSHAKE
    peer = "192.0.2.1"
    ending = "1006"

    def __init__(self) -> None:
        self.answers: list[Any] = []
        self.aborted = False

    def abort(self) -> None:
        self.aborted = True

    def respond(self, response: Any) -> None:
        self.answers.append(response)


def door(*, rate: float = 100, hub: Hub | None = None, sockets: int = 100) -> Listener:
    return Listener(
        Hub() if hub is None else hub,  # type: ignore[arg-type]
        None,  # type: ignore[arg-type]
        Policy(),
        frame_bytes=1024,
        extensions=[],
        handshake_rate=1000,
        admission_rate=rate,
        handshake_seconds=5,
        connections=10,
        sockets=sockets,
    )


def queue_up(house: Listener, number: int) -> Waiting:
    waiting = Waiting()
    attempt = Attempt(f"t{number}", "192.0.2.1", None, True, None)
    house._queue_up(Newcomer(waiting, None, attempt, None))  # type: ignore[arg-type]
    return waiting


async def test_a_bug_met_by_one_newcomer_does_not_stop_the_queue() -> None:
    seen: list[dict[str, Any]] = []
    asyncio.get_running_loop().set_exception_handler(lambda loop, context: seen.append(context))
    house = door(rate=2)
    _, first, second = (queue_up(house, number) for number in (1, 0, 2))

    await eventually(lambda: second.answers)

    assert [answer.status_code for answer in second.answers] == [503]
    assert first.answers == []
    assert [str(context["exception"]) for context in seen] == ["a bug"]


async def test_a_bug_met_when_the_store_has_answered_is_none_of_the_lanes() -> None:
    hub, waiting = Hub(), Waiting()
    house = door(hub=hub)
    attempt = Attempt("registered", "192.0.2.1", None, True, None)
    accepted = Accepted("key", None)
    house._queue_up(Newcomer(waiting, None, attempt, accepted))  # type: ignore[arg-type]
    await eventually(lambda: hub.registered)
    assert hub.registered is not None
    hub.registered(None)

    assert waiting.aborted
    assert hub.unregistered == [waiting]
    assert house._registering == 0


async def test_when_the_host_goes_nobody_waits_for_a_turn_any_more() -> None:
    house = door(rate=0.5)
    waiting = [queue_up(house, number) for number in range(1, 3)]
    house.stop()
    late = queue_up(house, 3)
    immediately = list(late.answers)

    await eventually(lambda: all(each.answers for each in waiting), within=1.5)

    assert b"unavailable" in waiting[0].answers[0].body
    assert b"draining" in waiting[1].answers[0].body
    assert [b"draining" in answer.body for answer in immediately] == [True]


async def test_of_too_many_who_say_nothing_the_one_silent_longest_goes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """And not the newcomer, nor who has been heard, has been answered, or has hung up."""
    monkeypatch.setattr(listener, "SILENT_SOCKETS", 2)
    house = door()
    asking, answered, gone, first, second = everybody = [Waiting() for _ in range(5)]
    house.connected(asking)  # type: ignore[arg-type]
    house.requested(asking, Request("/healthz", Headers(Host="here")))  # type: ignore[arg-type]
    house.connected(answered)  # type: ignore[arg-type]
    house.ended(answered)  # type: ignore[arg-type]
    house.connected(gone)  # type: ignore[arg-type]
    house.lost(gone)  # type: ignore[arg-type]
    house.connected(first)  # type: ignore[arg-type]
    house.connected(second)  # type: ignore[arg-type]
    before = [each.aborted for each in everybody]
    newcomer = Waiting()
    house.connected(newcomer)  # type: ignore[arg-type]

    assert not any(before)
    assert first.aborted
    assert [each.aborted for each in (asking, answered, second, newcomer)] == [False] * 4
    assert house.refused == {"overloaded": 1}


async def test_when_the_sockets_run_out_it_is_those_who_say_nothing_that_go() -> None:
    house = door(sockets=3)
    asking, first, second, newcomer, last = everybody = [Waiting() for _ in range(5)]
    house.connected(asking)  # type: ignore[arg-type]
    house.requested(asking, Request("/healthz", Headers(Host="here")))  # type: ignore[arg-type]
    for waiting in (first, second, newcomer):
        house.connected(waiting)  # type: ignore[arg-type]
    house.requested(newcomer, Request("/healthz", Headers(Host="here")))  # type: ignore[arg-type]
    house.lost(first)  # type: ignore[arg-type]
    house.connected(last)  # type: ignore[arg-type]

    assert [each.aborted for each in everybody] == [False, True, True, False, False]


async def test_when_the_sockets_run_out_and_everybody_has_asked_the_newcomer_goes() -> None:
    house = door(sockets=1)
    asking, newcomer = Waiting(), Waiting()
    house.connected(asking)  # type: ignore[arg-type]
    house.requested(asking, Request("/healthz", Headers(Host="here")))  # type: ignore[arg-type]
    house.connected(newcomer)  # type: ignore[arg-type]

    assert (asking.aborted, newcomer.aborted) == (False, True)

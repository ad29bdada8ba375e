"""Which connection makes room: what workers say to each other about it, and what they ignore."""

from __future__ import annotations

import pytest

from chatserver.net.superseding import Superseding
from chatserver.store.link import Store
from chatserver.store.registry import Entry, Registry
from tests.support.worker import eventually


class Quiet(Registry):
    """Keeps what was said instead of saying it."""

    def __init__(self) -> None:
        super().__init__(Store("unix:///nowhere").lane(), "w1", 2)
        self.said: list[str] = []

    def say(self, message: str) -> None:
        self.said.append(message)


class Worker:
    """Worker w1, whose quietest connection of each session was heard then."""

    def __init__(self, **heard: int) -> None:
        self.heard = heard
        self.ended: list[str] = []
        self.registry = Quiet()
        self.superseding = Superseding(self.registry, "w1", self)
        self.made = 0

    def last_heard(self, session: str) -> int | None:
        return self.heard.get(session)

    def supersede(self, session: str) -> None:
        self.ended.append(session)

    def ask(self, session: str, *workers: str) -> bool:
        others = [Entry("u", session, worker, f"c{worker}", 0, "-") for worker in workers]
        return self.superseding.make_room(session, others, self.done)

    def done(self) -> None:
        self.made += 1

    def ticket(self) -> str:
        return self.registry.said[0].split(" ")[1]


async def test_the_only_worker_decides_at_once() -> None:
    worker = Worker(s=3000)

    assert worker.ask("s", "w1", "w1")
    assert (worker.ended, worker.made, worker.registry.said) == (["s"], 1, [])


async def test_without_a_connection_of_the_session_there_is_no_room() -> None:
    worker = Worker(s=3000)
    others = [Entry("u", "other", "w1", "c", 0, "-")]

    assert not worker.superseding.make_room("s", others, worker.done)
    assert (worker.ended, worker.made) == ([], 0)


@pytest.mark.parametrize(
    ("answer", "ended", "said"),
    [("2999", [], ["supersede w2 s x"]), ("3001", ["s x"], [])],
)
async def test_the_one_silent_longest_goes(answer: str, ended: list[str], said: list[str]) -> None:
    worker = Worker(**{"s x": 3000})
    worker.ask("s x", "w1", "w2")
    ticket = worker.ticket()
    worker.superseding.hear(f"heard {ticket} w2 {answer}".encode())

    assert worker.registry.said == [f"heard? {ticket} s x", *said]
    assert (worker.ended, worker.made) == (ended, 1)


async def test_a_worker_that_does_not_answer_is_not_waited_for() -> None:
    worker = Worker(s=3000)
    worker.ask("s", "w1", "w2")
    await eventually(lambda: worker.made == 1)
    worker.superseding.hear(f"heard {worker.ticket()} w2 9000".encode())

    assert (worker.ended, worker.made) == (["s"], 1)


async def test_questions_are_answered_for_sessions_that_are_here() -> None:
    worker = Worker(**{"a b ": 1500})
    for session in ("a b ", "a b", "elsewhere"):
        worker.superseding.hear(f"heard? t1 {session}".encode())

    assert worker.registry.said == ["heard t1 w1 1500"]


@pytest.mark.parametrize("session", ["s", "a b", " a  b ", "é𝒳", "supersede w1 s"])
async def test_who_is_told_to_end_a_connection_ends_it(session: str) -> None:
    worker = Worker()
    worker.superseding.hear(f"supersede w1 {session}".encode())
    worker.superseding.hear(f"supersede w2 {session}".encode())

    assert worker.ended == [session]


@pytest.mark.parametrize(
    "payload",
    [
        b"",
        b" ",
        b"\xff\xfe",
        b"supersede",
        b"supersede w1",
        b"supersede  w1 s",
        b"SUPERSEDE w1 s",
        b"heard?",
        b"heard? t",
        b"heard t",
        b"heard t w2",
        b"heard t w2 nan",
        b"heard t w2 -1",
        b"1700000000000-0",
        b"x" * 100_000,
    ],
)
async def test_anything_else_is_ignored(payload: bytes) -> None:
    worker = Worker(s=3000)
    worker.superseding.hear(payload)

    assert (worker.ended, worker.registry.said) == ([], [])


@pytest.mark.parametrize("answer", ["nan", "-1", "", "1e9", "9 9"])
async def test_an_answer_that_is_no_number_does_not_decide(answer: str) -> None:
    worker = Worker(s=3000)
    worker.ask("s", "w1", "w2")
    worker.superseding.hear(f"heard {worker.ticket()} w2 {answer}".encode())

    assert (worker.ended, worker.made) == ([], 0)
    await eventually(lambda: worker.made == 1)


@pytest.mark.parametrize("answer", ["²", "9" * 400, "9" * 5000])
async def test_an_odd_number_raises_nothing(answer: str) -> None:
    worker = Worker(s=3000)
    worker.ask("s", "w1", "w2")
    worker.superseding.hear(f"heard {worker.ticket()} w2 {answer}".encode())

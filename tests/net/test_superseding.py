"""Which connection makes room: what workers say to each other about it, and what they ignore."""

from __future__ import annotations

import pytest

from chatserver.core.errors import StoreUnavailable
from chatserver.net.superseding import TRIES, Heard, Superseding
from chatserver.store.link import Store
from chatserver.store.registry import Entry, Full, Registered, Registry
from tests.support.worker import eventually

Outcome = Full | StoreUnavailable | None


def entry(connection: str, worker: str = "w1", session: str = "s", since: int = 0) -> Entry:
    return Entry("u", session, worker, connection, since, "-")


class Script(Registry):
    """Keeps what was said instead of saying it, and answers when a test tells it to."""

    def __init__(self) -> None:
        super().__init__(Store("unix:///nowhere").lane(), "w1", 2)
        self.said: list[str] = []
        self.asked: list[tuple[str, str | None]] = []
        """Connections to be registered, each with the one in whose place."""
        self._waiting: dict[str, Registered] = {}

    def say(self, message: str) -> None:
        self.said.append(message)

    def register(self, entry: Entry, done: Registered, *, instead_of: Entry | None = None) -> None:
        self.asked.append((entry.connection, instead_of and instead_of.connection))
        self._waiting[entry.connection] = done

    def renew(self, entry: Entry, done: Registered) -> None:
        self._waiting[entry.connection] = done

    def answer(self, outcome: Outcome, connection: str = "new") -> None:
        self._waiting.pop(connection)(outcome)


class Worker:
    """Worker w1, whose quietest connection of each session was heard then."""

    def __init__(self, **heard: Heard) -> None:
        self.heard = heard
        self.ended: list[str] = []
        self.store = Script()
        self.superseding = Superseding(self.store, "w1", self)
        self.outcomes: dict[str, Outcome] = {}

    def quietest(self, session: str) -> Heard | None:
        return self.heard.get(session)

    def supersede(self, connection: str) -> None:
        self.ended.append(connection)

    def register(self, newcomer: Entry) -> None:
        def done(outcome: Outcome) -> None:
            self.outcomes[newcomer.connection] = outcome

        self.superseding.register(newcomer, done)

    def meet(self, newcomer: str, *others: Entry, session: str = "s") -> None:
        """Somebody comes, and these are all that may be."""
        self.register(entry(newcomer, session=session))
        self.store.answer(Full(list(others)), newcomer)

    def hear(self, message: str) -> None:
        self.superseding.hear(message.encode())

    def ticket(self) -> str:
        return self.store.said[0].split(" ")[1]


async def test_who_finds_room_supersedes_nobody() -> None:
    worker = Worker(s=Heard(3000, "old"))
    worker.register(entry("new"))
    worker.store.answer(None)

    assert worker.outcomes == {"new": None}
    assert (worker.ended, worker.store.said) == ([], [])


async def test_the_only_worker_decides_at_once() -> None:
    worker = Worker(s=Heard(3000, "old"))
    worker.meet("new", entry("young"), entry("old"))
    before = list(worker.ended)
    worker.store.answer(None)

    assert worker.store.asked == [("new", None), ("new", "old")]
    assert (before, worker.ended) == ([], ["old"])
    assert (worker.outcomes, worker.store.said) == ({"new": None}, [])


async def test_without_a_connection_of_the_session_there_is_no_room() -> None:
    worker = Worker(s=Heard(3000, "old"))
    full = Full([entry("c", session="other")])
    worker.register(entry("new"))
    worker.store.answer(full)

    assert worker.outcomes == {"new": full}
    assert (worker.ended, worker.store.said) == ([], [])


@pytest.mark.parametrize(
    ("answer", "other", "ended", "said"),
    [("2999 there", "there", [], ["supersede w2 there"]), ("3001 there", "here", ["here"], [])],
)
async def test_the_one_silent_longest_goes(
    answer: str, other: str, ended: list[str], said: list[str]
) -> None:
    worker = Worker(**{"s x": Heard(3000, "here")})
    others = [entry("here", session="s x"), entry("there", "w2", session="s x")]
    worker.meet("new", *others, session="s x")
    ticket = worker.ticket()
    worker.hear(f"heard {ticket} w2 {answer}")
    worker.store.answer(None)

    assert worker.store.asked[1] == ("new", other)
    assert worker.store.said == [f"heard? {ticket} s x", *said]
    assert (worker.ended, worker.outcomes) == (ended, {"new": None})


async def test_a_worker_that_does_not_answer_is_not_waited_for() -> None:
    worker = Worker(s=Heard(3000, "here"))
    worker.meet("new", entry("here"), entry("there", "w2"))
    await eventually(lambda: len(worker.store.asked) == 2)
    worker.hear(f"heard {worker.ticket()} w2 1 there")
    worker.store.answer(None)

    assert worker.store.asked[1:] == [("new", "here")]
    assert (worker.ended, worker.outcomes) == (["here"], {"new": None})


async def test_of_workers_that_are_gone_the_oldest_connection_makes_room() -> None:
    worker = Worker()
    worker.meet("new", entry("b", "w2", since=2), entry("a", "w2", since=1))
    await eventually(lambda: len(worker.store.asked) == 2)

    assert worker.store.asked[1] == ("new", "a")


async def test_a_connection_without_a_place_has_none_to_give() -> None:
    """It was told to go, and is still there."""
    worker = Worker(s=Heard(3000, "going"))
    worker.meet("new", entry("b", since=2), entry("a", since=1))

    assert worker.store.asked[1] == ("new", "a")


async def test_who_comes_too_late_for_a_place_asks_for_another() -> None:
    worker = Worker(s=Heard(3000, "taken"))
    worker.meet("new", entry("taken"), entry("free"))
    worker.heard["s"] = Heard(4000, "free")
    worker.store.answer(Full([entry("free"), entry("quicker", "w2")]))
    worker.hear(f"heard {worker.ticket()} w2 5000 quicker")
    worker.store.answer(None)

    assert worker.store.asked == [("new", None), ("new", "taken"), ("new", "free")]
    assert (worker.ended, worker.outcomes) == (["free"], {"new": None})


async def test_who_always_comes_too_late_is_refused() -> None:
    worker = Worker(s=Heard(3000, "c"))
    worker.meet("new", entry("c"))
    for _ in range(TRIES):
        worker.store.answer(Full([entry("c")]))

    assert worker.outcomes == {"new": Full([entry("c")])}
    assert worker.ended == []


async def test_newcomers_of_one_session_take_their_places_one_after_the_other() -> None:
    worker = Worker(s=Heard(1, "a"), t=Heard(1, "x"))
    worker.meet("first", entry("a"), entry("b"))
    worker.meet("second", entry("a"), entry("b"))
    worker.meet("other", entry("x", session="t"), session="t")
    worker.store.answer(None, "other")
    before = list(worker.store.asked)
    worker.store.answer(None, "first")
    worker.heard["s"] = Heard(2, "b")
    worker.store.answer(Full([entry("b"), entry("first")]), "second")
    worker.store.answer(None, "second")

    assert [what for what in before if what[1]] == [("first", "a"), ("other", "x")]
    assert worker.store.asked[len(before) :] == [("second", None), ("second", "b")]
    assert worker.ended == ["x", "a", "b"]
    assert worker.outcomes == {"other": None, "first": None, "second": None}


async def test_who_comes_when_all_have_their_places_waits_for_nobody() -> None:
    worker = Worker(s=Heard(1, "a"))
    worker.meet("first", entry("a"))
    worker.store.answer(None, "first")
    worker.heard["s"] = Heard(2, "first")
    worker.meet("second", entry("first"))
    worker.store.answer(None, "second")

    assert worker.ended == ["a", "first"]
    assert worker.outcomes == {"first": None, "second": None}


async def test_a_store_that_is_away_stops_nobody_behind() -> None:
    worker = Worker(s=Heard(1, "a"))
    worker.meet("first", entry("a"))
    worker.meet("second", entry("a"))
    away = StoreUnavailable("away")
    worker.store.answer(away, "first")
    worker.store.answer(None, "second")

    assert worker.outcomes == {"first": away, "second": None}
    assert worker.ended == []


async def test_questions_are_answered_for_sessions_that_are_here() -> None:
    worker = Worker(**{"a b ": Heard(1500, "c")})
    for session in ("a b ", "a b", "elsewhere"):
        worker.hear(f"heard? t1 {session}")

    assert worker.store.said == ["heard t1 w1 1500 c"]


async def test_who_is_told_to_end_a_connection_ends_it() -> None:
    worker = Worker()
    worker.hear("supersede w1 c-1_x")
    worker.hear("supersede w2 c-2_x")

    assert worker.ended == ["c-1_x"]


async def test_who_loses_its_place_before_it_has_it_asks_for_another() -> None:
    """It has one in the store, and this worker has yet to read so."""
    worker = Worker(s=Heard(3000, "old"))
    worker.register(entry("new"))
    worker.hear("supersede w1 new")
    worker.store.answer(None)
    before = dict(worker.outcomes)
    worker.store.answer(None)

    assert worker.store.asked == [("new", None), ("new", None)]
    assert (before, worker.outcomes) == ({}, {"new": None})
    assert worker.ended == []


async def test_who_loses_its_place_and_is_refused_asks_for_no_other() -> None:
    worker = Worker()
    worker.register(entry("new"))
    worker.hear("supersede w1 new")
    away = StoreUnavailable("away")
    worker.store.answer(away)

    assert worker.store.asked == [("new", None)]
    assert worker.outcomes == {"new": away}


@pytest.mark.parametrize(
    ("outcome", "ended"),
    [(Full([entry("other")]), ["c"]), (None, []), (StoreUnavailable("away"), [])],
)
async def test_who_has_lost_its_place_and_was_not_told_ends_with_its_next_token(
    outcome: Outcome, ended: list[str]
) -> None:
    worker = Worker()
    worker.superseding.renew(entry("c"))
    worker.store.answer(outcome, "c")

    assert worker.ended == ended


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
        b"heard t w2 nan c",
        b"heard t w2 -1 c",
        b"1700000000000-0",
        b"x" * 100_000,
    ],
)
async def test_anything_else_is_ignored(payload: bytes) -> None:
    worker = Worker(s=Heard(3000, "c"))
    worker.superseding.hear(payload)

    assert (worker.ended, worker.store.said) == ([], [])


@pytest.mark.parametrize("answer", ["nan c", "-1 c", "", "1e9 c", "² c", "9" * 400, "9" * 5000])
async def test_an_answer_that_is_no_number_does_not_decide(answer: str) -> None:
    worker = Worker(s=Heard(3000, "here"))
    worker.meet("new", entry("here"), entry("c", "w2"))
    worker.hear(f"heard {worker.ticket()} w2 {answer}")

    assert len(worker.store.asked) == 1
    await eventually(lambda: len(worker.store.asked) == 2)

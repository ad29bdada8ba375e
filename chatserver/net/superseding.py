"""A full house: which connection of a session makes room for a new one, wherever it is.

Each worker knows when its own connections were last heard and nobody else does, so the one with
the newcomer asks; the worker with the longest silence is told to end that connection. What
pub/sub loses costs the answer of one worker, or leaves the user one connection too many for as
long as it lasts.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable, Iterable, Mapping
from typing import Protocol

from chatserver.store.registry import Entry, Registry

ANSWER_SECONDS = 0.1
"""A handshake waits so long for answers that are usually there in a millisecond."""

_MICROSECONDS = re.compile(r"[0-9]{1,18}")


class House(Protocol):
    """This worker's connections: the hub."""

    def last_heard(self, session: str) -> int | None:
        """When the quietest of the session was heard, None if there is none.

        In microseconds since the epoch, not as an age: an answer takes longer than a question.
        """

    def supersede(self, session: str) -> None:
        """End that connection."""


class _Question:
    """Who is silent longest? Asked of all workers that have connections of the session."""

    def __init__(self, session: str, workers: Iterable[str], done: Callable[[], None]) -> None:
        self.session = session
        self.unanswered = set(workers)
        self.heard: dict[str, int] = {}
        self.done = done


class Superseding:
    """Asks, answers and decides for one worker."""

    def __init__(self, registry: Registry, worker: str, house: House) -> None:
        self._registry = registry
        self._worker = worker
        self._house = house
        self._questions: dict[str, _Question] = {}

    def make_room(self, session: str, others: Iterable[Entry], done: Callable[[], None]) -> bool:
        """End one of the others that are of the session, then call ``done``; False: there is none.

        ``done`` may be called at once.
        """
        workers = {entry.worker for entry in others if entry.session == session}
        if not workers:
            return False
        ticket = secrets.token_hex(8)
        question = self._questions[ticket] = _Question(session, workers, done)
        self._answer(ticket, self._worker, self._house.last_heard(session))
        if question.unanswered:
            self._registry.say(f"heard? {ticket} {session}")
            asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._decide, ticket)
        return True

    def hear(self, payload: bytes) -> None:
        """What some worker said to all of them. Anything else is ignored."""
        match payload.decode(errors="replace").split(" ", 2):
            case ["heard?", ticket, session] if ticket not in self._questions:
                heard = self._house.last_heard(session)
                if heard is not None:
                    self._registry.say(f"heard {ticket} {self._worker} {heard}")
            case ["heard", ticket, answer]:
                worker, _, microseconds = answer.partition(" ")
                if _MICROSECONDS.fullmatch(microseconds):
                    self._answer(ticket, worker, int(microseconds))
            case ["supersede", worker, session] if worker == self._worker:
                self._house.supersede(session)
            case _:
                pass

    def _answer(self, ticket: str, worker: str, heard: int | None) -> None:
        question = self._questions.get(ticket)
        if question is None or worker not in question.unanswered:
            return
        question.unanswered.discard(worker)
        if heard is not None:
            question.heard[worker] = heard
        if not question.unanswered:
            self._decide(ticket)

    def _decide(self, ticket: str) -> None:
        question = self._questions.pop(ticket, None)
        if question is None:
            return
        worker = _earliest(question.heard)
        if worker == self._worker:
            self._house.supersede(question.session)
        elif worker is not None:
            self._registry.say(f"supersede {worker} {question.session}")
        question.done()


def _earliest(heard: Mapping[str, int]) -> str | None:
    return min(heard, key=lambda worker: heard[worker], default=None)

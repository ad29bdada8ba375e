"""A full house: which connection of a session makes room for a new one, wherever it is.

Each worker knows how long its own connections have been silent and nobody else does, so the one
with the newcomer asks; the worker with the longest silence is told to end that connection. What
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

_MILLISECONDS = re.compile(r"[0-9]{1,15}")


class House(Protocol):
    """This worker's connections: the hub."""

    def silence(self, session: str) -> float | None:
        """Seconds for which the quietest of the session was silent; None if there is none."""

    def supersede(self, session: str) -> None:
        """End that connection."""


class _Question:
    """Who is silent longest? Asked of all workers that have connections of the session."""

    def __init__(self, session: str, workers: Iterable[str], done: Callable[[], None]) -> None:
        self.session = session
        self.unanswered = set(workers)
        self.silences: dict[str, float] = {}
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
        self._answer(ticket, self._worker, self._house.silence(session))
        if question.unanswered:
            self._registry.say(f"silence? {ticket} {session}")
            asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._decide, ticket)
        return True

    def hear(self, payload: bytes) -> None:
        """What some worker said to all of them. Anything else is ignored."""
        match payload.decode(errors="replace").split(" ", 2):
            case ["silence?", ticket, session] if ticket not in self._questions:
                silence = self._house.silence(session)
                if silence is not None:
                    said = f"silence {ticket} {self._worker} {silence * 1000:.0f}"
                    self._registry.say(said)
            case ["silence", ticket, answer]:
                worker, _, milliseconds = answer.partition(" ")
                if _MILLISECONDS.fullmatch(milliseconds):
                    self._answer(ticket, worker, int(milliseconds) / 1000)
            case ["supersede", worker, session] if worker == self._worker:
                self._house.supersede(session)
            case _:
                pass

    def _answer(self, ticket: str, worker: str, silence: float | None) -> None:
        question = self._questions.get(ticket)
        if question is None or worker not in question.unanswered:
            return
        question.unanswered.discard(worker)
        if silence is not None:
            question.silences[worker] = silence
        if not question.unanswered:
            self._decide(ticket)

    def _decide(self, ticket: str) -> None:
        question = self._questions.pop(ticket, None)
        if question is None:
            return
        worker = _longest(question.silences)
        if worker == self._worker:
            self._house.supersede(question.session)
        elif worker is not None:
            self._registry.say(f"supersede {worker} {question.session}")
        question.done()


def _longest(silences: Mapping[str, float]) -> str | None:
    return max(silences, key=lambda worker: silences[worker], default=None)

"""A full house: which connection of a session makes room for a new one, wherever it is.

Each worker knows when its own connections were last heard and nobody else does, so the one with
the newcomer asks, and names the connection with the longest silence to the store. There the two
change places in one step: of many newcomers, on many workers, one gets that place, and the others
ask again. So a user never has more connections than allowed. Those who wait on the same worker for
the same session ask one after the other, for they would only name the same one.

What pub/sub loses costs the answer of one worker; or a connection is not told that it has lost its
place, and is one too many until that shows: with its next token at the latest.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple, Protocol

from chatserver.core.errors import StoreUnavailable
from chatserver.store.registry import Entry, Full, Registered, Registry

ANSWER_SECONDS = 0.1
"""A handshake waits so long for answers that are usually there in a millisecond."""
TRIES = 5
"""So often another may be quicker; then the newcomer is refused."""

_MICROSECONDS = re.compile(r"[0-9]{1,18}")


class Heard(NamedTuple):
    """A connection, and when it was last heard; of several the least is the most silent."""

    microseconds: int
    """Since the epoch, not an age: an answer takes longer than a question."""
    connection: str


class House(Protocol):
    """This worker's connections: the hub."""

    def quietest(self, session: str) -> Heard | None:
        """The one of the session that was silent longest, None if there is none."""

    def supersede(self, connection: str) -> None:
        """End it, if it is here."""


class _Newcomer(NamedTuple):
    entry: Entry
    done: Registered


class _Question:
    """Who is silent longest? Asked of all workers that have connections of the session."""

    def __init__(self, own: Iterable[Entry], done: Callable[[Entry], None]) -> None:
        self.own = {(entry.worker, entry.connection): entry for entry in own}
        self.unanswered = {entry.worker for entry in own}
        self.heard: list[tuple[Heard, Entry]] = []
        self.done = done


class Superseding:
    """Asks, answers and decides for one worker."""

    def __init__(self, registry: Registry, worker: str, house: House) -> None:
        self._registry = registry
        self._worker = worker
        self._house = house
        self._coming: dict[str, bool] = {}
        """Connections that are being registered, and whether they keep the place that they get."""
        self._lines: dict[str, deque[_Newcomer]] = {}
        """By session: who waits until the one before has its answer."""
        self._questions: dict[str, _Question] = {}

    def register(self, entry: Entry, done: Registered) -> None:
        """As ``Registry.register``, but at the cap another connection of the session has to go."""

        def settled(outcome: Full | StoreUnavailable | None) -> None:
            if not self._coming.pop(entry.connection) and outcome is None:
                self.register(entry, done)  # Another has it by now; this one tries again.
            else:
                done(outcome)

        self._coming[entry.connection] = True
        newcomer = _Newcomer(entry, settled)

        def registered(outcome: Full | StoreUnavailable | None) -> None:
            if not isinstance(outcome, Full):
                settled(outcome)
            elif entry.session in self._lines:
                self._lines[entry.session].append(newcomer)
            else:
                self._lines[entry.session] = deque()
                self._make_room(newcomer, outcome, TRIES)

        self._registry.register(entry, registered)

    def renew(self, entry: Entry) -> None:
        """Say again that this connection is there, or end it: one of its session has its place."""

        def renewed(outcome: Full | StoreUnavailable | None) -> None:
            if isinstance(outcome, Full):
                self._house.supersede(entry.connection)

        self._registry.renew(entry, renewed)

    def _make_room(self, newcomer: _Newcomer, full: Full, tries: int) -> None:
        session = newcomer.entry.session
        own = [entry for entry in full.entries if entry.session == session]
        if own and tries:
            self._ask(session, own, lambda other: self._take(newcomer, other, tries - 1))
        else:
            self._settle(newcomer, full)

    def _take(self, newcomer: _Newcomer, other: Entry | None, tries: int) -> None:
        """Take the other's place; without one, the next that is free."""

        def registered(outcome: Full | StoreUnavailable | None) -> None:
            if isinstance(outcome, Full):
                self._make_room(newcomer, outcome, tries)
                return
            if outcome is None and other is not None:
                self._end(other)
            self._settle(newcomer, outcome)

        self._registry.register(newcomer.entry, registered, instead_of=other)

    def _settle(self, newcomer: _Newcomer, outcome: Full | StoreUnavailable | None) -> None:
        try:
            newcomer.done(outcome)
        finally:
            line = self._lines[newcomer.entry.session]
            if line:
                self._take(line.popleft(), None, TRIES)
            else:
                del self._lines[newcomer.entry.session]

    def _end(self, other: Entry) -> None:
        if other.worker == self._worker:
            self._supersede(other.connection)
        else:
            self._registry.say(f"supersede {other.worker} {other.connection}")

    def _supersede(self, connection: str) -> None:
        if connection in self._coming:
            self._coming[connection] = False
        else:
            self._house.supersede(connection)

    # Questions between workers.

    def _ask(self, session: str, own: list[Entry], done: Callable[[Entry], None]) -> None:
        ticket = secrets.token_hex(8)
        question = self._questions[ticket] = _Question(own, done)
        self._answer(ticket, self._worker, self._house.quietest(session))
        if question.unanswered:
            self._registry.say(f"heard? {ticket} {session}")
            asyncio.get_running_loop().call_later(ANSWER_SECONDS, self._decide, ticket)

    def hear(self, payload: bytes) -> None:
        """What some worker said to all of them. Anything else is ignored."""
        match payload.decode(errors="replace").split(" ", 2):
            case ["heard?", ticket, session] if ticket not in self._questions:
                heard = self._house.quietest(session)
                if heard is not None:
                    said = f"{self._worker} {heard.microseconds} {heard.connection}"
                    self._registry.say(f"heard {ticket} {said}")
            case ["heard", ticket, answer]:
                worker, _, rest = answer.partition(" ")
                microseconds, _, connection = rest.partition(" ")
                if _MICROSECONDS.fullmatch(microseconds):
                    self._answer(ticket, worker, Heard(int(microseconds), connection))
            case ["supersede", worker, connection] if worker == self._worker:
                self._supersede(connection)
            case _:
                pass

    def _answer(self, ticket: str, worker: str, heard: Heard | None) -> None:
        question = self._questions.get(ticket)
        if question is None or worker not in question.unanswered:
            return
        question.unanswered.discard(worker)
        # One that has no place any more, and has not yet heard of it, has none to give.
        if heard is not None and (entry := question.own.get((worker, heard.connection))):
            question.heard.append((heard, entry))
        if not question.unanswered:
            self._decide(ticket)

    def _decide(self, ticket: str) -> None:
        question = self._questions.pop(ticket, None)
        if question is None:
            return
        if question.heard:
            _, other = min(question.heard, key=lambda pair: pair[0])
        else:
            # Their workers are gone, or too busy to tell.
            other = min(question.own.values(), key=lambda entry: entry.since)
        question.done(other)

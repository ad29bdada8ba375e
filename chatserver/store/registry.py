"""Who is connected where: one hash per user, shared by all workers.

An entry names its worker, and counts only while that worker's lease lives: one that crashed locks
nobody out. It is renewed with the connection's token, so that what nobody renews ends by itself.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

from chatserver.core.claims import MAX_LIFETIME
from chatserver.core.errors import StoreUnavailable
from chatserver.store import keys
from chatserver.store.link import ANNOUNCE, REGISTER, Call, Lane, Reply, understood
from chatserver.store.revocations import LEASE_MILLISECONDS, living_leases

ENTRY_SECONDS = 2 * MAX_LIFETIME
"""A connection that outlives its token by so much does not exist."""
RETRY_SECONDS = 1.0
UNDONE = 100_000
"""Removals that the store has not taken yet; beyond it they end with ENTRY_SECONDS."""


class Entry(NamedTuple):
    """One connection. ``since`` in milliseconds since the epoch."""

    user: str
    session: str
    worker: str
    connection: str
    since: int
    address: str


class Full(NamedTuple):
    """As many connections as the user may have."""

    entries: list[Entry]


Registered = Callable[[Full | StoreUnavailable | None], None]


class Registry:
    """This worker's connections, made known. ``run`` must be a task."""

    def __init__(self, lane: Lane, worker: str, most: int) -> None:
        self._lane = lane
        self._worker = worker
        self._most = most
        self._undone: dict[tuple[str, str], None] = {}

    def register(self, entry: Entry, done: Registered, *, instead_of: Entry | None = None) -> None:
        """``done(None)`` when it is; whoever gets anything else has registered nothing.

        ``instead_of``: another of the user's, which gives up its place if it still has one.
        """

        def answer(registered: Full | StoreUnavailable | None) -> None:
            if isinstance(registered, StoreUnavailable):
                self.unregister(entry)  # it may have happened
            done(registered)

        self._submit(entry, answer, instead_of=instead_of)

    def renew(self, entry: Entry, done: Registered) -> None:
        """Say again that this connection is there, whatever the number of others.

        ``done(Full)``: it is not, for one of its session has its place.
        """
        self._submit(entry, done, again=True)

    def _submit(
        self,
        entry: Entry,
        done: Registered,
        *,
        instead_of: Entry | None = None,
        again: bool = False,
    ) -> None:
        def parse(reply: Reply) -> Full | None:
            done, *flat = reply
            return None if done == 1 else Full(_entries(entry.user, flat))

        self._lane.submit(
            REGISTER.command(
                [keys.connections(entry.user), keys.WORKERS],
                [
                    _field(entry),
                    f"{entry.since} {entry.address or '-'}",
                    entry.session,
                    self._most,
                    LEASE_MILLISECONDS,
                    ENTRY_SECONDS,
                    _field(instead_of) if instead_of else "",
                    int(again),
                ],
            ),
            understood(parse, done),
        )

    def unregister(self, entry: Entry) -> None:
        self._remove(entry.user, _field(entry))

    def say(self, message: str) -> None:
        """Tell all workers something that may be lost."""
        self._lane.submit([ANNOUNCE, keys.CHANNEL, message], _ignore)

    async def run(self) -> None:
        """Repeat what the store has not taken."""
        while True:
            await asyncio.sleep(RETRY_SECONDS)
            undone, self._undone = self._undone, {}
            for user, field in undone:
                self._remove(user, field)

    def _remove(self, user: str, field: str) -> None:
        self._lane.submit(
            ["HDEL", keys.connections(user), field], partial(self._removed, user, field)
        )

    def _removed(self, user: str, field: str, reply: Reply | StoreUnavailable) -> None:
        if isinstance(reply, StoreUnavailable) and len(self._undone) < UNDONE:
            self._undone[user, field] = None


async def connections(call: Call, user: str) -> list[Entry]:
    """A user's connections on workers that live, in a settled order."""
    flat, leases = await asyncio.gather(
        call(["HGETALL", keys.connections(user)]), living_leases(call)
    )
    workers = {lease.worker for lease in leases}
    found = [entry for entry in _entries(user, flat) if entry.worker in workers]
    return sorted(found, key=lambda entry: (entry.session, entry.since, entry.connection))


def _field(entry: Entry) -> str:
    return f"{entry.worker}/{entry.connection}"


def _entries(user: str, flat: list[bytes]) -> list[Entry]:
    found = []
    for field, value in zip(flat[::2], flat[1::2], strict=True):
        worker, _, connection = field.decode().partition("/")
        since, address, session = value.decode().split(" ", 2)
        found.append(Entry(user, session, worker, connection, int(since), address))
    return found


def _ignore(reply: Reply | StoreUnavailable) -> None:
    """What is lost here shows later."""

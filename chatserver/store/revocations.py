"""Revocations: written for everyone, mirrored in each worker, confirmed by all.

The keys are a contract, so that any service can check them (their TTL is what is left):

- ``chat:{auth}:revoked:session:<sid>`` and ``chat:{auth}:revoked:token:<jti>`` exist or not;
- ``chat:{auth}:revoked:user:<user>`` holds the cutoff: ``iat`` up to it, in seconds, is revoked.

A worker does not ask them: it follows the stream beside them, woken by pub/sub and by a beat of
once a second, because pub/sub may lose a message and go deaf without an error.

With each look at the stream a worker renews its *lease* and says which entry it has applied. A
lease lasts exactly as long as the worker believes what it saw, so whoever revokes needs to wait
for nobody else: a worker without a lease refuses everything.
"""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from chatserver import telemetry
from chatserver.core.claims import Identity
from chatserver.core.errors import StoreUnavailable
from chatserver.core.session import (
    CLOCK_TOLERANCE,
    REFRESH_SECONDS,
    REVOCATION_SECONDS,
    STALE_SECONDS,
    Kind,
    Revocation,
    RevocationList,
)
from chatserver.metrics import measured
from chatserver.store import keys
from chatserver.store.link import ANNOUNCE, POLL, REVOKE, Call, Lane, Reply
from chatserver.store.topology import Argument

STREAM_MILLISECONDS = 20 * 60 * 1000
BEAT_SECONDS = 1.0
POLL_ENTRIES = 1000
LEASE_MILLISECONDS = int(STALE_SECONDS * 1000)
COUNTER_SECONDS = 60
CONFIRM_SECONDS = 3.0
"""How long a revocation waits for the workers. Whoever has not confirmed by then has no lease."""
LOOK_SECONDS = (0.002, 0.05)
"""Between two looks at the leases: the first time and the longest."""
RIGHTS = "rights"
"""Kind of an entry that revokes nothing: a session's next token has other rights."""

log = telemetry.logger(__name__)


# --- revoking ------------------------------------------------------------------------------


class Outcome(NamedTuple):
    """What a revocation has done."""

    closed: int
    """Connections that it ended."""
    complete: bool
    """Every worker has said so. One that has not refuses everything."""


def _revoke_command(kind: Kind, value: str, seconds: int, cutoff: Argument) -> list[Argument]:
    match kind:
        case Kind.SESSION:
            beside = keys.family(value)
        case Kind.USER:
            beside = keys.ended(value)
        case Kind.TOKEN:
            beside = keys.record(kind, value)
    # The last refresh token that a cutoff covers is as old as that.
    forgetting = REFRESH_SECONDS + 60
    return REVOKE.command(
        [keys.record(kind, value), keys.STREAM, beside],
        [kind, value, seconds, keys.CHANNEL, cutoff, STREAM_MILLISECONDS, forgetting, ANNOUNCE],
    )


async def store_revocation(call: Call, kind: Kind, value: str, *, reason: str = "") -> str:
    """Revoke, and do not wait for the workers, which apply it within milliseconds.

    Returns the entry's id. Raises StoreUnavailable: then it may or may not have happened, and
    repeating it is safe.
    """
    entry, _ = await call(_revoke_command(kind, value, REVOCATION_SECONDS, ""))
    log.info("revoked", kind=kind.value, value=value, reason=reason)
    return str(entry.decode())


async def revoke(call: Call, kind: Kind, value: str, *, reason: str = "") -> Outcome:
    """Revoke for everyone, and return when nobody accepts it any more: within 3 seconds.

    Raises StoreUnavailable: then it may or may not have happened, and repeating it is safe.
    """
    entry = await store_revocation(call, kind, value, reason=reason)
    # After it: who gets a lease later has read the entry.
    leases = await living_leases(call)
    return await _confirmed(call, entry, {lease.worker for lease in leases})


async def _confirmed(call: Call, entry: str, waited_for: set[str]) -> Outcome:
    deadline = time.monotonic() + CONFIRM_SECONDS
    pause, longest = LOOK_SECONDS
    silent: set[str] = set()
    while waited_for:
        leases = {lease.worker: lease for lease in await living_leases(call)}
        silent |= waited_for - leases.keys()
        waited_for = {
            worker
            for worker in waited_for & leases.keys()
            if _place(leases[worker].applied) < _place(entry)
        }
        if time.monotonic() > deadline:
            silent |= waited_for
            break
        if waited_for:
            await asyncio.sleep(pause)
            pause = min(2 * pause, longest)
    counts = await call(["HVALS", keys.closed(entry)])
    return Outcome(closed=sum(map(int, counts)), complete=not silent)


async def cutoff(call: Call, user: str) -> int:
    """The user's last revocation, seconds since the epoch; 0 when there is none."""
    return int(await call(["GET", keys.record(Kind.USER, user)]) or 0)


# --- leases --------------------------------------------------------------------------------


class Lease(NamedTuple):
    """A worker that serves, and how far it has followed the revocations."""

    worker: str
    renewed_at: int
    """Milliseconds since the epoch, by the store's clock."""
    applied: str
    about: Mapping[str, Any]
    """What it tells of itself."""


async def living_leases(call: Call) -> list[Lease]:
    """Every worker that may be serving anybody."""
    flat, (seconds, microseconds) = await asyncio.gather(  # one round trip
        call(["HGETALL", keys.WORKERS]), call(["TIME"])
    )
    now = int(seconds) * 1000 + int(microseconds) // 1000
    leases = [_lease(flat[i], flat[i + 1]) for i in range(0, len(flat), 2)]
    return [lease for lease in leases if lease.renewed_at + LEASE_MILLISECONDS > now]


def _lease(worker: bytes, said: bytes) -> Lease:
    renewed_at, applied, about = said.decode().split(" ", 2)
    return Lease(worker.decode(), int(renewed_at), applied, json.loads(about))


# --- following -----------------------------------------------------------------------------


class Follower(Protocol):
    """Who is told what the stream says: the hub."""

    def revoke(self, revocation: Revocation) -> int:
        """Something is revoked that was not. Returns how many connections it ended."""

    def rights_changed(self, session: str) -> None:
        """The session's next token has other rights."""

    def lease_lapsed(self) -> None:
        """Others may have taken this worker for dead, and its connections for gone."""

    def about(self) -> dict[str, object]:
        """What to tell of this worker."""


class Mirror:
    """A worker's copy of the list, and whether it may be believed. ``run`` must be a task."""

    def __init__(self, lane: Lane, worker: str, follower: Follower) -> None:
        self._lane = lane
        self._worker = worker
        self._follower = follower
        self._list = RevocationList()
        self._last = "0-0"
        self._counts: dict[str, int] = {}
        """Connections closed for an entry, not yet told."""
        self.incarnation: bytes | None = None
        """The store's name, and salt of its refresh keys; None until the first look."""
        self._history: bytes | None = None
        """The store's replication id: another one means that its latest entries may be others."""
        self._confirmed_at = float("-inf")
        self.skewed = False
        """The clock here is not the store's: times in tokens cannot be judged."""
        self._told_stale = False
        self._wake = asyncio.Event()

    @property
    def loaded(self) -> bool:
        """Whether the list was read once; it may not be believed for all that."""
        return self._confirmed_at > float("-inf")

    def fresh(self) -> bool:
        """Whether nothing revoked more than a moment ago can be missing here."""
        return not self.skewed and time.monotonic() - self._confirmed_at < STALE_SECONDS

    def covers(self, identity: Identity) -> bool:
        return self._list.covers(identity)

    def wake(self) -> None:
        """Something was revoked: look now, not at the next beat."""
        self._wake.set()

    async def run(self) -> None:
        while True:
            try:
                while await self._poll():
                    pass
            except StoreUnavailable as error:
                self._tell_stale(error)
            try:
                async with asyncio.timeout(BEAT_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                continue
            finally:
                self._wake.clear()

    def revoke(
        self,
        kind: Kind,
        value: str,
        *,
        reason: str,
        done: Callable[[StoreUnavailable | None], None],
    ) -> None:
        """Revoke from here, without waiting for other workers. ``done`` is called before any
        connection of this worker is ended for it: one lane carries both answers."""

        def stored(reply: Reply | StoreUnavailable) -> None:
            if isinstance(reply, StoreUnavailable):
                done(reply)
                return
            log.info("revoked", kind=kind.value, value=value, reason=reason)
            done(None)

        self._lane.submit(_revoke_command(kind, value, REVOCATION_SECONDS, ""), stored)

    async def resign(self) -> None:
        """Nobody is served here any more: nobody needs to wait for this worker."""
        with suppress(StoreUnavailable):  # the lease ends by itself, too
            await self._lane.call(["HDEL", keys.WORKERS, self._worker])

    async def _poll(self) -> bool:
        """Read on from the last entry. True when there is more to read or to tell now."""
        # The time before the question: a process that was stopped between question and answer
        # must not take an old answer for a new one.
        asked_at, asked_wall = time.monotonic(), time.time()
        counts, self._counts = self._counts, {}
        try:
            seen = await self._lane.fetch(self._question(counts), _sight)
        except StoreUnavailable:
            self._counts = counts | self._counts
            raise
        store_time, incarnation, history, lapsed, entries = seen
        other = self._is_other(incarnation, history)
        if other or lapsed or asked_at - self._confirmed_at > STALE_SECONDS:
            # Connections may not be known to it: the lease may have ended in an answer lost.
            self._follower.lease_lapsed()
        if other:
            # Should it fail half way, the store is still another one, and all is done again.
            await self._write_back(store_time)
        self.incarnation, self._history = incarnation, history
        if other:
            return True
        for name, fields in entries:
            self._last = name
            self._apply(fields)
        if len(entries) < POLL_ENTRIES:
            # By the store's clock, which set the times: ours may step ahead and back again.
            self._list.forget(store_time)
            self._judge_clock(store_time, asked_wall)
            self._confirmed_at = asked_at
            measured.mirror_confirmed_timestamp_seconds = asked_wall
            self._told_stale = False
        return bool(entries)  # what was applied is told at once: somebody may wait for it

    def _question(self, counts: Mapping[str, int]) -> list[Argument]:
        about = json.dumps(self._follower.about())
        return POLL.command(
            [keys.STREAM, keys.INCARNATION, keys.WORKERS, *map(keys.closed, counts)],
            [
                self._last,
                new_incarnation(),
                POLL_ENTRIES,
                self._worker,
                about,
                LEASE_MILLISECONDS,
                COUNTER_SECONDS,
                *counts.values(),
            ],
        )

    def _is_other(self, incarnation: bytes, history: bytes) -> bool:
        """Whether the store was emptied, or its history may have forked: after a failover, a
        restart, or when a file was put back. Its latest entries do not tell: there may be new ones
        behind those that are gone, and others before the last that was seen."""
        known = self.incarnation, self._history
        return known != (None, None) and known != (incarnation, history)

    async def _write_back(self, now: float) -> None:
        """Give the store what it lacks of what is known here; all is to be read again."""
        self._last = "0-0"
        alive = [entry for entry in self._list.entries() if entry.until > now]
        lacking = await self._lacking(alive)
        if lacking:
            log.warning("store has lost revocations", written_back=len(lacking))
        for entry in lacking:
            seconds = min(int(entry.until - now) + 1, REVOCATION_SECONDS)
            await self._lane.call(_revoke_command(entry.kind, entry.value, seconds, entry.cutoff))

    async def _lacking(self, entries: list[Revocation]) -> list[Revocation]:
        """Those of the entries that the store does not have."""
        found: list[Revocation] = []
        for start in range(0, len(entries), POLL_ENTRIES):
            some = entries[start : start + POLL_ENTRIES]
            names = [keys.record(entry.kind, entry.value) for entry in some]
            cutoffs = await self._lane.fetch(["MGET", *names], _cutoffs)
            found += [e for e, kept in zip(some, cutoffs, strict=True) if kept < e.cutoff]
        return found

    def _apply(self, flat: list[bytes]) -> None:
        try:
            texts = [text.decode() for text in flat]
            fields = dict(zip(texts[::2], texts[1::2], strict=True))
            if fields["kind"] == RIGHTS:
                self._follower.rights_changed(fields["value"])
                return
            revocation = Revocation(
                Kind(fields["kind"]), fields["value"], int(fields["until"]), int(fields["cutoff"])
            )
        except (AttributeError, KeyError, TypeError, ValueError):
            measured.garbage_messages += 1
            log.warning("ignored an entry that is no revocation")
            return
        if not self._list.add(revocation):
            return
        if closed := self._follower.revoke(revocation):
            self._counts[self._last] = closed
        measured.revocations.count(revocation.kind)
        if self.loaded:  # At the start it is not late: nobody is here yet.
            entered_at = _place(self._last)[0] / 1000
            lag = time.time() - measured.clock_offset_seconds - entered_at
            measured.revocation_lag_seconds.observe(lag)

    def _judge_clock(self, store_time: float, asked_wall: float) -> None:
        # The store's time lies between question and answer.
        now = time.time()
        ahead = max(asked_wall - store_time, 0.0) or min(now - store_time, 0.0)
        measured.clock_offset_seconds = ahead
        skewed = abs(ahead) > CLOCK_TOLERANCE
        if skewed and not self.skewed:
            log.error(
                "clock differs from the store's; refusing tokens", seconds=round(abs(ahead), 1)
            )
        self.skewed = skewed

    def _tell_stale(self, error: StoreUnavailable) -> None:
        if not self._told_stale and time.monotonic() - self._confirmed_at > STALE_SECONDS:
            self._told_stale = True
            log.warning("revocations are not current; refusing tokens", reason=str(error))


class Sight(NamedTuple):
    """What a look at the stream shows."""

    store_time: float
    """Seconds since the epoch."""
    incarnation: bytes
    history: bytes
    """Its replication id."""
    lapsed: bool
    """This worker had no lease."""
    entries: list[tuple[str, list[bytes]]]


def _sight(reply: Reply) -> Sight:
    seconds, microseconds, incarnation, history, lapsed, *entries = reply
    if not isinstance(incarnation, bytes) or not isinstance(history, bytes):
        raise TypeError("both are names")
    found = [(name.decode(), fields) for name, fields in entries]
    for name, _ in found:
        _place(name)
    return Sight(int(seconds) + int(microseconds) / 1e6, incarnation, history, bool(lapsed), found)


def _cutoffs(reply: Reply) -> list[int]:
    """What records hold; less than any cutoff where there is none."""
    return [-1 if record is None else int(record) for record in reply]


def new_incarnation() -> str:
    """A name for a store that has none; also the salt of its refresh keys, so 256 bits."""
    return secrets.token_hex(32)


def _place(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence)

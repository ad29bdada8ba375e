"""Revocations: written for everyone, mirrored in each worker.

The keys are a contract, so that any service can check them (their TTL is what is left):

- ``chat:{auth}:revoked:session:<sid>`` and ``chat:{auth}:revoked:token:<jti>`` exist or not;
- ``chat:{auth}:revoked:user:<user>`` holds the cutoff: ``iat`` up to it, in seconds, is revoked.

A worker does not ask them: it follows the stream beside them, woken by pub/sub and by a beat of
once a second, because pub/sub may lose a message and go deaf without an error.
"""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import Callable

from chatserver import telemetry
from chatserver.core.claims import Identity
from chatserver.core.errors import StoreUnavailable
from chatserver.core.session import (
    CLOCK_TOLERANCE,
    REVOCATION_SECONDS,
    STALE_SECONDS,
    Kind,
    Revocation,
    RevocationList,
)
from chatserver.store.link import POLL, REVOKE, Argument, Lane, Reply, Store

STREAM = "chat:{auth}:revocations"
INCARNATION = "chat:{auth}:incarnation"
CHANNEL = "chat:{auth}:live"
STREAM_MILLISECONDS = 20 * 60 * 1000
BEAT_SECONDS = 1.0
POLL_ENTRIES = 1000

log = telemetry.logger(__name__)


def _record(kind: Kind, value: str) -> str:
    return f"chat:{{auth}}:revoked:{kind}:{value}"


def _revoke_command(kind: Kind, value: str, seconds: int, cutoff: Argument) -> list[Argument]:
    keys = [_record(kind, value), STREAM]
    return REVOKE.command(keys, [kind, value, seconds, CHANNEL, cutoff, STREAM_MILLISECONDS])


async def revoke(store: Store, kind: Kind, value: str, *, reason: str = "") -> None:
    """Revoke for everyone. Returns when it is stored; workers apply it within milliseconds.

    Raises StoreUnavailable: then it may or may not have happened, and repeating it is safe.
    """
    await store.call(_revoke_command(kind, value, REVOCATION_SECONDS, ""))
    log.info("revoked", kind=kind.value, value=value, reason=reason)


async def cutoff(store: Store, user: str) -> int:
    """The user's last revocation, seconds since the epoch; 0 when there is none."""
    return int(await store.call(["GET", _record(Kind.USER, user)]) or 0)


class Mirror:
    """This worker's copy of the list, and whether it may be believed.

    ``on_revoked`` is called for each entry that is new here. ``run`` must be a task.
    """

    def __init__(self, lane: Lane, on_revoked: Callable[[Revocation], None]) -> None:
        self._lane = lane
        self._on_revoked = on_revoked
        self._list = RevocationList()
        self._last = "0-0"
        self._incarnation: bytes | None = None
        self._confirmed_at = float("-inf")
        self._skewed = False
        self._wake = asyncio.Event()

    def fresh(self) -> bool:
        """Whether nothing revoked more than a moment ago can be missing here."""
        return not self._skewed and time.monotonic() - self._confirmed_at < STALE_SECONDS

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
            except StoreUnavailable:
                pass  # the lane told; the bound is what matters, and it is checked at each use
            self._list.forget(time.time())
            try:
                async with asyncio.timeout(BEAT_SECONDS):
                    await self._wake.wait()
            except TimeoutError:
                continue
            finally:
                self._wake.clear()

    async def _poll(self) -> bool:
        """Read on from the last entry. True when there is more to read now."""
        # The time before the question: a process that was stopped between question and answer
        # must not take an old answer for a new one.
        asked_at, asked_wall = time.monotonic(), time.time()
        reply: Reply = await self._lane.call(
            POLL.command([STREAM, INCARNATION], [self._last, secrets.token_hex(8), POLL_ENTRIES])
        )
        seconds, microseconds, incarnation, latest, *entries = reply
        if await self._came_back_other(incarnation, latest.decode()):
            return True
        for name, fields in entries:
            self._last = name.decode()
            self._apply(fields)
        if len(entries) == POLL_ENTRIES:
            return True
        self._judge_clock(seconds + microseconds / 1e6, asked_wall)
        self._confirmed_at = asked_at
        return False

    async def _came_back_other(self, incarnation: bytes, latest: str) -> bool:
        """The store was emptied, or is an older copy: give back what is known here, reload."""
        known = self._incarnation
        lost = _place(latest) < _place(self._last) and latest != "0-0"
        if known in (None, incarnation) and not lost:
            self._incarnation = incarnation
            return False
        # No store's name: should writing back fail half way, all of it is done again.
        self._incarnation = b""
        self._last = "0-0"
        now = time.time()
        kept = [entry for entry in self._list.entries() if entry.until > now]
        log.warning("store has lost revocations", written_back=len(kept))
        for entry in kept:
            seconds = min(int(entry.until - now) + 1, REVOCATION_SECONDS)
            await self._lane.call(_revoke_command(entry.kind, entry.value, seconds, entry.cutoff))
        self._incarnation = incarnation
        return True

    def _apply(self, flat: list[bytes]) -> None:
        try:
            texts = [text.decode() for text in flat]
            fields = dict(zip(texts[::2], texts[1::2], strict=True))
            revocation = Revocation(
                Kind(fields["kind"]), fields["value"], int(fields["until"]), int(fields["cutoff"])
            )
        except (KeyError, ValueError):
            log.warning("ignored an entry that is no revocation")
            return
        if self._list.add(revocation):
            self._on_revoked(revocation)

    def _judge_clock(self, store_time: float, asked_wall: float) -> None:
        # The store's time lies between question and answer.
        now = time.time()
        ahead = max(asked_wall - store_time, store_time - now, 0.0)
        skewed = ahead > CLOCK_TOLERANCE
        if skewed and not self._skewed:
            log.error("clock differs from the store's; refusing tokens", seconds=round(ahead, 1))
        self._skewed = skewed


def _place(entry: str) -> tuple[int, int]:
    milliseconds, _, sequence = entry.partition("-")
    return int(milliseconds), int(sequence)

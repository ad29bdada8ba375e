"""The hub: this worker's connections by session and user, and the effects they ask for.

``ChatProtocol`` decides; the hub carries out, in order, and brings the answers back. It is
where a revocation finds its sockets.
"""

from __future__ import annotations

import asyncio
import os
import random
import secrets
import socket
import time
from collections.abc import Iterator
from functools import partial
from typing import assert_never

from chatserver import telemetry
from chatserver.core import errors, frames
from chatserver.core.claims import Identity
from chatserver.core.effects import (
    Abandon,
    Admit,
    Close,
    Effect,
    Ended,
    EndSession,
    Failed,
    Identify,
    Join,
    Leave,
    Outcome,
    Page,
    Publish,
    Published,
    Read,
    Refused,
    Resume,
    Transmit,
    Verified,
    Verify,
    Withhold,
)
from chatserver.core.errors import Disconnect, ReplyCode, StoreUnavailable, TokenRefused
from chatserver.core.flow import Limits, Verdict, judge_reader
from chatserver.core.protocol import PAGE_BYTES, ChatProtocol
from chatserver.core.room import Reading, has_more
from chatserver.core.session import Kind, Revocation
from chatserver.metrics import ACCEPTED, DUPLICATE, STORED, measured
from chatserver.net.connection import PING, Connection, Phase, farewell
from chatserver.net.fanout import Fanout
from chatserver.net.superseding import Heard, Superseding
from chatserver.net.wheel import Wheel
from chatserver.store.keyring import Keyring
from chatserver.store.log import RoomLog
from chatserver.store.registry import Entry, Registered, Registry
from chatserver.store.revocations import Mirror

DRAIN_BATCH_SECONDS = 0.05
DRAIN_RATE = 2000
"""Connections told to leave in a second when there are too few to fill the drain window."""

log = telemetry.logger(__name__)

RENEW_BATCH = 500
RENEW_SECONDS = 0.05
"""Ten thousand connections are made known again within a second."""
SEVER_BATCH = 500
SEVER_SECONDS = 0.25
"""How long a revoked peer may keep its end of the connection; it is not listened to any more."""

_REVOKED = farewell(errors.SESSION_REVOKED)
_REVOKED_CODE = str(errors.SESSION_REVOKED.code)
_UNAVAILABLE = Failed(ReplyCode.UNAVAILABLE)


class Index:
    """Connections by a name they share. Most names have one: no set for it."""

    def __init__(self) -> None:
        self._entries: dict[str, Connection | set[Connection]] = {}

    def add(self, name: str, connection: Connection) -> None:
        known = self._entries.get(name)
        if known is None:
            self._entries[name] = connection
        elif isinstance(known, set):
            known.add(connection)
        else:
            self._entries[name] = {known, connection}

    def remove(self, name: str, connection: Connection) -> None:
        known = self._entries.get(name)
        if known is connection:
            del self._entries[name]
        elif isinstance(known, set):
            known.discard(connection)
            if not known:
                del self._entries[name]

    def get(self, name: str) -> list[Connection]:
        known = self._entries.get(name)
        if known is None:
            return []
        return list(known) if isinstance(known, set) else [known]


class Hub:
    """All connections whose handshake has succeeded."""

    def __init__(
        self,
        *,
        keyring: Keyring,
        room_log: RoomLog,
        limits: Limits,
        ping_timeout: float,
        slow_seconds: float,
        registry: Registry,
        worker: str,
    ) -> None:
        self._keyring = keyring
        self._log = room_log
        self._limits = limits
        self._ping_timeout = ping_timeout
        self._slow_seconds = slow_seconds
        self._registry = registry
        self._worker = worker
        self.superseding = Superseding(registry, worker, self)
        self._began_at = int(time.time() * 1000)
        self._mirror: Mirror | None = None
        self._connections: dict[str, Connection] = {}
        self._by_session = Index()
        self._by_user = Index()
        self.wheel: Wheel[Connection] = Wheel(self._handle_timer)
        self.fanout = Fanout(room_log, fresh=self.fresh, disconnect=self.disconnect)

    def attach(self, mirror: Mirror) -> None:
        """Where to check revocations; made with ``revoke`` of this."""
        self._mirror = mirror

    def __len__(self) -> int:
        return len(self._connections)

    def __iter__(self) -> Iterator[Connection]:
        return iter(list(self._connections.values()))

    # Tokens.

    def fresh(self) -> bool:
        """Whether revocations are current: nothing is accepted or delivered otherwise."""
        return self._mirror is not None and self._mirror.fresh()

    def verify(self, token: str) -> Identity:
        """Raises TokenRefused, or StoreUnavailable while revocations cannot be checked."""
        assert self._mirror is not None
        if self._mirror.skewed:
            raise StoreUnavailable("by a wrong clock a good token looks expired")
        identity = self._keyring.verify(token, now=time.time())
        self.vouch(identity)
        return identity

    def vouch(self, identity: Identity) -> None:
        """Raises as ``verify``, when it is no longer good."""
        assert self._mirror is not None
        if self._mirror.covers(identity):
            raise TokenRefused(ReplyCode.TOKEN_REVOKED)
        if not self.fresh():
            raise StoreUnavailable("revocations are not current")
        if time.time() >= identity.expires_at:
            raise TokenRefused(ReplyCode.TOKEN_EXPIRED)

    # A connection's life.

    def register(
        self, connection: Connection, identity: Identity, address: str, done: Registered
    ) -> None:
        """Make it known to all workers, if its user may have one more or one of the session's can
        go for it: the one that was silent longest. ``done`` comes later."""
        connection.id = secrets.token_urlsafe(9)
        connection.since = int(time.time() * 1000)
        connection.address = connection.peer if address == connection.peer else address
        self.superseding.register(self._entry(connection, identity), done)

    def unregister(self, connection: Connection, identity: Identity) -> None:
        """It came to nothing."""
        self._registry.unregister(self._entry(connection, identity))

    def quietest(self, session: str) -> Heard | None:
        found = self._by_session.get(session)
        quietest = min(found, key=lambda connection: connection.received_at, default=None)
        if quietest is None:
            return None
        silence = time.monotonic() - quietest.received_at
        return Heard(int((time.time() - silence) * 1_000_000), quietest.id)

    def supersede(self, connection: str) -> None:
        found = self._connections.get(connection)
        if found is not None:
            self.disconnect(found, errors.SUPERSEDED)

    def _entry(self, connection: Connection, identity: Identity) -> Entry:
        return Entry(
            user=identity.user,
            session=identity.session,
            worker=self._worker,
            connection=connection.id,
            since=connection.since,
            address=connection.address,
        )

    def add(self, connection: Connection, identity: Identity) -> bytes:
        """From here on it is served. No await may stand between ``vouch`` and this.

        Returns the frame to begin with.
        """
        now = time.time()
        connection.chat = ChatProtocol(connection.id, identity, self._limits, now)
        connection.expires_at = identity.expires_at
        self._connections[connection.id] = connection
        self._by_session.add(identity.session, connection)
        self._by_user.add(identity.user, connection)
        # Spread over the interval, so that those who came together are not pinged together.
        loop_now = asyncio.get_running_loop().time()
        first_ping = loop_now + self._limits.ping_interval * random.random()
        self._schedule(connection, min(first_ping, self._wake_at(connection, loop_now)))
        (welcome,) = connection.chat.effects()
        assert isinstance(welcome, Transmit)
        return welcome.payload

    def remove(self, connection: Connection, ending: str) -> None:
        """The connection is lost, or will be. ``ending`` is the close code to count it under."""
        if self._connections.pop(connection.id, None) is None:
            return
        measured.closes.count(_REVOKED_CODE if connection.revoked else ending)
        identity = connection.chat.identity
        self._by_session.remove(identity.session, connection)
        self._by_user.remove(identity.user, connection)
        self.unregister(connection, identity)
        self.fanout.leave_all(connection)
        for room in connection.openings or ():
            self.fanout.abandon(room)
        connection.openings = None
        connection.chat.disconnect(errors.SERVER_ERROR)  # late answers find it closed
        connection.chat.effects()

    def receive(self, connection: Connection, message: bytes) -> None:
        """One text message."""
        measured.received_frames += 1
        try:
            connection.chat.receive_frame(message, time.time())
            self._run(connection)
        except Exception:  # noqa: BLE001 (see _fail)
            self._fail(connection)

    def stalled(self, connection: Connection) -> None:
        self.fanout.hold_back(connection)
        if connection.lagging_since is None:
            connection.lagging_since = time.monotonic()
        self._reschedule(connection)

    def drained(self, connection: Connection) -> None:
        self.fanout.catch_up(connection)

    def disconnect(self, connection: Connection, why: Disconnect) -> None:
        if connection.phase is Phase.OPEN:
            connection.chat.disconnect(why)
            self._run(connection)

    # What the store says: revocations.Follower.

    def revoke(self, revocation: Revocation) -> int:
        """End every connection that the revocation covers; returns how many."""
        match revocation.kind:
            case Kind.SESSION:
                found = self._by_session.get(revocation.value)
            case Kind.USER:
                found = self._by_user.get(revocation.value)
            case Kind.TOKEN:
                # Rare enough to look at all of them, 2 ms for 20,000.
                found = list(self)
        covered = [c for c in found if not c.revoked and revocation.covers(c.chat.identity)]
        for connection in covered:
            connection.revoked = True
            connection.deafen()
        self._sever(covered)
        return len(covered)

    def rights_changed(self, session: str) -> None:
        """Have the session's clients get a new token now."""
        for connection in self._by_session.get(session):
            connection.chat.tell_rights_changed()
            self._run(connection)

    def lease_lapsed(self) -> None:
        """Make all connections known again."""
        self._renew(list(self))

    def _renew(self, connections: list[Connection]) -> None:
        batch, rest = connections[:RENEW_BATCH], connections[RENEW_BATCH:]
        for connection in batch:
            if connection.id in self._connections:
                self.superseding.renew(self._entry(connection, connection.chat.identity))
        if rest:
            asyncio.get_running_loop().call_later(RENEW_SECONDS, self._renew, rest)

    def lagging(self) -> int:
        """Connections whose reader is behind; of an expired one it is not the reader's fault."""
        now = time.time()
        return sum(
            connection.lagging_since is not None and connection.expires_at > now
            for connection in self._connections.values()
        )

    def about(self) -> dict[str, object]:
        return {
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "since": self._began_at,
            "connections": len(self),
            "rooms": len(self.fanout),
        }

    def _sever(self, connections: list[Connection]) -> None:
        """Close frames first, so that the last of a thousand leaves early; forget them after."""
        loop = asyncio.get_running_loop()
        batch, rest = connections[:SEVER_BATCH], connections[SEVER_BATCH:]
        for connection in batch:
            connection.sever(_REVOKED)
        loop.call_soon(self._forget, batch)
        if rest:
            loop.call_soon(self._sever, rest)

    def _forget(self, severed: list[Connection]) -> None:
        for connection in severed:
            self.remove(connection, _REVOKED_CODE)
        asyncio.get_running_loop().call_later(SEVER_SECONDS, _abort, severed)

    async def drain(self, seconds: float) -> None:
        """Tell every connection to leave within the time, each with its own moment to return.

        What they have under way is answered first.
        """
        leaving = list(self)
        random.shuffle(leaving)
        size = max(
            int(DRAIN_RATE * DRAIN_BATCH_SECONDS),
            int(len(leaving) * DRAIN_BATCH_SECONDS / max(seconds, DRAIN_BATCH_SECONDS)) + 1,
        )
        for start in range(0, len(leaving), size):
            for connection in leaving[start : start + size]:
                connection.chat.retire(errors.DRAINING)
                self._run(connection)
            await asyncio.sleep(DRAIN_BATCH_SECONDS)

    # Effects.

    def _run(self, connection: Connection) -> None:
        """Carry out what the connection's protocol has decided, until it wants nothing more."""
        chat = connection.chat
        while effects := chat.effects():
            for effect in effects:
                self._carry_out(connection, effect)
        connection.hold_reading(chat.congested)

    def _carry_out(self, connection: Connection, effect: Effect) -> None:
        match effect:
            case Transmit(payload):
                connection.send(payload)
            case Publish():
                self._publish(connection, effect)
            case Join():
                self._join(connection, effect)
            case Admit(room, start, opening):
                self._close_opening(connection, room)
                self.fanout.admit(connection, room, start, opening)
            case Abandon(room):
                if self._close_opening(connection, room):
                    self.fanout.abandon(room)
            case Leave(room):
                self.fanout.leave(connection, room)
            case Read():
                self._read(connection, effect)
            case Verify(ref, token):
                self._answer(connection, ref, self._verified(token))
            case EndSession(ref, session):
                self._end_session(connection, ref, session)
            case Identify(identity):
                measured.refreshes.count(ACCEPTED)
                connection.serve_until(identity.expires_at)
                self.superseding.renew(self._entry(connection, identity))
                self._reschedule(connection)
            case Withhold():
                self.fanout.hold_back(connection)
            case Resume():
                self.fanout.catch_up(connection)
            case Refused(command, code):
                _count_refusal(command, code)
            case Close(why):
                self._close(connection, why)
            case _:
                assert_never(effect)

    def _answer(self, connection: Connection, ref: int, outcome: Outcome) -> None:
        """Bring the answer back; what it leads to is run by whoever is running effects."""
        connection.chat.receive_outcome(ref, outcome, time.time())

    def _answer_later(self, connection: Connection, ref: int, outcome: Outcome) -> None:
        try:
            self._answer(connection, ref, outcome)
            self._run(connection)
        except Exception:  # noqa: BLE001 (see _fail)
            self._fail(connection)

    def _fail(self, connection: Connection) -> None:
        """A bug of ours, met by one connection: it must not end all the others with it."""
        log.exception("connection failed", connection=connection.id)
        connection.close(errors.SERVER_ERROR, None)
        self.remove(connection, str(errors.SERVER_ERROR.code))

    def _publish(self, connection: Connection, effect: Publish) -> None:
        if not self.fresh():
            self._answer(connection, effect.ref, _UNAVAILABLE)
            return
        done = partial(self._published, connection, effect.ref, time.monotonic())

        def wanted() -> bool:
            # What a revoked connection had queued is dropped before it goes out; what somebody
            # sent before saying goodbye is stored, though nobody is left to be told.
            if connection.revoked:
                return False
            if not self.fresh():
                # Stopped in between, this process may not have heard yet who was revoked.
                asyncio.get_running_loop().call_soon(done, StoreUnavailable("it is out of date"))
                return False
            return True

        self._log.publish(effect, connection.id, done, wanted)

    def _published(
        self, connection: Connection, ref: int, began: float, reply: Published | StoreUnavailable
    ) -> None:
        measured.publish_latency_seconds.observe(time.monotonic() - began)
        if isinstance(reply, StoreUnavailable):
            self._answer_later(connection, ref, _UNAVAILABLE)
            return
        measured.sends[DUPLICATE if reply.duplicate else STORED] += 1
        self._answer_later(connection, ref, reply)

    def _join(self, connection: Connection, effect: Join) -> None:
        if not self.fresh():
            self._answer(connection, effect.ref, _UNAVAILABLE)
            return
        if connection.openings is None:
            connection.openings = set()
        connection.openings.add(effect.room)

        def opened(reading: Reading | StoreUnavailable) -> None:
            if not connection.chat.closed:
                failed = isinstance(reading, StoreUnavailable) or not self.fresh()
                self._answer_later(connection, effect.ref, _UNAVAILABLE if failed else reading)  # type: ignore[arg-type]

        self.fanout.join(effect.room, effect.since, effect.last, self._limits.replay, opened)

    def _close_opening(self, connection: Connection, room: str) -> bool:
        if connection.openings is None or room not in connection.openings:
            return False
        connection.openings.discard(room)
        if not connection.openings:
            connection.openings = None
        return True

    def _read(self, connection: Connection, effect: Read) -> None:
        if not self.fresh():
            self._answer(connection, effect.ref, _UNAVAILABLE)
            return
        ref, after = effect.ref, effect.after

        def page(reading: Reading | StoreUnavailable) -> None:
            if isinstance(reading, StoreUnavailable) or not self.fresh():
                self._answer_later(connection, ref, _UNAVAILABLE)
                return
            more = has_more(reading, onwards=after is not None)
            self._answer_later(connection, ref, Page(reading, more))

        self._log.read(
            effect.room,
            page,
            after=after,
            before=effect.before,
            onwards=effect.limit,
            backwards=effect.limit,
            size=PAGE_BYTES,
            nearest=after is not None,
        )

    def _verified(self, token: str) -> Outcome:
        assert self._mirror is not None
        if self._mirror.skewed:
            return _UNAVAILABLE
        try:
            identity = self._keyring.verify(token, now=time.time())
        except TokenRefused as refused:
            return Failed(refused.code)
        if not self.fresh():
            return _UNAVAILABLE
        return Verified(identity, self._mirror.covers(identity))

    def _end_session(self, connection: Connection, ref: int, session: str) -> None:
        def done(failure: StoreUnavailable | None) -> None:
            if failure is None:
                measured.logouts.count(ACCEPTED)
            self._answer_later(connection, ref, Ended() if failure is None else _UNAVAILABLE)

        assert self._mirror is not None
        self._mirror.revoke(Kind.SESSION, session, reason="logout", done=done)

    def _close(self, connection: Connection, why: Disconnect) -> None:
        if why is errors.SESSION_REVOKED:
            connection.revoked = True
            connection.flush()  # its own logout is answered
            connection.deafen()
            self._sever([connection])
        else:
            connection.close(why, _after(why))
            self.remove(connection, str(why.code))

    # Time.

    def _handle_timer(self, connection: Connection) -> None:
        try:
            self._look_after(connection)
        except Exception:  # noqa: BLE001 (see _fail)
            self._fail(connection)

    def _look_after(self, connection: Connection) -> None:
        now = asyncio.get_running_loop().time()
        if connection.phase is not Phase.OPEN or connection.due_at > now:
            return  # of no interest any more, or scheduled anew since
        connection.chat.handle_timer(time.time())
        self._run(connection)
        if connection.phase is not Phase.OPEN:
            return
        if self._too_slow(connection):
            self.disconnect(connection, errors.SLOW_CONSUMER)
            return
        interval, pinged_at = self._limits.ping_interval, connection.pinged_at
        if connection.received_at < pinged_at:
            if now - pinged_at >= self._ping_timeout:
                self.disconnect(connection, errors.NO_PONG)
                return
            next_check = pinged_at + self._ping_timeout
        elif pinged_at and now - connection.received_at < interval:
            next_check = connection.received_at + interval
        else:
            # The first one whatever was heard, so that the next ones are spread as it is.
            connection.pinged_at = time.monotonic()
            connection.write(PING)
            next_check = now + self._ping_timeout
        self._schedule(connection, min(next_check, self._wake_at(connection, now)))

    def _too_slow(self, connection: Connection) -> bool:
        since = connection.lagging_since
        if since is None or connection.expires_at <= time.time():
            return False
        if not self.fresh():
            # Nobody is served now, so nobody is to blame.
            connection.lagging_since = time.monotonic()
            return False
        behind_for = time.monotonic() - since
        verdict = judge_reader(behind_for=behind_for, slow_seconds=self._slow_seconds)
        return verdict is Verdict.DISCONNECT

    def _schedule(self, connection: Connection, at: float) -> None:
        connection.due_at = at
        self.wheel.schedule(connection, at)

    def _wake_at(self, connection: Connection, loop_now: float) -> float:
        """The protocol's next time, by the event loop's clock."""
        wake_at = loop_now + connection.chat.wake_at() - time.time()
        if connection.lagging_since is not None:
            wake_at = min(wake_at, loop_now + 1.0)
        return wake_at

    def _reschedule(self, connection: Connection) -> None:
        """Something may be due earlier than was known: a new token's expiry, a slow reader."""
        now = asyncio.get_running_loop().time()
        self._schedule(connection, min(connection.due_at, self._wake_at(connection, now)))


def _count_refusal(command: frames.Command | None, code: ReplyCode) -> None:
    measured.refusals.count(code)
    match command:
        case frames.Send():
            measured.sends.count(code)
        case frames.Refresh():
            measured.refreshes.count(code)
        case frames.Logout():
            measured.logouts.count(code)


def _abort(connections: list[Connection]) -> None:
    for connection in connections:
        if connection.phase is not Phase.LOST:
            connection.abort()


def _after(why: Disconnect) -> int | None:
    """Milliseconds to stay away, spread so that those who left together return one by one."""
    match why:
        case errors.DRAINING | errors.OVERLOADED:
            return random.randrange(100, 2000)
        case errors.RATE_LIMITED:
            return random.randrange(2000, 5000)
        case _:
            return None

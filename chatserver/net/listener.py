"""The door: accepts sockets, bounds what is under way, answers each request.

What a request is allowed is judged in core/handshake.py; this counts, asks the hub about the
token, and sends the answer. A handshake takes one round trip to the store, in which the connection
is made known to all workers; it is read on only afterwards.
"""

from __future__ import annotations

import asyncio
import math
import random
import socket
import ssl
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from enum import Enum, auto
from functools import partial
from typing import NamedTuple

from websockets.extensions import ServerExtensionFactory
from websockets.http11 import Request as HttpRequest

from chatserver import telemetry
from chatserver.core import errors, handshake
from chatserver.core.claims import Identity
from chatserver.core.errors import Disconnect, Refusal, StoreUnavailable, TokenRefused
from chatserver.core.flow import Admission, Budgets
from chatserver.core.handshake import (
    Asset,
    Attempt,
    Deposit,
    Health,
    Login,
    Policy,
    Preflight,
    Refused,
    TokenRoute,
)
from chatserver.metrics import ABNORMAL, ACCEPTED, measured
from chatserver.net import http
from chatserver.net.connection import Accepted, Connection, Phase, prepare, text_frame
from chatserver.net.hub import Hub
from chatserver.net.tokens import TokenCounter
from chatserver.store.registry import Full

SILENT_SOCKETS = 2000
"""Accepted sockets that have not asked for anything yet.

Beyond it, or when there are no sockets left, the one that was silent longest goes: who has
something to ask does so at once, so that somebody who opens sockets and says nothing takes them
from nobody but themselves.
"""
BURST_SECONDS = 5.0
"""An address may use so many seconds of its rate at once: an office behind one address."""
TURN_SECONDS = 0.005
"""Those who wait are let in together so often: they share round trips to the store."""

ACCEPTED_AT_ONCE = 8
"""Connections accepted in one iteration of the loop, so that they share a round trip to the store.

libuv takes one from each listening descriptor; so there are as many of the one socket.
"""

_OUTCOMES = {
    str(TokenRoute.REFRESH): measured.rotations,
    str(TokenRoute.REVOKE): measured.logouts,
}
"""Where the answers of a path are counted, if not among the handshakes."""

log = telemetry.logger(__name__)


class Door(Enum):
    OPEN = auto()
    SHUT = auto()
    """The host goes: who comes is told to go elsewhere."""
    HANDED_OVER = auto()
    """Another process accepts; who was accepted here is let in, and sent on."""


class Newcomer(NamedTuple):
    """Who has asked to be let in, until the answer."""

    connection: Connection
    request: HttpRequest
    attempt: Attempt
    accepted: Accepted | None
    """What accepts the request; without it somebody only asks why they could not connect."""


class Listener:
    """One listening socket; the owner of its connections."""

    def __init__(
        self,
        hub: Hub,
        tokens: TokenCounter,
        policy: Policy,
        *,
        frame_bytes: int,
        extensions: Sequence[ServerExtensionFactory],
        handshake_rate: float,
        admission_rate: float,
        handshake_seconds: float,
        connections: int,
        sockets: int,
    ) -> None:
        self._hub = hub
        self._tokens = tokens
        self._policy = policy
        self._frame_bytes = frame_bytes
        self._extensions = extensions
        self._budgets = Budgets(handshake_rate, max(1.0, handshake_rate * BURST_SECONDS))
        self._deadline = handshake_seconds
        self._admission = Admission(
            admission_rate, burst=TURN_SECONDS, patience=handshake_seconds / 2
        )
        self._at_once = math.ceil(2 * admission_rate * TURN_SECONDS)
        self._queue: OrderedDict[Connection, Newcomer] = OrderedDict()
        """Those whose turn is still to come; who hangs up leaves it."""
        self._turns: asyncio.TimerHandle | None = None
        self._most = connections
        self._sockets = sockets
        self._servers: list[asyncio.Server] = []
        self._tls = False
        self._pending: dict[Connection, float] = {}
        """Those whose handshake has not succeeded, and when their time is over."""
        self._silent: OrderedDict[Connection, None] = OrderedDict()
        """Those of them that have not asked for anything yet."""
        self._registering = 0
        self._deposits: set[asyncio.Task[None]] = set()
        self._open = 0
        self._emptied = asyncio.Event()
        self._door = Door.OPEN
        self._last_handshake_ends = 0.0
        self.refused: Counter[str] = Counter()
        """Handshakes by the code they were refused with, since the last report."""

    @property
    def accepting(self) -> bool:
        return self._door is Door.OPEN

    @property
    def pending(self) -> int:
        """Sockets that are no connections: not yet, or refused and not yet closed."""
        return len(self._pending)

    async def start(self, sock: socket.socket, tls: ssl.SSLContext | None) -> None:
        loop = asyncio.get_running_loop()
        self._tls = tls is not None
        prepare(sock)
        for each in (sock, *(sock.dup() for _ in range(ACCEPTED_AT_ONCE - 1))):
            server = await loop.create_server(
                lambda: Connection(self, self._frame_bytes, self._extensions),
                sock=each,
                ssl=tls,
                backlog=4096,
                ssl_handshake_timeout=self._deadline if tls else None,
                ssl_shutdown_timeout=2.0 if tls else None,
            )
            self._servers.append(server)

    def stop(self) -> None:
        """Let nobody in any more; who is at the door is told to go elsewhere.

        Still answering, for the socket's other copy is the supervisor's: with this one closed the
        kernel would go on queueing newcomers whom nobody serves.
        """
        self._door = Door.SHUT

    def hand_over(self) -> None:
        """Accept nobody any more: the socket's queue is another process's by now."""
        self._door = Door.HANDED_OVER
        self._last_handshake_ends = time.monotonic() + self._deadline
        self.close()

    def close(self) -> None:
        for server in self._servers:
            server.close()

    async def wait_emptied(self, seconds: float) -> None:
        """Until the last socket is closed, or the time is over."""
        # One that has just been accepted is known in the loop's next turn.
        await asyncio.sleep(0)
        handshakes = max(0.0, self._last_handshake_ends - time.monotonic())
        if self._tls:
            await asyncio.sleep(handshakes)  # These are known only when TLS is done.
        try:
            async with asyncio.timeout(handshakes + seconds):
                while self._open:
                    self._emptied.clear()
                    await self._emptied.wait()
        except TimeoutError:
            log.info("left behind", connections=self._open)

    def sweep(self) -> None:
        """End the handshakes that take too long."""
        now = time.monotonic()
        for connection in [each for each, until in self._pending.items() if until <= now]:
            connection.abort()

    def report(self) -> None:
        """One line for however many handshakes were refused."""
        if self.refused:
            log.info("handshakes refused", **self.refused)
            self.refused.clear()

    # Connection's owner.

    def connected(self, connection: Connection) -> None:
        self._open += 1
        self._pending[connection] = time.monotonic() + self._deadline
        self._silent[connection] = None
        # The store's connections need descriptors, too; a polite answer would hold this one.
        if self._open > self._sockets or len(self._silent) > SILENT_SOCKETS:
            longest, _ = self._silent.popitem(last=False)
            self._count(errors.HANDSHAKES_IN_FLIGHT)
            longest.abort()

    def requested(self, connection: Connection, request: HttpRequest) -> None:
        self._silent.pop(connection, None)
        asked = handshake.Request(
            request.method,
            request.path,
            {name: request.headers.get_all(name) for name in request.headers},
            connection.peer,
            self._tls,
        )
        match handshake.judge(asked, self._policy):
            case Health(ready):
                self._answer_health(connection, ready)
            case Preflight(origin, allowed):
                connection.respond(http.preflight(origin, allowed))
            case Refused(refusal, origin, allowed):
                path = request.path.partition("?")[0]
                self._refuse(connection, refusal, origin, allowed=allowed, path=path)
            case Asset(name):
                connection.respond(http.asset(name))
            case Deposit() | Login() as deposit:
                self._deposit(connection, deposit)
            case Attempt() as attempt:
                self._attempt(connection, request, attempt)

    def received(self, connection: Connection, message: bytes) -> None:
        self._hub.receive(connection, message)

    def violated(self, connection: Connection, why: Disconnect) -> None:
        self._hub.disconnect(connection, why)

    def stalled(self, connection: Connection) -> None:
        self._hub.stalled(connection)

    def drained(self, connection: Connection) -> None:
        self._hub.drained(connection)

    def holding(self, connection: Connection) -> None:
        self._hub.fanout.flush_later(connection)

    def ended(self, connection: Connection) -> None:
        self._silent.pop(connection, None)
        self._hub.remove(connection, connection.ending)

    def lost(self, connection: Connection) -> None:
        self._open -= 1
        self._emptied.set()
        self._pending.pop(connection, None)
        self._silent.pop(connection, None)
        self._queue.pop(connection, None)
        self._hub.remove(connection, ABNORMAL)

    # Answers.

    def _answer_health(self, connection: Connection, ready: bool) -> None:
        reasons: dict[str, object] = {
            "revocations": "current" if self._hub.fresh() else "stale",
            "draining": self._door is not Door.OPEN,
        }
        healthy = not ready or (self._hub.fresh() and self._door is Door.OPEN)
        status = "ok" if healthy else "unavailable"
        connection.respond(http.health(healthy, {"status": status} | (reasons if ready else {})))

    def _attempt(self, connection: Connection, request: HttpRequest, attempt: Attempt) -> None:
        if wait := self._budgets.spend(attempt.address, time.monotonic()):
            self._refuse(connection, errors.TOO_MANY_HANDSHAKES, attempt.origin, wait=wait)
            return
        accepted = connection.accept(request) if attempt.upgrade else None
        if attempt.upgrade and accepted is None:
            self._refuse(connection, errors.BAD_REQUEST, attempt.origin)
        else:
            self._queue_up(Newcomer(connection, request, attempt, accepted))

    def _queue_up(self, newcomer: Newcomer) -> None:
        connection, origin = newcomer.connection, newcomer.attempt.origin
        if self._door is Door.SHUT:
            self._refuse(connection, errors.HOST_DRAINING, origin)
            return
        now, waiting = time.monotonic(), len(self._queue)
        if not self._admission.admits(waiting, now):
            wait = self._admission.come_back(waiting, now)
            self._refuse(connection, errors.HANDSHAKES_IN_FLIGHT, origin, wait=wait, spread=1.0)
            return
        self._queue[connection] = newcomer
        if self._turns is None:
            self._take_turns()

    def _take_turns(self) -> None:
        """Let in whose turn it is, but so many that the others on the loop do not notice."""
        now = time.monotonic()
        try:
            for _ in range(self._at_once):
                # That the host goes they are told as soon as may be: there is nothing to wait for.
                come = self._queue and (self._door is Door.SHUT or self._admission.turn(now))
                if not come:
                    break
                _, newcomer = self._queue.popitem(last=False)
                if newcomer.connection.phase is Phase.HANDSHAKE:
                    self._verify(newcomer)
        finally:
            # Also after a bug of ours, met by one of them: the others' turns come all the same.
            loop = asyncio.get_running_loop()
            again = loop.call_later(TURN_SECONDS, self._take_turns) if self._queue else None
            self._turns = again

    def _verify(self, newcomer: Newcomer) -> None:
        connection, _, attempt, accepted = newcomer
        if self._door is Door.SHUT:
            self._refuse(connection, errors.HOST_DRAINING, attempt.origin)
            return
        try:
            identity = self._hub.verify(attempt.token)
        except TokenRefused as refused:
            refusal = errors.TOKEN_REFUSALS[refused.code]
            self._refuse(connection, refusal, attempt.origin, token=True)
            return
        except StoreUnavailable:
            self._refuse(connection, errors.UNAVAILABLE, attempt.origin)
            return
        if accepted is None:
            self._refuse(connection, errors.UPGRADE_REQUIRED, attempt.origin)
        elif len(self._hub) + self._registering >= self._most:
            self._refuse(connection, errors.TOO_MANY_CONNECTIONS, attempt.origin)
        else:
            self._registering += 1
            registered = partial(self._registered, newcomer, identity)
            self._hub.register(connection, identity, attempt.address, registered)

    def _registered(
        self, newcomer: Newcomer, identity: Identity, outcome: Full | StoreUnavailable | None
    ) -> None:
        """The store has answered."""
        self._registering -= 1
        try:
            self._conclude(newcomer, identity, outcome)
        except Exception:  # A bug of ours, met by one newcomer: it must not end the lane.
            log.exception("handshake failed")
            self._hub.unregister(newcomer.connection, identity)
            newcomer.connection.abort()

    def _conclude(
        self, newcomer: Newcomer, identity: Identity, outcome: Full | StoreUnavailable | None
    ) -> None:
        if outcome is None:
            self._admit(newcomer, identity)
        elif newcomer.connection.phase is Phase.HANDSHAKE:
            full = isinstance(outcome, Full)
            refusal = errors.TOO_MANY_CONNECTIONS if full else errors.UNAVAILABLE
            self._refuse(newcomer.connection, refusal, newcomer.attempt.origin)

    def _admit(self, newcomer: Newcomer, identity: Identity) -> None:
        """It is registered; the world may be another since its token was verified."""
        connection, request, attempt, accepted = newcomer
        if connection.phase is not Phase.HANDSHAKE:
            self._hub.unregister(connection, identity)
            return
        shut = self._door is Door.SHUT
        refusal = errors.HOST_DRAINING if shut else self._objection(identity)
        if refusal is not None:
            self._hub.unregister(connection, identity)
            self._refuse(connection, refusal, attempt.origin, token=refusal.status == 401)
            return
        assert accepted is not None
        del self._pending[connection]
        measured.handshakes.count(ACCEPTED)
        welcome = self._hub.add(connection, identity)
        # One write, for each costs more than all the rest of this.
        switch = http.switch(accepted.key, attempt.subprotocol, accepted.extensions)
        connection.open(request, switch + text_frame(welcome))
        connection.begin()
        if self._door is Door.HANDED_OVER:
            self._hub.disconnect(connection, errors.DRAINING)

    def _objection(self, identity: Identity) -> Refusal | None:
        try:
            self._hub.vouch(identity)
        except TokenRefused as refused:
            return errors.TOKEN_REFUSALS[refused.code]
        except StoreUnavailable:
            return errors.UNAVAILABLE
        return None

    def _deposit(self, connection: Connection, deposit: Deposit | Login) -> None:
        if wait := self._budgets.spend(deposit.address, time.monotonic()):
            refusal = errors.TOO_MANY_HANDSHAKES
            self._refuse(connection, refusal, deposit.origin, wait=wait, path=deposit.route)
            return
        connection.hold()
        task = asyncio.create_task(self._take(connection, deposit))
        self._deposits.add(task)
        task.add_done_callback(self._deposits.discard)

    async def _take(self, connection: Connection, deposit: Deposit | Login) -> None:
        try:
            answer = await self._tokens.take(deposit)
        except Exception:  # A bug of ours, met by one request: it must not hang.
            log.exception("token request failed")
            connection.abort()
            return
        if connection.phase is not Phase.HANDSHAKE:
            return
        if isinstance(answer, Refusal):
            token = answer.status == 401
            self._refuse(connection, answer, deposit.origin, token=token, path=deposit.route)
        else:
            if isinstance(deposit, Deposit):
                _OUTCOMES[deposit.route].count(ACCEPTED)
            connection.respond(http.answer(200, answer, http.cors(deposit.origin)))

    def _refuse(
        self,
        connection: Connection,
        refusal: Refusal,
        origin: str | None = None,
        *,
        wait: float = 1.0,
        spread: float = 4.0,
        token: bool = False,
        allowed: str = "GET",
        path: str = "",
    ) -> None:
        self._count(refusal, path)
        retry_after = None
        if refusal.status in (429, 503):
            # Spread, so that those who were refused together do not come back together.
            retry_after = max(1, round(wait + random.uniform(0.0, spread)))
        connection.respond(
            http.refuse(
                refusal,
                origin=origin,
                retry_after=retry_after,
                token_given=token,
                allowed=allowed,
            )
        )

    def _count(self, refusal: Refusal, path: str = "") -> None:
        self.refused[refusal.code] += 1
        _OUTCOMES.get(path, measured.handshakes).count(refusal.code)

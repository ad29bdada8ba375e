"""A client that stays: what applications call, and what becomes of it on the wire.

Decisions are made in pure modules beside this one (backoff, outbox, pace, positions, pulse), which
get the time as an argument. Nothing waits for a write, and no room for another: frames are written
at once, for what is unanswered is bounded: `UNACKNOWLEDGED` messages, `ASKING` other commands, and
one join for each room.
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import math
import ssl
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar
from uuid import uuid4

from msgspec.structs import asdict

from .backoff import FIRST, LONGEST, Backoff, wait_again
from .clock import Clock
from .connection import Answered, Connection, read_error
from .errors import CommandError, DisconnectedError, TokenRefusedError
from .events import (
    Bye,
    Frame,
    FrameError,
    History,
    JoinAck,
    Left,
    Pong,
    Position,
    Refreshed,
    encode,
    read,
    read_history,
)
from .lifeline import Lifeline
from .outbox import Outbox, Outgoing
from .room import Room
from .states import Closed, State
from .tokens import TokenSource

T = TypeVar("T")
R = TypeVar("R")
log = logging.getLogger("chatserver.client")

UNACKNOWLEDGED = 64
ASKING = 64


@asynccontextmanager
async def connect(
    url: str,
    *,
    token: str | TokenSource,
    deadline: float = 30.0,
    patience: float = 30.0,
    queue: int = 1024,
    backoff: tuple[float, float] = (FIRST, LONGEST),
    on_state: Callable[[State], None] | None = None,
    tls: ssl.SSLContext | None = None,
) -> AsyncIterator[Client]:
    """Connect to ``url`` (``ws://…/v1/ws``), stay connected, and close on leaving the block.

    ``token`` is an access token, or an async function that returns a fresh one, such as a
    `TokenKeeper`: it is asked before the token expires, and when the server wants another. With a
    mere string, call `Client.refresh` before `Client.expires_at`, or the client ends with 4401.

    Times are in seconds. ``deadline`` is for one command, whatever number of connections that
    takes; a message has its own (see `Client.send`). ``patience`` is for the first connection: so
    long is it tried again, and with 0 only once. ``backoff`` is the longest wait before the first
    try to reconnect, and before any. ``queue`` bounds the events that wait in each `Room`.
    ``on_state`` is called with each new `Client.state`, also while this function waits; it must
    not raise.

    Raises `RefusedError` and `DisconnectedError`, ValueError for a URL, token or queue that is
    none, and for the first token what the function raises.
    """
    client = Client(url, token, deadline, patience, queue, Backoff(*backoff), on_state, tls)
    try:
        await client.opened()
        yield client
    finally:
        await client.close()


class Client(Lifeline):
    """A user's seat at the server, made by `connect`.

    Commands wait while there is no connection. They raise `CommandError` when the server refuses
    them for good, TimeoutError when the deadline passes, and once it is over what `Closed` tells:
    a `DisconnectedError`, a `RefusedError`, or what the token's function raised at last.
    """

    expires_at: int
    """When the current token expires, in milliseconds of the server's clock."""

    def __init__(
        self,
        url: str,
        token: str | TokenSource,
        deadline: float,
        patience: float,
        queue: int,
        backoff: Backoff,
        on_state: Callable[[State], None] | None,
        tls: ssl.SSLContext | None,
    ) -> None:
        if queue < 1:
            # Without any space a room would be joined again and again.
            raise ValueError("a queue has space for one event at least")
        super().__init__(url, token, patience, backoff, on_state, tls)
        self._deadline = deadline
        self._bound = queue
        self._slots = asyncio.Semaphore(UNACKNOWLEDGED)
        self._asks = asyncio.Semaphore(ASKING)
        self._outbox = Outbox()
        self._clock = Clock()
        """The outbox's: the server forgets keys while this machine sleeps, too."""
        self._rooms: dict[str, Room] = {}
        self._outside: dict[Room, None] = {}
        """Rooms to be joined as soon as can be."""
        self._alarm: asyncio.TimerHandle | None = None
        self._refreshing: asyncio.Task[None] | None = None
        self._stale = False
        """A token is wanted that is newer than any that was asked for."""
        self._renewing = False
        """One was asked for, and is not in use yet."""

    def __repr__(self) -> str:
        who = f"{self.welcome.connection} of {self.welcome.user}" if self._welcomed else "new"
        return f"<Client {who} {type(self.state).__name__.lower()}>"

    # What applications call.

    async def join(
        self, name: str, *, since: Position | None = None, last: int | None = None
    ) -> Room:
        """Be in a room until `leave`: with the events missed ``since``, or the ``last`` few (256).

        If the server cannot prove that nothing is missing since then, the first event is a `Gap`
        and the latest ``last`` events follow it (50 by default). Joining a room again gives a new
        Room in the place of the old; a join that is still waiting then, or when the room is left,
        raises `ChatError`.
        """
        self._check_open()
        self._quit(name, None)
        room = self._rooms[name] = Room(self, name, since, last, self._bound)
        self.rejoin(room)
        try:
            async with asyncio.timeout(self._deadline):
                await room.admission()
        except BaseException:
            self._withdraw(room)
            raise
        return room

    async def leave(self, name: str) -> None:
        """Stop receiving a room; its iteration ends. Leaving one not joined is no error."""
        self._quit(name, None)
        # Another connection would not join it.
        await self._ask("leave", _nothing, lasting=False, room=name)

    async def send(
        self, room: str, body: Any, *, key: str | None = None, echo: bool = True
    ) -> Position:
        """Publish ``body``, any JSON value, and return its position; joining is not needed.

        The message is stored once, however often it has to be sent: it has a ``key``, a fresh UUID
        by default. It is repeated while the server is sure to remember the key, for nearly
        ``welcome.limits.key_window`` since it may have been stored; then, and when the client
        ends, `UnknownOutcomeError` is raised. It waits when too many are unacknowledged. Messages
        of one room go out in the order of the calls. Cancelled, it is not repeated any more, and
        may have been stored. With ``echo=False`` this client's own room does not show it.
        """
        key = str(uuid4()) if key is None else key
        fields: Frame = {"type": "send", "room": room, "body": body, "key": key}
        if not echo:
            fields["echo"] = False
        text = encode(fields)
        if len(text) + 32 > self.welcome.limits.frame_bytes:
            # Sent, it would end the connection instead of being answered.
            raise CommandError("too_large", "The message is larger than limits.frame_bytes.")
        async with self._slots:
            self._check_open()
            outcome: asyncio.Future[Position | Exception] = self._loop.create_future()
            message = Outgoing(room, key, text, lambda result: _resolve(outcome, result))
            self._outbox.add(message)
            self._pump()
            try:
                settled = await outcome
            finally:
                self._outbox.discard(message)
        if isinstance(settled, Exception):
            raise settled.with_traceback(None)
        return settled

    async def history(
        self, room: str, *, before: int | None = None, after: int | None = None, limit: int = 50
    ) -> History:
        """Read up to ``limit`` (to 256) events of a room's log, in ascending order.

        They end before offset ``before``, or begin after ``after``; the latest if neither is given.
        """
        fields: Frame = {"room": room, "limit": limit}
        if before is not None:
            fields["before"] = before
        if after is not None:
            fields["after"] = after
        return await self._ask("history", read_history, **fields)

    async def refresh(self, token: str | None = None) -> Refreshed:
        """Go on under a new access token of the same user and session: this one, or a fresh one
        of the function that `connect` was given.

        On failure the old token runs on. Rooms no longer allowed end with `Left`.
        """
        if token is None:
            if not self._tokens.renewable:
                raise ValueError("there is no function to ask for a token")
            token = await self._tokens.renew()
        before = self._tokens.replace(token)
        try:
            return await self._ask("refresh", self._receive_refreshed, token=token)
        except CommandError:
            self._tokens.withdraw(token, before)
            raise

    async def logout(self) -> None:
        """End the session everywhere, and this client with it."""
        try:
            await self._ask("logout", lambda _: self._finish(None))
        except DisconnectedError as exc:
            # It was done, and the answer lost; or somebody else has done it.
            if exc.code != 4503:
                raise

    async def ping(self) -> int:
        """Ask the server for its clock, in milliseconds. Not needed to stay connected."""
        return await self._ask("ping", lambda ack: read(ack, Pong).ts)

    async def close(self) -> None:
        """End it; iterations end, and what still waits raises `DisconnectedError` with 1000."""
        refreshing = self._refreshing
        await super().close()
        if refreshing is not None:
            await asyncio.gather(refreshing, return_exceptions=True)

    # The connection comes and goes.

    def _begin(self, connection: Connection) -> None:
        self.expires_at = connection.link.welcome.expires_at
        self._outbox.window = connection.link.welcome.limits.key_window / 1000
        for room in self._rooms.values():
            room.not_before = 0.0
            if room.wanting:
                self._outside[room] = None
        self._pump()

    def _lose(self, connection: Connection) -> None:
        if self._refreshing is not None:
            self._refreshing.cancel()
        if self._stale:
            self._tokens.outdate()
        self._outside.clear()
        for room in self._rooms.values():
            room.lose()
        connection.lose()
        self._pump()

    def _end(self, why: Exception | None) -> None:
        if self._alarm is not None:
            self._alarm.cancel()
        for name, room in list(self._rooms.items()):
            room.refuse(self._over())
            self._quit(name, why)
        self._outbox.close(self._over())

    # Frames in.

    def _receive(self, connection: Connection, frame: Frame) -> None:
        match frame.get("type"):
            case "ack" | "error":
                connection.receive_reply(frame)
                self._pump()
            case "expiring":
                self._receive_expiring(now=frame.get("now") is True)
            case "bye":
                connection.receive_bye(read(frame, Bye))
            case str():
                name = frame.get("room")
                room = self._rooms.get(name) if isinstance(name, str) else None
                if room is not None:
                    self._receive_in(room, frame)
            case _:
                raise FrameError("the server sent a frame without a type")

    def _receive_in(self, room: Room, frame: Frame) -> None:
        room.receive(frame)
        if room.ended:
            self._quit(room.name, None)
        elif room.wanting:
            self.rejoin(room)

    # Frames out.

    def rejoin(self, room: Room) -> None:
        """Join ``room`` again from where it is, as soon as can be. For the Room that asks."""
        if room.wanting and self._rooms.get(room.name) is room:
            self._outside[room] = None
            self._pump()

    def _pump(self) -> None:
        """Write what may be written now; see to it that this is called again when more may."""
        now, elapsed = self._loop.time(), self._clock.now()
        self._outbox.expire(elapsed)
        wake_at = now + self._outbox.wake_at(elapsed) - elapsed
        connection = self._connection
        if connection is not None and connection.open:
            wake_at = min(
                wake_at,
                self._pump_joins(connection, now),
                self._pump_messages(connection, now, elapsed),
                connection.watch(),
            )
        self._wake_at(wake_at)

    def _pump_joins(self, connection: Connection, now: float) -> float:
        later = math.inf
        for room in list(self._outside):
            at = max(room.not_before, now + connection.wait())
            if at > now:
                later = min(later, at)
                continue
            del self._outside[room]
            if room.wanting:
                self._ask_to_join(connection, room)
        return later

    def _ask_to_join(self, connection: Connection, room: Room) -> None:
        since = room.ask()
        fields: Frame = {"room": room.name}
        if since is not None:
            fields["since"] = asdict(since)
        if room.last is not None:
            fields["last"] = room.last
        connection.command("join", lambda frame: self._receive_joined(room, frame), **fields)

    def _receive_joined(self, room: Room, frame: Frame | None) -> None:
        if frame is None or self._rooms.get(room.name) is not room:
            return
        if frame["type"] == "ack":
            # Once is enough: a later join is to get all that it missed.
            room.last = None
            room.admit(read(frame, JoinAck))
            return
        error = read_error(frame)
        if error.temporary:
            room.postpone(self._loop.time() + wait_again(room.refusals, error.retry_after))
            self._outside[room] = None
        else:
            room.refuse(error)
            self._quit(room.name, Left(room.name, error.code))

    def _pump_messages(self, connection: Connection, now: float, elapsed: float) -> float:
        for message in self._outbox.due(elapsed):
            if (wait := connection.wait(send=True)) > 0.0:
                return now + wait
            self._outbox.begin(message, elapsed)
            connection.send(message.text, self._answer_to(message))
        return math.inf

    def _answer_to(self, message: Outgoing) -> Answered:
        def answered(frame: Frame | None) -> None:
            if frame is None:
                self._outbox.lose(message)
            elif frame["type"] == "ack":
                self._outbox.acknowledge(message, read(frame, Position))
            else:
                self._outbox.refuse(message, read_error(frame), self._clock.now())

        return answered

    async def _ask(
        self, kind: str, receive: Callable[[Frame], T], *, lasting: bool = True, **fields: Any
    ) -> T:
        """Send a command until it is acked; ``receive`` makes the result of the ack, in the
        reader's turn: what follows the ack is to find its effect.

        Raises `CommandError`, TimeoutError, and what `Closed` tells. Unless ``lasting``, to have no
        connection is as good as an empty ack.
        """
        async with asyncio.timeout(self._deadline), self._asks:
            for attempt in itertools.count():
                connection = await self._opened() if lasting else self._connection
                if connection is None or not connection.open:
                    return receive({})
                if (wait := connection.wait()) > 0.0:
                    await asyncio.sleep(wait)
                    continue
                answer = await self._exchange(connection, kind, receive, fields)
                if isinstance(answer, CommandError):
                    if not answer.temporary:
                        raise answer
                    await asyncio.sleep(wait_again(attempt, answer.retry_after))
                elif answer is not None:
                    return answer[0]
        raise AssertionError

    async def _exchange(
        self, connection: Connection, kind: str, receive: Callable[[Frame], T], fields: Frame
    ) -> tuple[T] | CommandError | None:
        """One attempt; None when the connection is lost before the answer comes."""
        answer: asyncio.Future[tuple[T] | CommandError | None] = self._loop.create_future()

        def answered(frame: Frame | None) -> None:
            if frame is None:
                _resolve(answer, None)
            elif frame["type"] == "ack":
                _resolve(answer, (receive(frame),))
            else:
                _resolve(answer, read_error(frame))

        connection.command(kind, answered, **fields)
        return await answer

    def _quit(self, name: str, why: Left | Exception | None) -> None:
        room = self._rooms.pop(name, None)
        if room is not None:
            self._outside.pop(room, None)
            room.end(why)

    def _withdraw(self, room: Room) -> None:
        """Nobody waits for this join any more."""
        if self._rooms.get(room.name) is room:
            self._quit(room.name, None)
            if self._connection is not None and self._connection.open:
                self._connection.command("leave", lambda _: None, room=room.name)

    # The timer.

    def _wake_at(self, at: float) -> None:
        if at == math.inf or isinstance(self.state, Closed):
            return
        if self._alarm is not None:
            if self._alarm.when() <= at:
                return
            self._alarm.cancel()
        self._alarm = self._loop.call_at(at, self._ring)

    def _ring(self) -> None:
        self._alarm = None
        self._pump()

    # The token.

    def _receive_refreshed(self, frame: Frame) -> Refreshed:
        refreshed = read(frame, Refreshed)
        self.expires_at = refreshed.expires_at
        self._renewing = False
        if self._connection is not None:
            left = self._connection.left(refreshed.expires_at)
            self._tokens.accept(left, self._loop.time())
        for name in refreshed.left:
            self._quit(name, Left(name, "forbidden"))
        return refreshed

    def _receive_expiring(self, *, now: bool) -> None:
        """One refresh, however often it is said; but ``now`` the rights have changed, and a token
        that is being fetched may be older than that."""
        if not self._tokens.renewable:
            return
        if now or not self._renewing:
            self._stale = True
        if self._refreshing is None:
            self._refreshing = asyncio.create_task(self._keep_fresh())

    async def _keep_fresh(self) -> None:
        """Refresh, trying until it works or the connection ends; one such task at a time."""
        try:
            for attempt in itertools.count():
                self._stale, self._renewing = False, True
                try:
                    await self.refresh()
                # Whatever the application's function raises, the token in use is good for a
                # while yet, and the next try may succeed.
                except Exception as exc:  # noqa: BLE001
                    log.warning("refreshing the token failed: %s", type(exc).__name__)
                    if isinstance(exc, TokenRefusedError):
                        self._give_up(exc)
                        return
                    self._stale = True
                    await asyncio.sleep(wait_again(attempt, getattr(exc, "retry_after", None)))
                if not self._stale:
                    return
        finally:
            self._refreshing, self._renewing = None, False


def _nothing(_: Frame) -> None:
    return None


def _resolve(future: asyncio.Future[R], result: R) -> None:
    """Unless whoever waited has gone."""
    if not future.done():
        future.set_result(result)

"""One connection to a chat server: commands matched with their replies, events with their rooms.

A task that belongs to the connection reads every frame and never waits for anything else, so a
room nobody reads delays no reply. Every wait for the server has a deadline. A lost connection
stays lost: everything that waits raises `DisconnectedError`.
"""

from __future__ import annotations

import asyncio
import contextlib
import copy
import itertools
import logging
from collections.abc import AsyncIterator, Callable, Coroutine
from dataclasses import dataclass
from typing import Any, Generic, TypeVar
from uuid import uuid4

from msgspec.structs import asdict
from websockets.asyncio.client import ClientConnection
from websockets.exceptions import ConnectionClosed

from .backoff import wait_before
from .errors import ChatError, CommandError, DisconnectedError
from .events import (
    Bye,
    ErrorReply,
    Frame,
    FrameError,
    History,
    JoinAck,
    Left,
    Pong,
    Position,
    Refreshed,
    Welcome,
    encode,
    parse,
    read,
    read_history,
)
from .handshake import TokenSource, disconnected, fetch_token, open_socket
from .room import Room

T = TypeVar("T")
log = logging.getLogger("chatserver.client")

# Commands that may await their reply at once; further ones wait, inside their deadline.
IN_FLIGHT = 256
# Frames read before the tasks that take events from rooms get their turn: one read from the
# socket may hold thousands, which would fill a room's queue though its reader is quick.
TURN = 128


@contextlib.asynccontextmanager
async def connect(
    url: str, *, token: str | TokenSource, deadline: float = 10.0, queue: int = 1024
) -> AsyncIterator[Client]:
    """Connect to ``url`` (``ws://…/v1/ws``), and close the connection on leaving the block.

    ``token`` is an access token, or an async function that returns a fresh one: then it is also
    asked, and the connection refreshed, before the token expires. With a mere string, call
    `Client.refresh` before `Client.expires_at`.

    ``deadline``, in seconds, is for each wait for the server or for the function: connecting, or
    one command with its reply. ``queue`` bounds the events that wait in each `Room`.

    Raises `RefusedError`, `DisconnectedError` and ValueError, and what the function raises.
    """
    socket, welcome = await open_socket(url, token, deadline)
    source = None if isinstance(token, str) else token
    client = Client(socket, welcome, source, deadline, queue)
    try:
        yield client
    finally:
        await client.close()


@dataclass(slots=True)
class Call(Generic[T]):
    """A command that awaits its reply. ``receive`` makes an ack its result, in the reader's turn:
    what follows the ack is to find its effect."""

    receive: Callable[[Frame], T]
    reply: asyncio.Future[T | ChatError]

    def resolve(self, reply: T | ChatError) -> None:
        if not self.reply.done():
            self.reply.set_result(reply)


class Client:
    """An open connection, made by `connect`.

    Its commands raise `CommandError` when the server refuses them, `DisconnectedError` when the
    connection is lost, and TimeoutError when no reply comes in time. In the last two cases, and
    after the code ``unavailable``, whether a command took effect is unknown.
    """

    def __init__(
        self,
        socket: ClientConnection,
        welcome: Welcome,
        source: TokenSource | None,
        deadline: float,
        bound: int,
    ) -> None:
        self.welcome = welcome
        self.expires_at = welcome.expires_at
        """When the current token expires, in milliseconds of the server's clock."""
        self._socket = socket
        self._source = source
        self._deadline = deadline
        self._bound = bound
        self._ids = itertools.count(1)
        self._in_flight = asyncio.Semaphore(IN_FLIGHT)
        self._calls: dict[int, Call[Any]] = {}
        self._rooms: dict[str, Room] = {}
        self._bye: Bye | None = None
        self._ended: DisconnectedError | None = None
        self._closing = False
        self._stale = False
        self._refreshing: asyncio.Task[None] | None = None
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader = self._spawn(self._read())

    def __repr__(self) -> str:
        state = "closed" if self._ended else "open"
        return f"<Client {self.welcome.connection} of {self.welcome.user} {state}>"

    async def join(
        self, name: str, *, since: Position | None = None, last: int | None = None
    ) -> Room:
        """Start receiving a room: with the events missed ``since``, or the ``last`` few (to 256).

        If the server cannot prove that nothing is missing since then, the first event is a `Gap`
        and the latest ``last`` events follow it (50 by default). Joining a room again gives a new
        Room in the place of the old. A join cancelled or timed out may have taken effect: `leave`.
        """
        fields: Frame = {"room": name}
        if since is not None:
            fields["since"] = asdict(since)
        if last is not None:
            fields["last"] = last
        return await self._call("join", self._receive_joined, **fields)

    async def leave(self, name: str) -> None:
        """Stop receiving a room; its iteration ends at once. Leaving one not joined is no error."""
        self._forget(name, None)
        await self._call("leave", lambda _: self._forget(name, None), room=name)

    async def send(
        self, room: str, body: Any, *, key: str | None = None, echo: bool = True
    ) -> Position:
        """Publish ``body``, any JSON value, and return its position; joining is not needed.

        ``key`` is a fresh UUID by default. Give one to be able to repeat a message whose outcome
        is unknown: for ``welcome.limits.key_window`` the server stores a key once, and returns
        the first position. With ``echo=False`` this connection's own room does not show it.
        """
        fields = {"room": room, "body": body, "key": str(uuid4()) if key is None else key}
        if not echo:
            fields["echo"] = False
        return await self._call("send", lambda ack: read(ack, Position), **fields)

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
        return await self._call("history", read_history, **fields)

    async def refresh(self, token: str) -> Refreshed:
        """Continue this connection under a new access token of the same user and session.

        On failure the old token runs on. Rooms no longer allowed end with `Left`.
        """
        return await self._call("refresh", self._receive_refreshed, token=token)

    async def ping(self) -> int:
        """Ask the server for its clock, in milliseconds. Not needed to keep a connection alive."""
        return (await self._call("ping", lambda ack: read(ack, Pong))).ts

    async def close(self) -> None:
        """Close the connection; iterations end, and what still waits raises `DisconnectedError`."""
        self._closing = True
        try:
            await self._socket.close()
        finally:
            tasks = list(self._tasks)
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)

    def repair(self, room: Room) -> None:
        """Join ``room`` again from where it is, in the background. For the Room that asks."""
        self._spawn(self._repair(room))

    async def _call(self, kind: str, receive: Callable[[Frame], T], **fields: Any) -> T:
        number = next(self._ids)
        data = encode({"type": kind, "id": number, **fields})
        if len(data) > self.welcome.limits.frame_bytes:
            # Sent, it would end the connection instead of being answered.
            raise CommandError("too_large", "The command is larger than limits.frame_bytes.")
        async with asyncio.timeout(self._deadline), self._in_flight:
            if self._ended is not None:
                raise copy.copy(self._ended)
            call = Call[T](receive, asyncio.get_running_loop().create_future())
            self._calls[number] = call
            try:
                # When the connection is lost the reader resolves the call, with the reason.
                with contextlib.suppress(ConnectionClosed):
                    await self._socket.send(data, text=True)
                reply = await call.reply
            finally:
                del self._calls[number]
        if isinstance(reply, ChatError):
            raise reply
        return reply

    async def _read(self) -> None:
        try:
            for count in itertools.count(1):
                self._receive(parse(await self._socket.recv()))
                if count % TURN == 0:
                    await asyncio.sleep(0)
        except ConnectionClosed as exc:
            self._end(disconnected(exc, self._bye))
        except FrameError as exc:
            self._end(DisconnectedError(1002, str(exc)))
            await self._socket.close(1002)
        finally:
            self._end(DisconnectedError(1006, "connection dropped by this client"))

    def _receive(self, frame: Frame) -> None:
        match frame.get("type"):
            case "ack" | "error":
                self._receive_reply(frame)
            case "expiring":
                self._receive_expiring(now=frame.get("now") is True)
            case "bye":
                self._bye = read(frame, Bye)
            case str():
                name = frame.get("room")
                room = self._rooms.get(name) if isinstance(name, str) else None
                if room is not None:
                    room.receive(frame)
                    if room.ended:
                        del self._rooms[room.name]
            case _:
                raise FrameError("the server sent a frame without a type")

    def _receive_reply(self, frame: Frame) -> None:
        number = frame.get("id")
        call = self._calls.get(number) if isinstance(number, int) else None
        if frame["type"] == "error":
            error = CommandError(**asdict(read(frame, ErrorReply)))
            if call is None:
                log.warning("error from the server: %s", error.code)
            else:
                call.resolve(error)
        elif call is not None:
            call.resolve(call.receive(frame))

    def _receive_joined(self, frame: Frame) -> Room:
        room = Room(self, read(frame, JoinAck), self._bound)
        self._forget(room.name, None)
        self._rooms[room.name] = room
        return room

    def _receive_refreshed(self, frame: Frame) -> Refreshed:
        refreshed = read(frame, Refreshed)
        self.expires_at = refreshed.expires_at
        for name in refreshed.left:
            self._forget(name, Left(name, "forbidden"))
        return refreshed

    def _receive_expiring(self, *, now: bool) -> None:
        if self._source is None:
            return
        if self._refreshing is None:
            self._refreshing = self._spawn(self._keep_fresh(self._source))
        elif now:
            # The token being fetched may be older than the change of rights.
            self._stale = True

    async def _keep_fresh(self, source: TokenSource) -> None:
        """Refresh, trying until it works or the connection ends; one such task at a time."""
        self._stale, attempt = True, 0
        while self._stale:
            self._stale = False
            try:
                await self.refresh(await fetch_token(source, self._deadline))
            # Whatever the application's function raises, the token in use is still good for a
            # while, and the next try may succeed.
            except Exception as exc:  # noqa: BLE001
                log.warning("refreshing the token failed (%s); trying again", type(exc).__name__)
                self._stale = True
                await asyncio.sleep(wait_before(attempt, getattr(exc, "retry_after", None)))
                attempt += 1
        self._refreshing = None

    async def _repair(self, room: Room) -> None:
        """Join again, trying until it works, or the room or the connection ends."""
        for attempt in itertools.count():
            if room.ended:
                break
            try:
                await self._call(
                    "join",
                    lambda ack: None if room.ended else room.receive_ack(read(ack, JoinAck)),
                    room=room.name,
                    since=asdict(room.reached),
                )
                break
            except TimeoutError:
                await asyncio.sleep(wait_before(attempt, None))
            except CommandError as exc:
                if not exc.temporary:
                    room.end(Left(room.name, exc.code))
                    break
                await asyncio.sleep(wait_before(attempt, exc.retry_after))
            except DisconnectedError:
                break

    def _forget(self, name: str, why: Left | DisconnectedError | None) -> None:
        room = self._rooms.pop(name, None)
        if room is not None:
            room.end(why)

    def _end(self, why: DisconnectedError) -> None:
        if self._ended is not None:
            return
        self._ended = DisconnectedError(1000, "closed by this client") if self._closing else why
        for task in self._tasks - {self._reader}:
            task.cancel()
        for call in self._calls.values():
            call.resolve(copy.copy(self._ended))
        for name in list(self._rooms):
            self._forget(name, None if self._closing else why)

    def _spawn(self, work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._settle)
        return task

    def _settle(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a task of the connection failed", exc_info=task.exception())

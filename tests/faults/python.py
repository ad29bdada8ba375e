"""Members that use the Python client as an application does, and write down what it tells them.

What an application sees is one long stay in each room: reconnects and repairs are the client's
business, and only a `Gap` says that something may be missing. So here one client is one
*connection* of the history, from its first welcome to its end, and a stretch in which nothing may
be missing ends with a `Gap` and nowhere else. Messages are never sent with ``echo`` false, for an
application is not told where those are that it does not see.

Each member sends one message after the other, to several rooms at once: in each room they have to
be in the order sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import random
import uuid
from collections import deque
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import chatserver.client as chat
from tests.faults.checker import rights as rights_in
from tests.faults.clients import BACKOFF_SECONDS, GIVE_UP_SECONDS, OUTBOX, World, now
from tests.faults.history import (
    Closed,
    Connected,
    Epoch,
    Joined,
    Left,
    Position,
    Received,
    Reset,
    Sent,
    Session,
)
from tests.support.worker import end

DEADLINE_SECONDS = 5.0
UNSTUBBORN_SECONDS = 1.0
QUEUE = 64
"""So few that a reader that pauses falls behind."""
IN_FLIGHT = 4
"""Messages of one member to different rooms."""
REST_SECONDS = (0.1, 0.5)
"""Before a client is made anew, or a room joined that could not be."""


_UNKNOWN: Literal["ok", "failed", "unknown"] = "unknown"


class Post(NamedTuple):
    room: str
    key: str
    sequence: int
    stubborn: bool
    padding: str


class Member:
    """One member: a client, made anew when the old one was told not to come back."""

    def __init__(
        self,
        world: World,
        name: str,
        rooms: Sequence[str],
        rights: dict[str, str],
        *,
        lazy: bool = False,
        lifetime: int = 60,
    ) -> None:
        self.name = name
        self.rooms = list(rooms)
        self.session = ""
        self.strange: list[str] = []
        self._world = world
        self._random = random.Random(world.random.random())
        self._rights = rights
        self._lazy = lazy
        self._lifetime = lifetime
        self._logins = itertools.count(1)
        self._connections = itertools.count(1)
        self._sequence = itertools.count(1)
        self._client: chat.Client | None = None
        self._connection = ""
        self._places: dict[str, Position] = {}
        self._joined: dict[str, chat.Room] = {}
        self._outbox: deque[Post] = deque()
        self._busy: set[str] = set()
        """Rooms to which a message is on its way."""
        self._queued = asyncio.Event()
        self._publishers: list[asyncio.Task[None]] = []
        self._errands: set[asyncio.Task[None]] = set()
        self._reading = asyncio.Event()
        self._reading.set()
        self._leaving = asyncio.Event()
        self._log_in()

    @property
    def port(self) -> int:
        connection = self._client and self._client._connection
        return connection.link.port if connection else 0

    @property
    def connected(self) -> bool:
        return self._client is not None and isinstance(self._client.state, chat.Open)

    @property
    def joined(self) -> bool:
        return self.connected and all(
            room in self._joined and self._joined[room].joined
            for room in self.rooms
            if self.may(room, "r")
        )

    @property
    def settled(self) -> bool:
        return not (self._outbox or self._busy)

    def may(self, room: str, right: str) -> bool:
        return right in rights_in(self._rights, room)

    def reached(self, room: str) -> int:
        place = self._places.get(room)
        return place.offset if place else 0

    # Tokens.

    def _log_in(self) -> None:
        self.session = f"{self.name} login {next(self._logins)}"
        self._world.add(
            Session(at=now(), member=self.name, session=self.session, rooms=self._rights)
        )

    async def _fresh_token(self) -> str:
        if self._lazy and self.connected and self._random.random() < 0.8:
            raise OSError("this member's login service is down")
        return self._world.issuer.token(
            self.name, session=self.session, rooms=self._rights, lifetime=self._lifetime
        )

    # A client's life.

    async def run(self) -> None:
        while not self._leaving.is_set():
            code = await self._live()
            if code is None:
                return
            if self.session in self._world.revoked or self._world.undaunted:
                self._log_in()
            elif code >= 4500 or code == 401:
                return
            await asyncio.sleep(self._random.uniform(*REST_SECONDS))

    async def _live(self) -> int | None:
        """One client, to its end: the code that ended it, or None when it left by itself."""
        began = now()
        why: Exception | None = None
        try:
            async with chat.connect(
                self._world.url(self._random),
                token=self._fresh_token,
                deadline=DEADLINE_SECONDS,
                queue=QUEUE,
                backoff=BACKOFF_SECONDS,
            ) as client:
                self._begin(client, began)
                stays = [asyncio.create_task(self._stay(client, room)) for room in self.rooms]
                self._publishers = [
                    asyncio.create_task(self._publish(client)) for _ in range(IN_FLIGHT)
                ]
                try:
                    why = await self._until_over(client)
                    if why is not None:
                        # What has arrived is read to its end, as it would be by an application.
                        await asyncio.wait(stays)
                finally:
                    await end([*stays, *self._publishers, *self._errands])
        except (chat.ChatError, TimeoutError) as exc:
            why = exc
        code = self._code(why)
        if self._connection:
            self._world.add(
                Closed(at=now(), member=self.name, connection=self._connection, code=code or 1000)
            )
        self._client, self._connection = None, ""
        self._joined.clear()
        return code

    def _begin(self, client: chat.Client, began: float) -> None:
        self._client = client
        self._connection = f"{self.name}#{next(self._connections)}"
        self._world.add(
            Connected(
                at=now(),
                member=self.name,
                session=self.session,
                connection=self._connection,
                began=began,
            )
        )

    async def _until_over(self, client: chat.Client) -> Exception | None:
        leaving = asyncio.create_task(self._leaving.wait())
        try:
            while not isinstance(client.state, chat.Closed):
                if leaving.done():
                    return None
                await asyncio.wait({leaving}, timeout=0.05)
            return client.state.why
        finally:
            leaving.cancel()

    def _code(self, why: Exception | None) -> int | None:
        match why:
            case None:
                return None
            case chat.DisconnectedError(code=code) | chat.RefusedError(status=code):
                self._world.count(f"end {code}")
                return code
            case chat.CommandError() | TimeoutError() | OSError():
                return 1006
        self.strange.append(f"the client ended with {why!r}")
        return 1006

    # Rooms.

    async def _stay(self, client: chat.Client, name: str) -> None:
        """Be in a room as long as the client is, with a walk outside now and then."""
        with contextlib.suppress(chat.DisconnectedError, chat.RefusedError):
            while True:
                await self._join(client, name)
                if not self.may(name, "r"):
                    return
                await asyncio.sleep(self._random.uniform(*REST_SECONDS))

    async def _join(self, client: chat.Client, name: str) -> None:
        place = self._places.get(name)
        since = chat.Position(place.epoch, place.offset) if place else None
        try:
            room = await client.join(name, since=since)
        except chat.CommandError as error:
            self._world.count(f"join {error.code}")
            self._left(name, error.code)
            return
        except TimeoutError:
            self._world.count("join timed out")
            return
        self._joined[name] = room
        recorded = room.recovered
        if recorded:
            self._record_join(room, room.position, place)
        try:
            async for event in room:
                match event:
                    case chat.Message():
                        self._receive(event)
                    case chat.Gap(position=position):
                        self._receive_gap(room, position, first=not recorded)
                        recorded = True
                    case chat.Left(reason=reason):
                        self._left(name, reason)
                await self._reading.wait()
            self._left(name, "asked")
        finally:
            del self._joined[name]

    def _record_join(self, room: chat.Room, start: chat.Position, since: Position | None) -> None:
        self._places[room.name] = Position(start.epoch, start.offset)
        self._world.add(
            Joined(
                **self._common(room.name),
                epoch=start.epoch,
                offset=start.offset,
                replay=0,
                since=since,
                recovered=None if since is None else True,
            )
        )

    def _receive_gap(self, room: chat.Room, position: chat.Position, *, first: bool) -> None:
        if first:
            self._record_join(room, position, None)
            return
        self._places[room.name] = Position(position.epoch, position.offset)
        self._world.add(
            Reset(**self._common(room.name), epoch=position.epoch, offset=position.offset)
        )

    def _receive(self, message: chat.Message) -> None:
        epoch, offset = message.position.epoch, message.position.offset
        if epoch != self._places[message.room].epoch:
            self._world.add(Epoch(**self._common(message.room), epoch=epoch))
        self._world.add(
            Received(
                **self._common(message.room),
                epoch=epoch,
                offset=offset,
                key=message.key or "",
                ts=message.ts,
            )
        )
        self._places[message.room] = Position(epoch, offset)

    def _left(self, room: str, reason: str) -> None:
        self._world.add(Left(**self._common(room), reason=reason))

    def _common(self, room: str) -> dict[str, Any]:
        return {"at": now(), "member": self.name, "connection": self._connection, "room": room}

    def wander(self, room: str) -> None:
        if room in self._joined:
            errand = asyncio.create_task(self._walk(self._joined[room]))
            self._errands.add(errand)
            errand.add_done_callback(self._errands.discard)

    async def _walk(self, room: chat.Room) -> None:
        with contextlib.suppress(chat.ChatError, TimeoutError):
            await room.leave()

    async def end_of(self, room: str) -> Position | None:
        if self._client is not None:
            with contextlib.suppress(chat.ChatError, TimeoutError):
                page = await self._client.history(room, limit=1)
                return Position(page.position.epoch, page.position.offset)
        return None

    async def pause(self, seconds: float) -> None:
        self._reading.clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._reading.set()

    # Messages.

    def publish(
        self, rooms: Sequence[str], *, echo: bool = True, stubborn: bool = True, padding: int = 0
    ) -> bool:
        if len(self._outbox) + len(rooms) > OUTBOX:
            return False
        for room in rooms:
            key = str(uuid.UUID(int=self._random.getrandbits(128), version=4))
            self._outbox.append(Post(room, key, next(self._sequence), stubborn, "x" * padding))
        self._queued.set()
        return True

    async def _publish(self, client: chat.Client) -> None:
        while not isinstance(client.state, chat.Closed):
            post = next((post for post in self._outbox if post.room not in self._busy), None)
            if post is None:
                self._queued.clear()
                await self._queued.wait()
                continue
            self._outbox.remove(post)
            self._busy.add(post.room)
            try:
                await self._send(client, post)
            finally:
                self._busy.discard(post.room)
                self._queued.set()

    async def _send(self, client: chat.Client, post: Post) -> None:
        body = {"from": self.name, "n": post.sequence, "padding": post.padding}
        began, outcome, position, code = now(), _UNKNOWN, None, ""
        try:
            async with asyncio.timeout(GIVE_UP_SECONDS if post.stubborn else UNSTUBBORN_SECONDS):
                position = await client.send(post.room, body, key=post.key)
            outcome = "ok"
        except (TimeoutError, chat.UnknownOutcomeError):
            pass
        except chat.ChatError as error:
            # Also when the client is over: it says that this was never sent.
            outcome, code = "failed", str(error)
        finally:
            self._record(post, began, outcome, position, code)

    def _record(
        self,
        post: Post,
        began: float,
        outcome: Literal["ok", "failed", "unknown"],
        position: chat.Position | None = None,
        code: str = "",
    ) -> None:
        self._world.add(
            Sent(
                at=now(),
                sender=self.name,
                sequence=post.sequence,
                room=post.room,
                key=post.key,
                outcome=outcome,
                began=began,
                tried=began,
                connection=self._connection,
                attempt=post.sequence,
                epoch=position.epoch if position else "",
                offset=position.offset if position else 0,
                code=code,
            )
        )

    def abandon(self) -> None:
        for task in self._publishers:
            task.cancel()
        while self._outbox:
            self._record(self._outbox.popleft(), now(), "failed", code="abandoned")

    async def leave(self) -> None:
        self._leaving.set()

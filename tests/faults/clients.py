"""A fleet of thin clients that keep the rules of the protocol to the letter, and write down what
they see.

They share no code with the server or with the project's own client, so as to find bugs of either.
Two rules are kept with shorter times, for a run is shorter than a day: the longest wait before a
reconnect, and how often a silent link is asked whether it is alive.

A sender has at most ``WINDOW`` sends in flight. What is not answered, or answered ``unavailable``,
is repeated with its key, in the order sent, before anything newer is sent. With a window of more
than one it may all the same come behind a later one that was accepted while it was not, so the
checker judges the order of attempts that were acked on one connection.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import random
import socket
import time
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, Literal
from urllib.parse import urlsplit

from websockets.asyncio.client import ClientConnection, connect
from websockets.exceptions import ConnectionClosed, InvalidHandshake, InvalidStatus

from tests.faults.checker import rights as rights_in
from tests.faults.history import (
    Closed,
    Connected,
    Epoch,
    History,
    Hole,
    Joined,
    Left,
    Position,
    Received,
    Record,
    Reset,
    Sent,
    Session,
)
from tests.support.tokens import Issuer
from tests.support.worker import end

Frame = dict[str, Any]

WINDOW = 8
OUTBOX = 64
ANSWER_SECONDS = 1.0
"""A send is answered within this, whatever the store does: most of them,"""
LATE_SECONDS = 3.0
"""and each within this, on a machine with other things to do."""
GIVE_UP_SECONDS = 8.0
"""So long a send is repeated; then its outcome stays unknown."""
CONNECT_SECONDS = 4.0
PING_SECONDS = 2.0
BACKOFF_SECONDS = (0.5, 2.0)
"""Full jitter: the first and the longest limit; the protocol's are 1 and 30."""
POLL_SECONDS = 0.02
SETTLED_SECONDS = 10.0
AGAIN_SECONDS = 0.3
"""Before what was ``unavailable`` is asked for again."""
OWN_BUGS = (1002, 1007)
TRIES = 3


class Standing(Enum):
    OUT = auto()
    ASKED = auto()
    """A join is under way, for the first time on this connection."""
    IN = auto()
    HOLE = auto()
    """A join is under way because events were missing; events are dropped until its ack."""


@dataclass
class Place:
    """Where a client is in one room: section 3, "Positions"."""

    room: str
    standing: Standing = Standing.OUT
    epoch: str = ""
    last: int | None = None

    @property
    def position(self) -> Position | None:
        return None if self.last is None else Position(self.epoch, self.last)


@dataclass
class Send:
    """One message to one room, until its outcome is settled."""

    room: str
    key: str
    sequence: int
    began: float = 0.0
    tried: float = 0.0
    attempt: int = 0
    unanswered: bool = False
    """An attempt may have been stored."""
    echo: bool = True


@dataclass
class Post:
    """One ``send`` command: to one room, or to several."""

    sends: list[Send]
    echo: bool
    stubborn: bool
    """It is repeated until it is settled; otherwise it is given up at the first doubt."""
    padding: str = ""


Answered = Callable[[Frame], None]


class World:
    """What the clients of one fleet have in common."""

    def __init__(
        self, history: History, issuer: Issuer, urls: Sequence[str], seed: int = 0
    ) -> None:
        self.history = history
        self.issuer = issuer
        self.urls = list(urls)
        self.random = random.Random(seed)
        self.revoked: set[str] = set()
        """Sessions whose end is no surprise."""
        self.undaunted = False
        """They come back whatever they are told: their links lie."""
        self.counts: dict[str, int] = defaultdict(int)
        """What clients were told beside acks: refusals and errors."""

    def add(self, record: Record) -> None:
        self.history.add(record)

    def count(self, what: str) -> None:
        self.counts[what.strip()] += 1

    def url(self, rng: random.Random) -> str:
        return rng.choice(self.urls)

    async def narrow_socket(self, receive_buffer: int) -> socket.socket:
        """A connection whose kernel keeps little for a client that does not read."""
        parts = urlsplit(self.urls[0])
        narrow = socket.socket()
        narrow.setblocking(False)
        narrow.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        try:
            await asyncio.get_running_loop().sock_connect(narrow, (parts.hostname, parts.port))
        except BaseException:
            narrow.close()
            raise
        return narrow


class Client:
    """One member: it connects, and comes back, until it is told to leave."""

    def __init__(
        self,
        world: World,
        name: str,
        rooms: Sequence[str],
        rights: dict[str, str],
        *,
        lazy: bool = False,
        lifetime: int = 60,
        receive_buffer: int | None = None,
    ) -> None:
        self.name = name
        self.rights = rights
        self.places = {room: Place(room) for room in rooms}
        self.final: int | None = None
        """The code of a close that forbids to come back."""
        self.port = 0
        """Its own end of the link, by which a proxy knows it."""
        self._world = world
        self._random = random.Random(world.random.random())
        self._lazy = lazy
        self._lifetime = lifetime
        self._receive_buffer = receive_buffer
        self._logins = itertools.count(1)
        self._connections = itertools.count(1)
        self._sequence = itertools.count(1)
        self.session = ""
        self._token, self._token_until = "", 0.0
        self._socket: ClientConnection | None = None
        self.connection = ""
        self._ids = itertools.count(1)
        self._answers: dict[int, Answered] = {}
        self._frames: asyncio.Queue[str] = asyncio.Queue()
        self._attempts = itertools.count(1)
        self._outbox: deque[Post] = deque()
        self._sent: dict[int, Post] = {}
        self._again: list[Post] = []
        self._bye: Frame | None = None
        self._failures = 0
        self._own_bugs = 0
        self._leaving = False
        self._reading = asyncio.Event()
        self._reading.set()
        self.strange: list[str] = []
        """Frames that make no sense."""
        self.log_in()

    def __repr__(self) -> str:
        return f"<Client {self.name} {self.connection or 'away'}>"

    @property
    def connected(self) -> bool:
        return self._socket is not None

    @property
    def joined(self) -> bool:
        """It is in every room that it may be in."""
        return self.connected and all(
            place.standing is Standing.IN or not self.may(place.room, "r")
            for place in self.places.values()
        )

    @property
    def rooms(self) -> Sequence[str]:
        return list(self.places)

    def may(self, room: str, right: str) -> bool:
        return right in rights_in(self.rights, room)

    def reached(self, room: str) -> int:
        return self.places[room].last or 0

    # Logging in.

    def log_in(self) -> None:
        self.session = f"{self.name} login {next(self._logins)}"
        self._token_until = 0.0
        self._world.add(
            Session(at=now(), member=self.name, session=self.session, rooms=self.rights)
        )

    def _fresh_token(self) -> str:
        self._token_until = now() + self._lifetime
        self._token = self._world.issuer.token(
            self.name, session=self.session, rooms=self.rights, lifetime=self._lifetime
        )
        return self._token

    # Connecting: section 4.

    async def run(self) -> None:
        while not self._leaving and self.final is None:
            wait = await self._try()
            if not self._leaving:
                await asyncio.sleep(wait)

    async def _try(self) -> float:
        """One connection, from the first SYN to the end. Returns how long to wait after it."""
        began = now()
        if self._token_until - now() < self._lifetime / 5:
            self._fresh_token()
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                socket = await self._connect()
        except InvalidStatus as refusal:
            return self._refused(refusal)
        except (OSError, EOFError, TimeoutError, InvalidHandshake, ConnectionClosed):
            return self._backoff()
        self._bye = None
        code = 1006
        try:
            code = await self._live(socket, began)
        finally:
            self._lose(code, socket)
        if now() - began > SETTLED_SECONDS:
            self._failures = 0
        return self._wait_after(code)

    async def _connect(self) -> ClientConnection:
        options: dict[str, Any] = {}
        if self._receive_buffer is not None:
            options["sock"] = await self._world.narrow_socket(self._receive_buffer)
        return await connect(
            self._world.url(self._random),
            additional_headers={"Authorization": f"Bearer {self._token}"},
            compression=None,
            ping_interval=None,
            open_timeout=CONNECT_SECONDS,
            close_timeout=1,
            max_size=None,
            proxy=None,
            **options,
        )

    def _refused(self, refusal: InvalidStatus) -> float:
        response = refusal.response
        try:
            code = str(json.loads(response.body)["error"]["code"])
        except (ValueError, KeyError, TypeError):
            code = ""
        self._world.count(f"handshake {response.status_code} {code}")
        if code == "token_revoked":
            self._revoked(4503)
        elif code == "token_expired":
            self._token_until = 0.0
        if (after := response.headers.get("Retry-After")) is not None:
            return float(after) + self._random.random() / 2
        return self._backoff()

    def _backoff(self) -> float:
        first, longest = BACKOFF_SECONDS
        limit = min(longest, first * 2 ** min(self._failures, 10))
        self._failures += 1
        return self._random.uniform(0, limit)

    def _wait_after(self, code: int) -> float:
        if code == 4503:
            self._revoked(code)
        elif code >= 4500 and not self._world.undaunted:
            self.final = code
        elif code == 4401:
            self._token_until = 0.0
        elif code in OWN_BUGS:
            self._own_bugs += 1
            if self._own_bugs == TRIES and not self._world.undaunted:
                self.final = code
        after = (self._bye or {}).get("after")
        return after / 1000 if isinstance(after, int) else self._backoff()

    def _revoked(self, code: int) -> None:
        """Final, unless it is known why: then somebody logs in again."""
        if self.session in self._world.revoked or self._world.undaunted:
            self.log_in()
        else:
            self.final = code

    # A connection's life.

    async def _live(self, socket: ClientConnection, began: float) -> int:
        try:
            async with asyncio.timeout(CONNECT_SECONDS):
                welcome = json.loads(await socket.recv())
        except (ConnectionClosed, TimeoutError, ValueError):
            socket.transport.abort()
            return _code(socket)
        if not isinstance(welcome, dict) or welcome.get("type") != "welcome":
            self._strange({"welcome": welcome})
        self.connection = f"{self.name}#{next(self._connections)}"
        self.port = socket.transport.get_extra_info("sockname")[1]
        self._world.add(
            Connected(
                at=now(),
                member=self.name,
                session=self.session,
                connection=self.connection,
                began=began,
            )
        )
        self._socket = socket
        self._frames = asyncio.Queue()
        self._attempts = itertools.count(1)
        for place in self.places.values():
            self._join(place, Standing.ASKED)
        self._pump()
        tasks = [asyncio.create_task(run(socket)) for run in (self._write, self._watch)]
        try:
            await self._read(socket)
        finally:
            await end(tasks)
        return _code(socket)

    async def _read(self, socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                await self._reading.wait()
                text = await socket.recv()
                try:
                    self._receive(json.loads(text))
                except (ValueError, KeyError, TypeError, AttributeError) as error:
                    self._strange({"error": repr(error), "frame": str(text)})
                    socket.transport.abort()

    async def _write(self, socket: ClientConnection) -> None:
        with contextlib.suppress(ConnectionClosed):
            while True:
                await socket.send(await self._frames.get())

    async def _watch(self, socket: ClientConnection) -> None:
        """A link on which not even a pong comes is dead."""
        with contextlib.suppress(ConnectionClosed):
            while True:
                await asyncio.sleep(PING_SECONDS * self._random.uniform(0.5, 1))
                if not self._reading.is_set():
                    continue
                try:
                    async with asyncio.timeout(2 * PING_SECONDS):
                        await (await socket.ping())
                except TimeoutError:
                    if self._reading.is_set():
                        socket.transport.abort()

    def _lose(self, code: int, socket: ClientConnection) -> None:
        if self._socket is socket:
            closed = Closed(at=now(), member=self.name, connection=self.connection, code=code)
            self._world.add(closed)
        self._socket, self.connection, self.port = None, "", 0
        self._answers.clear()
        for place in self.places.values():
            place.standing = Standing.OUT
        lost, self._sent = list(self._sent.values()), {}
        for post in lost:
            for send in post.sends:
                send.unanswered = True
        self._repeat(lost)

    async def pause(self, seconds: float) -> None:
        """Read nothing for a while."""
        self._reading.clear()
        try:
            await asyncio.sleep(seconds)
        finally:
            self._reading.set()

    async def leave(self) -> None:
        """Go for good."""
        self._leaving = True
        if self._socket is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(2):
                    await self._socket.close()

    # Commands.

    def _command(self, type: str, answered: Answered, **fields: Any) -> int:
        id = next(self._ids)
        self._answers[id] = answered
        self._frames.put_nowait(json.dumps({"type": type, "id": id, **fields}))
        return id

    async def ask(self, type: str, within: float = GIVE_UP_SECONDS, **fields: Any) -> Frame:
        """A command's ack or error. Raises TimeoutError when none comes, or nobody is there."""
        if self._socket is None:
            raise TimeoutError
        answer: asyncio.Future[Frame] = asyncio.get_running_loop().create_future()

        def answered(frame: Frame) -> None:
            if not answer.done():
                answer.set_result(frame)

        self._command(type, answered, **fields)
        async with asyncio.timeout(within):
            return await answer

    async def end_of(self, room: str) -> Position | None:
        with contextlib.suppress(TimeoutError):
            told = await self.ask("history", PING_SECONDS, room=room, limit=1)
            if told["type"] == "ack":
                return Position(told["epoch"], told["offset"])
        return None

    def _later(self, act: Callable[[], None], seconds: float = AGAIN_SECONDS) -> None:
        """If this connection is still there by then."""
        connection = self.connection

        def go() -> None:
            if self._socket is not None and self.connection == connection:
                act()

        asyncio.get_running_loop().call_later(seconds * self._random.uniform(1, 2), go)

    # Rooms: section 3.

    def _join(self, place: Place, standing: Standing) -> None:
        place.standing = standing
        since = place.position
        fields: Frame = {"room": place.room}
        if since is not None:
            fields["since"] = {"epoch": since.epoch, "offset": since.offset}

        def answered(frame: Frame) -> None:
            if frame["type"] == "ack":
                self._admitted(place, since, frame)
            elif frame["code"] == "forbidden":
                self._left(place, "forbidden")
            else:
                self._world.count(f"join {frame['code']}")
                self._later(lambda: self._join(place, standing))

        self._command("join", answered, **fields)

    def _admitted(self, place: Place, since: Position | None, ack: Frame) -> None:
        place.standing = Standing.IN
        place.epoch, place.last = ack["epoch"], ack["offset"] - ack["replay"]
        gap = ack.get("gap")
        self._world.add(
            Joined(
                at=now(),
                member=self.name,
                connection=self.connection,
                room=place.room,
                epoch=ack["epoch"],
                offset=ack["offset"],
                replay=ack["replay"],
                since=since,
                recovered=ack.get("recovered"),
                gap=(gap["from"], gap["to"]) if gap else None,
            )
        )

    def _left(self, place: Place, reason: str) -> None:
        place.standing = Standing.OUT
        self._world.add(
            Left(
                at=now(),
                member=self.name,
                connection=self.connection,
                room=place.room,
                reason=reason,
            )
        )

    def _receive(self, frame: Frame) -> None:
        if "id" in frame:
            answered = self._answers.pop(frame["id"], None)
            if answered is None:
                self._strange(frame)
            else:
                answered(frame)
            return
        match frame["type"]:
            case "bye":
                self._bye = frame
            case "expiring":
                if not self._lazy:
                    self._refresh()
            case "error" | "welcome" | "ack":
                self._strange(frame)
            case _ if "room" in frame:
                self._receive_in_room(frame)

    def _receive_in_room(self, frame: Frame) -> None:
        place = self.places.get(frame["room"]) or Place(frame["room"])
        common: dict[str, Any] = {
            "at": now(),
            "member": self.name,
            "connection": self.connection,
            "room": place.room,
        }
        match frame["type"]:
            case "reset":
                self._world.add(Reset(**common, epoch=frame["epoch"], offset=frame["offset"]))
                place.epoch, place.last = frame["epoch"], frame["offset"]
            case "epoch":
                self._world.add(Epoch(**common, epoch=frame["epoch"]))
                place.epoch = frame["epoch"]
            case "left":
                self._left(place, frame["reason"])
            case _ if "offset" in frame:
                self._move(place, frame, common)

    def _move(self, place: Place, frame: Frame, common: dict[str, Any]) -> None:
        """Apply, drop, or find a hole. What is dropped is written down, too: it is a duplicate."""
        offset = frame["offset"]
        if place.standing is Standing.HOLE:
            return
        if place.standing is Standing.IN and place.last is not None and offset > place.last + 1:
            self._world.add(Hole(**common, expected=place.last + 1, got=offset))
            self._join(place, Standing.HOLE)
            return
        kind: Literal["message", "skip"] = "skip" if frame["type"] == "skip" else "message"
        self._world.add(
            Received(
                **common,
                epoch=place.epoch,
                offset=offset,
                kind=kind,
                key=frame.get("key", ""),
                ts=frame.get("ts", 0),
            )
        )
        if place.standing is Standing.IN and place.last is not None:
            place.last = max(place.last, offset)

    def _refresh(self) -> None:
        def answered(frame: Frame) -> None:
            if frame["type"] == "error":
                self._world.count(f"refresh {frame['code']}")
                if frame["code"] in ("unavailable", "internal", "rate_limited"):
                    self._later(self._refresh, 1.0)

        self._command("refresh", answered, token=self._fresh_token())

    def _strange(self, frame: Frame) -> None:
        self.strange.append(json.dumps(frame)[:200])

    def wander(self, room: str) -> None:
        """Leave a room, and come back to where it was."""
        place = self.places[room]
        if self._socket is None or place.standing is not Standing.IN:
            return

        def answered(frame: Frame) -> None:
            if frame["type"] == "ack":
                self._left(place, "asked")
                self._join(place, Standing.ASKED)

        self._command("leave", answered, room=room)

    # Sends.

    def publish(
        self, rooms: Sequence[str], *, echo: bool = True, stubborn: bool = True, padding: int = 0
    ) -> bool:
        """Queue a message; False when too much is waiting already."""
        if len(self._outbox) >= OUTBOX:
            return False
        key = str(uuid.UUID(int=self._random.getrandbits(128), version=4))
        sends = [Send(room, key, next(self._sequence), echo=echo) for room in rooms]
        self._outbox.append(Post(sends, echo, stubborn, "x" * padding))
        self._pump()
        return True

    @property
    def settled(self) -> bool:
        """Nothing waits for an answer."""
        return not (self._outbox or self._sent or self._again)

    def _pump(self) -> None:
        """Send what the window allows. While something is to be repeated, nothing newer goes."""
        while (
            self._socket is not None
            and self._outbox
            and len(self._sent) < WINDOW
            and not self._again
        ):
            self._transmit(self._outbox.popleft())

    def _transmit(self, post: Post) -> None:
        attempt = next(self._attempts)
        for send in post.sends:
            send.tried, send.attempt = now(), attempt
            send.began = send.began or send.tried
        rooms = [send.room for send in post.sends]
        fields: Frame = {"room": rooms[0]} if len(rooms) == 1 else {"rooms": rooms}
        body = {"from": self.name, "n": post.sends[0].sequence, "padding": post.padding}

        def answered(frame: Frame) -> None:
            self._sent.pop(number, None)
            self._settle(post, frame)
            self._pump()

        number = self._command(
            "send", answered, **fields, key=post.sends[0].key, body=body, echo=post.echo
        )
        self._sent[number] = post

    def _settle(self, post: Post, frame: Frame) -> None:
        results = frame.get("results", [frame])
        if frame["type"] == "error":
            results = [{"error": frame}] * len(post.sends)
        doubtful = []
        for send, result in zip(post.sends, results, strict=True):
            error = result.get("error")
            if error is None:
                self._record(send, "ok", result)
            elif error["code"] in ("unavailable", "internal"):
                send.unanswered = True
                doubtful.append(send)
            else:
                self._give_up(send, error["code"])
        if doubtful:
            post.sends = doubtful
            self._repeat([post])

    def _repeat(self, posts: list[Post]) -> None:
        """Send again, soon, with the same keys; or give up."""
        for post in posts:
            late = now() - post.sends[0].began > GIVE_UP_SECONDS
            if late or not post.stubborn:
                for send in post.sends:
                    self._give_up(send, "unanswered")
                continue
            if not self._again:
                asyncio.get_running_loop().call_later(AGAIN_SECONDS, self._resume)
            self._again.append(post)

    def _resume(self) -> None:
        again, self._again = self._again, []
        again.sort(key=lambda post: post.sends[0].sequence)
        self._outbox.extendleft(reversed(again))
        self._pump()

    def abandon(self) -> None:
        """Nobody waits for answers any longer."""
        posts = [*self._sent.values(), *self._again, *self._outbox]
        self._sent, self._again = {}, []
        self._outbox.clear()
        for post in posts:
            for send in post.sends:
                send.unanswered |= send.attempt > 0
                self._give_up(send, "abandoned")

    def _give_up(self, send: Send, code: str) -> None:
        self._record(send, "unknown" if send.unanswered else "failed", {}, code)

    def _record(
        self, send: Send, outcome: Literal["ok", "failed", "unknown"], ack: Frame, code: str = ""
    ) -> None:
        self._world.add(
            Sent(
                at=now(),
                sender=self.name,
                sequence=send.sequence,
                room=send.room,
                key=send.key,
                outcome=outcome,
                began=send.began,
                tried=send.tried,
                connection=self.connection,
                attempt=send.attempt,
                epoch=ack.get("epoch", ""),
                offset=ack.get("offset", 0),
                duplicate=ack.get("duplicate", False),
                code=code,
                echo=send.echo,
            )
        )


def now() -> float:
    return time.time()


def _code(socket: ClientConnection) -> int:
    return 1006 if socket.close_code is None else socket.close_code

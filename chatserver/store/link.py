"""Connections to Redis: lanes for commands, subscriptions for pub/sub.

A *lane* is one connection with group commit: commands queue up while a pipeline is under way and
go out together as the next one. Idle, that costs one round trip; under load, a fraction of one.
Nothing is ever retried here: a script whose answer was lost may have run, and only its caller
knows whether it can be repeated (with a key). So every failure is ``StoreUnavailable``.

A *subscription* is one connection that listens. Redis forgets who listened when a connection
ends, so it subscribes again by itself and confirms each channel anew: what was said in between
is lost, and the owner reads the log.

Where a connection goes is topology.py's to say, each time anew: behind sentinels the primary
changes. One that answers READONLY is none any more, and is left at once.

redis-py's client would retry an outage into a hang of seconds, and its pool would hide on which
connection a script is known, so this uses its connections and nothing above them.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
import random
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Sequence
from importlib import resources
from typing import Any, NamedTuple, Self, TypeVar

from redis.asyncio.connection import AbstractConnection
from redis.exceptions import AskError, MovedError, NoScriptError, RedisError, ResponseError

from chatserver import telemetry
from chatserver.core.errors import StoreRefused, StoreUnavailable
from chatserver.metrics import OTHER, SUBSCRIPTION, measured
from chatserver.settings import store_place
from chatserver.store.deadline import Deadline
from chatserver.store.topology import (
    CONNECT_SECONDS,
    Address,
    Argument,
    Cluster,
    Garbled,
    Place,
    Sentinel,
    Single,
    exchange,
    hung_up,
    place_of,
    receive,
    send,
)

ROUND_TRIP_SECONDS = CONNECT_SECONDS
"""A pipeline's deadline. A second one may have to fail before a waiting command is answered,
and protocol.md promises ``unavailable`` within a second."""
REPLICA_MILLISECONDS = 250
"""How long replicas may take to confirm; within the round trip."""
LANE_COMMANDS = 20_000
"""A lane's bound; a command beyond it is unavailable at once."""
PING_SECONDS = 1.0
DEAF_PINGS = 3
"""A subscription that has heard nothing since so many pings is connected anew. Not since so many
seconds: a process that stood still for them has yet to read what came meanwhile."""

Reply = Any
"""What redis-py makes of a RESP2 reply: bytes, int, None, lists of these."""
Parsed = TypeVar("Parsed")
Done = Callable[[Reply | StoreUnavailable], None]
Call = Callable[[list[Argument]], Awaitable[Reply]]
"""``Lane.call`` or ``Store.call``: one command, its reply, or StoreUnavailable."""


class _Announce(str):
    __slots__ = ()


ANNOUNCE = _Announce("PUBLISH")
"""In a command, or among a script's arguments: what this store calls announcing on a channel. A
cluster's lanes know it by its identity, and put theirs in its place."""

_NO_PRIMARY = ("READONLY", "MASTERDOWN")

log = telemetry.logger(__name__)


class Script:
    """A Lua file of ``store/lua``, by its name, perhaps with another one before it."""

    def __init__(self, name: str, beginning: str | None = None) -> None:
        files = resources.files("chatserver.store") / "lua"
        parts = [part for part in (beginning, name) if part]
        self.name = name
        self.source = b"".join((files / f"{part}.lua").read_bytes() for part in parts)
        self.sha = hashlib.sha1(self.source, usedforsecurity=False).hexdigest()

    def command(self, keys: Sequence[Argument], arguments: Iterable[Argument]) -> list[Argument]:
        return ["EVALSHA", self.sha, len(keys), *keys, *arguments]


PUBLISH = Script("publish", "room")
READ = Script("read", "room")
REVOKE = Script("revoke")
POLL = Script("poll")
BEGIN = Script("begin")
ROTATE = Script("rotate")
ENTITLE = Script("entitle")
REGISTER = Script("register")
SCRIPTS = (PUBLISH, READ, REVOKE, POLL, BEGIN, ROTATE, ENTITLE, REGISTER)


class Redirected(StoreRefused):
    """It was not carried out: on a cluster another node has the key."""

    def __init__(self, slot: int, host: str, port: int, *, asking: bool) -> None:
        super().__init__(f"the key is kept at {host}:{port}")
        self.slot = slot
        self.address = Address(host, port)
        """Its host is empty where it is the one that was asked."""
        self.asking = asking
        """Only this time, and only after ASKING: the slot is being moved."""

    def found_by(self, asked: Address) -> Address:
        """Whose address it is, said by that one."""
        return Address(self.address.host or asked.host, self.address.port)


def _as_it_is(reply: Reply) -> Any:
    return reply


class _Request(NamedTuple):
    command: list[Argument]
    done: Done
    wanted: Callable[[], bool] | None
    weight: int


class Lane:
    """One connection for commands. ``run`` must be a task while it is used.

    A pipeline holds commands up to ``batch`` in weight. With ``replicas``, a reply counts only
    when so many replicas have what was written, else it is StoreUnavailable. It is counted under
    its ``name``, one of metrics.LANES.
    """

    def __init__(self, place: Place, *, batch: int, replicas: int = 0, name: str = OTHER) -> None:
        self._name = name
        self._place = place
        self._connection = place.connection()
        self._batch = batch
        self._replicas = replicas
        self._queue: deque[_Request] = deque()
        self._filled = asyncio.Event()
        self._down = False
        self._demoted = False
        """An answer has said that this is no primary."""

    @property
    def down(self) -> bool:
        """Whether commands are refused at once; none is under way then."""
        return self._down

    def submit(
        self,
        command: list[Argument],
        done: Done,
        wanted: Callable[[], bool] | None = None,
        weight: int = 1,
    ) -> None:
        """Queue a command. ``done`` is called once, later, with the reply or StoreUnavailable.

        Commands go out in the order submitted. One whose ``wanted`` says no by then is dropped,
        and its ``done`` never called.
        """
        if self._down or len(self._queue) >= LANE_COMMANDS:
            asyncio.get_running_loop().call_soon(done, StoreUnavailable("the store is away"))
            return
        self._queue.append(_Request(command, done, wanted, weight))
        self._filled.set()

    async def call(self, command: list[Argument]) -> Reply:
        """As ``submit``, waiting for the reply. Raises StoreUnavailable."""
        return await self.fetch(command, _as_it_is)

    async def fetch(self, command: list[Argument], parse: Callable[[Reply], Parsed]) -> Parsed:
        """As ``submit``, waiting for what ``parse`` makes of the reply. Raises StoreUnavailable."""
        future: asyncio.Future[Parsed] = asyncio.get_running_loop().create_future()

        def done(parsed: Parsed | StoreUnavailable) -> None:
            if future.done():
                return
            if isinstance(parsed, StoreUnavailable):
                future.set_exception(parsed)
            else:
                future.set_result(parsed)

        self.submit(command, understood(parse, done))
        return await future

    async def run(self) -> None:
        """Carry out what is queued, until cancelled."""
        try:
            # Not at the first command: there may be no descriptor left by then.
            await self._reconnect("not connected yet")
            while True:
                await self._filled.wait()
                self._filled.clear()
                while batch := self._take():
                    await self._commit(batch)
        finally:
            self._fail(self._queue, "the server is stopping")
            self._queue.clear()
            await self._connection.disconnect(nowait=True)

    def _take(self) -> list[_Request]:
        batch: list[_Request] = []
        left = self._batch
        while self._queue and left > 0:
            request = self._queue.popleft()
            if request.wanted is None or request.wanted():
                batch.append(request)
                left -= request.weight
        return batch

    async def _commit(self, batch: list[_Request]) -> None:
        """One pipeline: write all, read all."""
        began = time.monotonic()
        answered = 0
        try:
            async with Deadline(ROUND_TRIP_SECONDS):
                if hung_up(self._connection):
                    await _connect(self._place, self._connection)
                commands = [request.command for request in batch]
                if self._replicas:
                    commands.append(["WAIT", self._replicas, REPLICA_MILLISECONDS])
                await send(self._connection, commands)
                if self._replicas:
                    # None is told before all is known to be safe.
                    replies = self._confirmed([await self._read_reply() for _ in commands])
                    for request, reply in zip(batch, replies, strict=True):
                        answered += 1
                        request.done(reply)
                else:
                    for request in batch:
                        reply = await self._read_reply()
                        answered += 1
                        request.done(reply)
            measured.store_round_trip_seconds[self._name].observe(time.monotonic() - began)
            measured.store_commands[self._name] += len(batch)
            if self._demoted:
                raise ConnectionError("it is no primary any more")
        except (RedisError, OSError, TimeoutError) as error:
            await self._lose(batch[answered:], error)

    def _confirmed(self, replies: list[Reply]) -> list[Reply]:
        """The replies, if enough replicas have what they speak of, as the last one says."""
        acknowledged = replies.pop()
        if isinstance(acknowledged, int) and acknowledged >= self._replicas:
            return replies
        return [StoreUnavailable("too few replicas have it")] * len(replies)

    async def _read_reply(self) -> Reply | StoreUnavailable:
        try:
            return await receive(self._connection)
        except NoScriptError:
            # Someone flushed the scripts: a new connection loads them again.
            raise
        except ResponseError as error:
            self._demoted = self._demoted or error.status_code in _NO_PRIMARY
            return _refusal(error)

    async def _lose(self, unanswered: list[_Request], error: Exception) -> None:
        measured.store_failures[self._name] += 1
        reason = str(error) or type(error).__name__
        await self._connection.disconnect(nowait=True)
        self._demoted = False
        self._fail(unanswered, reason)
        if isinstance(error, NoScriptError):
            return
        self._place.lost()
        await self._reconnect(reason)

    async def _reconnect(self, reason: str) -> None:
        """Until it succeeds, commands are refused at once rather than kept waiting."""
        wait, longest = self._place.retry_seconds
        first = True
        while True:
            try:
                async with Deadline(ROUND_TRIP_SECONDS):
                    await _connect(self._place, self._connection)
            except (RedisError, OSError, TimeoutError) as error:
                measured.store_failures[self._name] += 1
                if not self._down:
                    log.warning("store is away", reason=reason)
                self._down = True
                self._place.lost()
                reason = str(error) or type(error).__name__
                self._fail(self._queue, reason)
                self._queue.clear()
            else:
                if self._down:
                    log.info("store is back")
                self._down = False
                return
            await asyncio.sleep(wait * random.uniform(0.5, 1.0))  # jitter: workers spread out
            wait = wait if first else min(longest, wait * 2)
            first = False

    def _fail(self, requests: Iterable[_Request], reason: str) -> None:
        for request in list(requests):
            request.done(StoreUnavailable(reason))


async def _connect(place: Place, connection: AbstractConnection) -> None:
    """Connect and load the scripts first: a NOSCRIPT amid a pipeline would reorder a sender."""
    await connection.disconnect(nowait=True)
    await place.connect(connection)
    await exchange(connection, [("SCRIPT", "LOAD", script.source) for script in SCRIPTS])


def _refusal(error: ResponseError) -> StoreRefused:
    """OOM, READONLY, LOADING, MISCONF and their kind."""
    if isinstance(error, AskError):
        asking = not isinstance(error, MovedError)
        return Redirected(error.slot_id, error.host, error.port, asking=asking)
    # Behind it Redis names the script and its line, which say nothing to an operator;
    # redis-py takes away the code before it, which does.
    said = " ".join(filter(None, (error.status_code, str(error))))
    return StoreRefused(said.partition(" script: ")[0])


def understood(
    parse: Callable[[Reply], Parsed], done: Callable[[Parsed | StoreUnavailable], None]
) -> Done:
    """For ``Lane.submit``: ``done`` gets what ``parse`` makes of the reply.

    A reply that makes no sense is as good as none, and the lane connects anew: the replies behind
    it may belong to other commands.
    """

    def receive(reply: Reply | StoreUnavailable) -> None:
        if isinstance(reply, StoreUnavailable):
            done(reply)
            return
        try:
            parsed = parse(reply)
        except (AttributeError, LookupError, TypeError, ValueError) as error:
            done(StoreUnavailable("its answer makes no sense"))
            raise Garbled(str(error)) from None
        done(parsed)

    return receive


class Subscription:
    """One connection that listens on channels. ``run`` must be a task while it is used.

    ``on_message(channel, payload)`` for each message; ``on_confirmed(channel)`` when the store
    has confirmed a channel, again after every reconnect.
    """

    def __init__(
        self,
        place: Place,
        *,
        on_message: Callable[[str, bytes], None],
        on_confirmed: Callable[[str], None],
    ) -> None:
        self._place = place
        self._connection = place.connection()
        self._on_message = on_message
        self._on_confirmed = on_confirmed
        self._channels: set[str] = set()
        self._unsent: dict[str, bool] = {}
        """Channels to subscribe (True) or unsubscribe (False) with the next write."""
        self._unconfirmed: dict[str, int] = {}
        self._changed = asyncio.Event()
        self._connected = False
        self._unheard = 0
        """Pings since anything was heard."""

    def subscribe(self, channel: str) -> None:
        self._channels.add(channel)
        self._unsent[channel] = True
        self._changed.set()

    def unsubscribe(self, channel: str) -> None:
        self._channels.discard(channel)
        self._unsent[channel] = False
        self._changed.set()

    async def run(self) -> None:
        """Listen until cancelled, connecting anew whenever the connection is lost or deaf."""
        shortest, longest = self._place.retry_seconds
        wait = shortest
        try:
            while True:
                try:
                    await self._listen()
                except (RedisError, OSError, TimeoutError, StoreRefused):
                    measured.store_failures[SUBSCRIPTION] += 1
                    wait = shortest if self._connected else min(longest, wait * 2)
                self._place.lost()
                await self._connection.disconnect(nowait=True)
                await asyncio.sleep(wait * random.uniform(0.5, 1.0))
        finally:
            await self._connection.disconnect(nowait=True)

    async def _listen(self) -> None:
        self._connected = False
        async with Deadline(ROUND_TRIP_SECONDS):
            await self._place.connect(self._connection)
        self._connected, self._unheard = True, 0
        self._unconfirmed.clear()
        self._unsent = dict.fromkeys(self._channels, True)
        self._changed.set()
        # Not a TaskGroup: it cancels this very task when a child fails, and before Python 3.11.3 a
        # later timeout in it would end as that cancellation, and the subscription with it.
        tasks = [asyncio.create_task(part) for part in (self._write(), self._read())]
        try:
            ended, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
        for task in ended:
            task.result()

    async def _write(self) -> None:
        """Send what changed, and pings, for redis-py can go deaf without an error."""
        loop = asyncio.get_running_loop()
        ping_at = loop.time() + PING_SECONDS
        while True:
            try:
                async with asyncio.timeout_at(ping_at):
                    await self._changed.wait()
            except TimeoutError:
                if self._unheard >= DEAF_PINGS:
                    raise
                self._unheard += 1
                await self._send(["PING"])
                ping_at = loop.time() + PING_SECONDS
            self._changed.clear()
            changes, self._unsent = self._unsent, {}
            fresh = [channel for channel, wanted in changes.items() if wanted]
            stale = [channel for channel, wanted in changes.items() if not wanted]
            for channel in fresh:
                self._unconfirmed[channel] = self._unconfirmed.get(channel, 0) + 1
            await self._send(*self._commands(fresh, stale))

    def _commands(self, fresh: list[str], stale: list[str]) -> list[list[str]]:
        asked = (["SUBSCRIBE", *fresh], ["UNSUBSCRIBE", *stale])
        return [command for command in asked if len(command) > 1]

    async def _send(self, *commands: Sequence[str]) -> None:
        if commands:
            async with Deadline(ROUND_TRIP_SECONDS):
                await send(self._connection, commands)

    async def _read(self) -> None:
        while True:
            # A burst that is buffered already comes without a pause: let the loop have one.
            for _ in range(256):
                try:
                    reply = await receive(self._connection, seconds=math.inf)
                except ResponseError as error:
                    reply = _refusal(error)
                self._unheard = 0
                self._receive(reply)
            await asyncio.sleep(0)

    def _receive(self, reply: Reply) -> None:
        match reply:
            case [b"message", bytes() as channel, bytes() as payload]:
                self._on_message(channel.decode(errors="replace"), payload)
            case [b"subscribe", bytes() as channel, _]:
                self._confirm(channel.decode(errors="replace"))
            case StoreRefused():
                raise reply
            case _:
                pass  # b"unsubscribe" and b"pong"

    def _confirm(self, channel: str) -> None:
        # With an unsubscribe between two subscribes, only the last confirmation is the state.
        left = self._unconfirmed.get(channel, 0) - 1
        if left > 0:
            self._unconfirmed[channel] = left
            return
        self._unconfirmed.pop(channel, None)
        if channel in self._channels:
            self._on_confirmed(channel)


class Store:
    """A Redis at one address, or behind sentinels, by its URL: makes lanes, subscriptions.

    ``run`` should be a task while they are used: it follows where the primary goes. Of a cluster
    ``store_at`` in cluster.py makes one.

    As an async context manager, for a command line: connects, or raises StoreUnavailable; then
    ``call`` works on a lane of its own.
    """

    announce: str = ANNOUNCE
    """What scripts announce with."""

    def __init__(self, url: str) -> None:
        place = place_of(store_place(url))
        assert not isinstance(place, Cluster), "store_at makes those"
        self._place: Single | Sentinel = place

    def lane(self, batch: int = 256, replicas: int = 0, name: str = OTHER) -> Lane:
        return Lane(self._place, batch=batch, replicas=replicas, name=name)

    def subscription(
        self,
        on_message: Callable[[str, bytes], None],
        on_confirmed: Callable[[str], None] = lambda channel: None,
    ) -> Subscription:
        return Subscription(self._place, on_message=on_message, on_confirmed=on_confirmed)

    async def run(self) -> None:
        if isinstance(self._place, Sentinel):
            await self._place.run()

    async def __aenter__(self) -> Self:
        self._own = self.lane()
        self._tasks = [asyncio.create_task(run()) for run in (self.run, self._own.run)]
        try:
            await self.call(["PING"])
        except StoreUnavailable:
            await self.__aexit__()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def call(self, command: list[Argument]) -> Reply:
        return await self._own.call(command)

    async def describe(self) -> dict[str, str]:
        """Its ``version``, its ``policy`` when memory runs out, ``file`` 1 if it writes one,
        its ``mode`` and the one that is ``wanted``, and ``place``: what was found."""
        about = await self._about(self.call)
        return about | {"wanted": "standalone", "place": str(self._place)}

    async def _about(self, call: Call) -> dict[str, str]:
        info = _fields(await call(["INFO", "server"]))
        version = info.get("valkey_version") or info.get("redis_version", "unknown")
        policy = _fields(await call(["INFO", "memory"])).get("maxmemory_policy", "unknown")
        file = _fields(await call(["INFO", "persistence"])).get("aof_enabled", "unknown")
        mode = info.get("server_mode") or info.get("redis_mode", "standalone")
        return {"version": version, "policy": policy, "file": file, "mode": mode}


def _fields(info: bytes) -> dict[str, str]:
    """An INFO reply's ``name:value`` lines."""
    lines = info.decode().splitlines()
    return dict(line.split(":", 1) for line in lines if ":" in line)

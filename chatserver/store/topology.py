"""Where a connection to the store goes: who is asked for the address, and what is believed.

- ``Single``: the URL says it.
- ``Sentinel``: the sentinels say which server is the primary. All of them are asked at once, and
  of what a majority answers the newest configuration counts: one that was cut off together with
  an old primary goes on to praise it. Once a second they are asked again, and connections to
  anyone else are dropped, for a primary that was cut off goes on to answer.
- ``Node`` of a ``Cluster``: the map of slots names it. Any node has the map.

Whatever was said, a connection is used only when the other end says itself that it is a primary
(``ROLE``): what is written to an ex-primary is lost with it. Until the sentinels know of a new
primary there is none, and commands are refused.

With link.py the only import of redis.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, Protocol

from redis.asyncio import ConnectionPool
from redis.asyncio.connection import AbstractConnection
from redis.asyncio.retry import Retry
from redis.backoff import NoBackoff
from redis.exceptions import AuthenticationError, RedisError, ResponseError
from redis.exceptions import ConnectionError as NoConnection

from chatserver import telemetry
from chatserver.settings import ConfigurationError, StorePlace
from chatserver.store.deadline import Deadline

CONNECT_SECONDS = 0.4
SENTINEL_SECONDS = 0.15
"""How long sentinels may take to answer; the connection itself has to be made in the same 0.4 s."""
WATCH_SECONDS = 1.0
"""Between two looks at who is the primary."""
REFRESH_SECONDS = 30.0
"""Between two looks at the map of slots while nothing is wrong,"""
HURRY_SECONDS = 0.1
"""and at least so long while something is."""
SLOTS = 16_384

log = telemetry.logger(__name__)


class Address(NamedTuple):
    host: str
    port: int

    def __str__(self) -> str:
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


class Place(Protocol):
    """Where a lane or a subscription connects, again and again."""

    retry_seconds: tuple[float, float]
    """Connecting anew: the first wait and the longest."""

    def connection(self) -> AbstractConnection:
        """One that is not connected yet."""

    async def connect(self, connection: AbstractConnection) -> None:
        """Find the address and connect. Raises RedisError, OSError or TimeoutError."""

    def lost(self) -> None:
        """A connection has failed."""


class Single:
    """One server, or whatever stands before several."""

    retry_seconds = (0.05, 1.0)

    def __init__(self, url: str) -> None:
        self._pool = pool(url)

    def __str__(self) -> str:
        return "a single server"

    def connection(self) -> AbstractConnection:
        return _made(self._pool)

    async def connect(self, connection: AbstractConnection) -> None:
        await _connect(connection)

    def lost(self) -> None:
        pass


class Sentinel:
    """A primary and its replicas, watched by sentinels. ``run`` should be a task: it follows."""

    # They are asked together, by whoever comes first, so that short waits cost them little.
    retry_seconds = (0.05, 0.25)

    def __init__(self, place: StorePlace) -> None:
        self._name = place.service
        self._sentinels = [Address(*host) for host in place.hosts]
        self._pool = pool(place.url)
        self._asking_pools = _without_and_with_login(self._pool)
        self._connections: list[AbstractConnection] = []
        self._search: asyncio.Task[Address | str] | None = None
        self.primary: Address | None = None
        """As far as is known."""

    def __str__(self) -> str:
        return f"the primary of {self._name} at {self.primary}, found by its sentinels"

    def connection(self) -> AbstractConnection:
        made = _made(self._pool)
        self._connections.append(made)
        return made

    async def connect(self, connection: AbstractConnection) -> None:
        _aim(connection, await self.find())
        await _connect(connection)

    def lost(self) -> None:
        pass

    async def find(self) -> Address:
        """Ask for the primary's address. Raises a RedisError when nobody knows."""
        if self._search is None or self._search.done():
            self._search = asyncio.create_task(self._ask_all())
        found = await asyncio.shield(self._search)
        if isinstance(found, str):
            raise NoConnection(f"no sentinel says where {self._name} is: {found}")
        if self.primary != found:
            log.info("found the primary", name=self._name, address=str(found))
        self.primary = found
        return found

    async def run(self) -> None:
        """Drop connections to what is the primary no more, until cancelled."""
        while True:
            await asyncio.sleep(WATCH_SECONDS)
            try:
                primary = await self.find()
            except RedisError:
                continue  # while nobody knows better, what is there stays
            for connection in self._connections:
                if _aimed_at(connection) != primary:
                    hang_up(connection)

    async def _ask_all(self) -> Address | str:
        """The primary by the newest configuration that a majority knows, or why there is none."""
        asked = [asyncio.create_task(self._ask(sentinel)) for sentinel in self._sentinels]
        answers: list[tuple[int, Address]] = []
        reason = "they do not answer"
        try:
            async with Deadline(SENTINEL_SECONDS):
                for answer in asyncio.as_completed(asked):
                    try:
                        answers.append(await answer)
                    except (RedisError, OSError) as error:
                        reason = str(error) or type(error).__name__
                    if len(answers) > len(asked) // 2:
                        break
        except TimeoutError:
            pass
        finally:
            for task in asked:
                task.cancel()
            await asyncio.gather(*asked, return_exceptions=True)
        return max(answers)[1] if answers else reason

    async def _ask(self, sentinel: Address) -> tuple[int, Address]:
        """The epoch of the configuration that a sentinel knows, and the primary's address."""
        # Not from MASTER: it is late to tell of the address, the other one has no epoch.
        commands = (
            ("SENTINEL", "MASTER", self._name),
            ("SENTINEL", "GET-MASTER-ADDR-BY-NAME", self._name),
        )
        try:
            state, found = await ask(self._asking_pools[0], sentinel, commands)
        except AuthenticationError:
            if len(self._asking_pools) == 1:
                raise
            del self._asking_pools[0]  # they want a login, too
            state, found = await ask(self._asking_pools[0], sentinel, commands)
        if found is None:
            raise NoConnection("they do not know it")
        fields = dict(zip(state[::2], state[1::2], strict=True))
        return int(fields.get(b"config-epoch", 0)), Address(found[0].decode(), int(found[1]))


class Cluster:
    """The map of slots: which node has which. ``run`` must be a task while it is used."""

    def __init__(self, place: StorePlace) -> None:
        self._seeds = [Address(*host) for host in place.hosts]
        self._pool = pool(place.url)
        self._owners: list[Address | None] = [None] * SLOTS
        self._wanted = asyncio.Event()
        self._told: list[Callable[[], None]] = []
        self.looked = False
        """Whether anybody was asked yet."""

    def __str__(self) -> str:
        return f"a cluster of {len(self.primaries())} primaries"

    def owner(self, slot: int) -> Address | None:
        return self._owners[slot]

    def primaries(self) -> list[Address]:
        """All that have slots, by their first."""
        return list(dict.fromkeys(owner for owner in self._owners if owner is not None))

    def next_first(self, slot: int) -> int:
        """Whose first slot comes next: that slot, 0 after the last."""
        first: dict[Address, int] = {}
        for number, owner in enumerate(self._owners):
            if owner is not None:
                first.setdefault(owner, number)
        return min((number for number in first.values() if number > slot), default=0)

    def why_not(self) -> str:
        """A slot has no owner."""
        known = any(owner is not None for owner in self._owners)
        return "no node has the slot" if known else "no node of the cluster answers"

    def tell(self, changed: Callable[[], None]) -> None:
        """Call this whenever the map was looked at, or corrected."""
        self._told.append(changed)

    def moved(self, slot: int, owner: Address) -> None:
        """A node has said so. The others may have moved with it."""
        if self._owners[slot] != owner:
            self._owners[slot] = owner
            self._tell()
        self.look()

    def look(self) -> None:
        """Something is wrong with the map, or with a node: look soon."""
        self._wanted.set()

    def place(self, address: Address) -> Node:
        return Node(self, self._pool, address)

    async def run(self) -> None:
        """Keep the map, until cancelled."""
        while True:
            self._wanted.clear()
            await self.refresh()
            await asyncio.sleep(HURRY_SECONDS)
            try:
                async with asyncio.timeout(REFRESH_SECONDS):
                    await self._wanted.wait()
            except TimeoutError:
                pass

    async def refresh(self) -> None:
        """Ask one node after the other, in no order: one that was cut off is not asked for ever."""
        nodes = [*random.sample(known := self.primaries(), len(known)), *self._seeds]
        for address in dict.fromkeys(nodes):
            try:
                async with Deadline(CONNECT_SECONDS):
                    (ranges,) = await ask(self._pool, address, [("CLUSTER", "SLOTS")])
                owners = _owners(ranges, address)
            except (RedisError, OSError, TimeoutError):
                continue
            except (AttributeError, LookupError, TypeError, ValueError):
                continue  # what it says is no map
            if any(owners):
                self._owners = owners
                break
        self.looked = True
        self._tell()

    def _tell(self) -> None:
        for changed in self._told:
            changed()


class Node:
    """One node of a cluster. It says itself which keys are not its own."""

    retry_seconds = (0.05, 1.0)

    def __init__(self, cluster: Cluster, connections: ConnectionPool, address: Address) -> None:
        self._cluster = cluster
        self._pool = connections
        self.address = address

    def connection(self) -> AbstractConnection:
        made = _made(self._pool)
        _aim(made, self.address)
        return made

    async def connect(self, connection: AbstractConnection) -> None:
        await connection.connect()  # type: ignore[no-untyped-call]

    def lost(self) -> None:
        self._cluster.look()


def place_of(place: StorePlace) -> Single | Sentinel | Cluster:
    match place.kind:
        case "single":
            return Single(place.url)
        case "sentinel":
            return Sentinel(place)
        case "cluster":
            return Cluster(place)


def _owners(ranges: Iterable[Any], asked: Address) -> list[Address | None]:
    """CLUSTER SLOTS' reply: {first, last, {host, port, ...} of the primary, its replicas ...}."""
    owners: list[Address | None] = [None] * SLOTS
    for first, last, primary, *_ in ranges:
        host, port = (primary[0] or b"").decode(), int(primary[1])
        if host in ("", "?"):  # it does not know its own name, or is told to hide it
            host = asked.host
        owners[first : last + 1] = [Address(host, port)] * (last + 1 - first)
    return owners


# --- connections ---------------------------------------------------------------------------


def pool(url: str) -> ConnectionPool:
    """What makes connections as we want them: failing at once, retried by nobody but us.

    Raises ConfigurationError, which quotes nothing, when the URL's options are no good.
    """
    try:
        made = ConnectionPool.from_url(
            url,
            protocol=2,
            retry=Retry(NoBackoff(), 0),
            # Deadlines are for all that one attempt does, and do not count what this process slept.
            socket_timeout=None,
            socket_connect_timeout=None,
            health_check_interval=0,
        )
        _made(made)  # an option's name, and some values, are looked at only then
    except (TypeError, ValueError, RedisError):
        raise ConfigurationError(
            [
                "CHATSERVER_REDIS_URL: among its options, after the ?, is one that does not exist, "
                "or that cannot have this value."
            ]
        ) from None
    return made


def _without_and_with_login(connections: ConnectionPool) -> list[ConnectionPool]:
    """Sentinels often want no login, and refuse one that they do not know."""
    options = dict(connections.connection_kwargs)
    options.pop("db", None)
    login = {name: options.pop(name, None) for name in ("username", "password")}
    kind = connections.connection_class
    bare = ConnectionPool(kind, **options)
    return [bare, ConnectionPool(kind, **options, **login)] if any(login.values()) else [bare]


def _made(connections: ConnectionPool) -> AbstractConnection:
    made: AbstractConnection = connections.make_connection()  # type: ignore[no-untyped-call]
    return made


def _aim(connection: Any, address: Address) -> None:
    connection.host, connection.port = address


def _aimed_at(connection: Any) -> Address:
    return Address(connection.host, connection.port)


async def _connect(connection: AbstractConnection) -> None:
    await connection.connect()  # type: ignore[no-untyped-call]
    try:
        (role,) = await exchange(connection, [("ROLE",)])
    except ResponseError:
        return  # not every proxy knows it, nor may every user ask
    if not isinstance(role, list) or role[:1] != [b"master"]:
        raise NoConnection("it is a replica")


Argument = bytes | str | int | float
_LENGTHS = tuple(b"\r\n$%d\r\n" % length for length in range(1024))


def packed(commands: Iterable[Sequence[Argument]]) -> bytes:
    """The commands as Redis reads them: arrays of bulk strings (RESP2).

    redis-py's own packing took 9 of the 130 us that a send costs this server, this takes 3.
    """
    parts: list[bytes] = []
    for command in commands:
        parts.append(b"*%d" % len(command))
        for argument in command:
            if type(argument) is not bytes:
                argument = str(argument).encode()
            length = len(argument)
            parts.append(_LENGTHS[length] if length < 1024 else b"\r\n$%d\r\n" % length)
            parts.append(argument)
        parts.append(b"\r\n")
    return b"".join(parts)


async def exchange(
    connection: AbstractConnection, commands: Sequence[Sequence[bytes | str]]
) -> list[Any]:
    """Send commands and read their replies. Raises the first that is an error."""
    await send(connection, commands)
    return [await receive(connection) for _ in commands]


async def send(connection: AbstractConnection, commands: Iterable[Sequence[Argument]]) -> None:
    """Write commands. Raises NoConnection, beside what redis-py raises."""
    try:
        await connection.send_packed_command(packed(commands), check_health=False)
    except RuntimeError as error:  # uvloop's, when the other end has reset it a moment ago
        raise NoConnection(str(error)) from None


class Garbled(ConnectionError):
    """Bytes that make no sense: what else came on that connection may be wrong, too."""


async def receive(connection: AbstractConnection, seconds: float | None = None) -> Any:
    """The next reply. Raises Garbled, beside what redis-py raises."""
    try:
        return await connection.read_response(disable_decoding=True, timeout=seconds)
    except (ValueError, TypeError) as error:  # redis-py takes what it reads for a number
        raise Garbled(str(error)) from None


async def ask(
    connections: ConnectionPool, address: Address, commands: Sequence[Sequence[bytes | str]]
) -> list[Any]:
    """As ``exchange``, on a connection that is made for it."""
    connection = _made(connections)
    _aim(connection, address)
    try:
        await connection.connect()  # type: ignore[no-untyped-call]
        return await exchange(connection, commands)
    finally:
        hang_up(connection)
        await connection.disconnect(nowait=True)


def hang_up(connection: AbstractConnection) -> None:
    """End it now, whatever is under way on it: for its owner as if the other end had."""
    writer = connection._writer
    if writer is not None:
        writer.transport.abort()


def hung_up(connection: AbstractConnection) -> bool:
    """Whether it has ended, by the other end or by ``hang_up``."""
    reader = connection._reader
    return reader is None or reader.at_eof() or reader.exception() is not None

"""One process's share of the clients: who they are, how they connect, what they still wait for."""

from __future__ import annotations

import asyncio
import errno
import random
import socket
import ssl
import struct
import sys
from collections.abc import Coroutine
from functools import partial
from ipaddress import ip_address
from typing import NamedTuple

from websockets.uri import parse_uri

from .agenda import SECOND, Agenda
from .connection import Connection, Owner, Probe, Refusal
from .credentials import Credentials
from .member import Member
from .options import Options
from .tally import Tally
from .wire import Reader

HANDSHAKES = 400
"""Under way at once; more would only wait in the server's queue instead of here."""
HANDSHAKE_SECONDS = 10.0
SOURCES = 8
"""Loopback addresses to call from: each has some 28,000 ports."""
_RESET_AT_THE_END = struct.pack("ii", 1, 0)
_BIND_ADDRESS_NO_PORT = getattr(socket, "IP_BIND_ADDRESS_NO_PORT", 24)


class Address(NamedTuple):
    """Where the server is, looked up once."""

    family: int
    place: tuple[str, int]

    @property
    def loopback(self) -> bool:
        return self.family == socket.AF_INET and ip_address(self.place[0]).is_loopback


async def resolve(url: str) -> Address:
    """Raises OSError."""
    uri = parse_uri(url)
    loop = asyncio.get_running_loop()
    found = await loop.getaddrinfo(uri.host, uri.port, type=socket.SOCK_STREAM)
    family, _, _, _, place = found[0]
    return Address(family, (str(place[0]), int(place[1])))


class Crowd:
    """The clients whose number is ``process`` modulo the number of processes.

    First come those of --clients, then the publishers.
    """

    def __init__(
        self,
        options: Options,
        process: int,
        tally: Tally,
        agenda: Agenda,
        credentials: Credentials,
        address: Address,
    ) -> None:
        self.options = options
        self.tally = tally
        self.agenda = agenda
        self.credentials = credentials
        self.text = "x" * options.bytes
        self.over = False
        """Nobody comes back any more."""
        self.send_rate = 0.0
        """What the server allows a connection, as its welcomes say."""
        self.tops: dict[tuple[str, str], int] = {}
        """The highest offset acked, by room and epoch."""
        self._address = address
        self._uri = parse_uri(options.url)
        self._tls = ssl.create_default_context() if self._uri.secure else None
        self._reader = Reader()
        self._handshakes = asyncio.Semaphore(HANDSHAKES)
        self._tasks: set[asyncio.Task[None]] = set()
        self._unsettled = set(range(process, options.sockets, options.processes))
        self._all_settled = asyncio.Event()
        self.members: list[Member] = []
        self.publishers: list[Member] = []
        for index in sorted(self._unsettled):
            if index < options.clients:
                rooms = options.behaviour.rooms_of(options, index)
                self.members.append(Member(self, index, rooms))
            else:
                self.publishers.append(Member(self, index, []))

    @property
    def everyone(self) -> list[Member]:
        return self.members + self.publishers

    def chosen(self) -> list[Member]:
        """The members to whom the scenario does something: --share of all, at least one."""
        options = self.options
        count = max(1, round(options.share * options.clients))
        drawn = set(random.Random(options.run).sample(range(options.clients), count))
        return [member for member in self.members if member.index in drawn]

    def spawn(self, work: Coroutine[object, object, None]) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a client failed", "exception": error}
            )

    # Connecting.

    def ramp(self, began: int) -> None:
        """Everyone enters in turn, --ramp a second in all processes together."""
        for member in self.everyone:
            due = began + int(member.index / self.options.ramp * SECOND)
            self.agenda.at(due, partial(self._enter, member))

    def _enter(self, member: Member, due: int) -> None:
        self.spawn(member.enter(due))

    async def dial(self, owner: Owner, token: str) -> Refusal | None:
        """Connect and shake hands. Returns why not, or None, with the owner's ``opening`` open."""
        loop = asyncio.get_running_loop()
        connection: Connection | None = None
        async with self._handshakes:
            sock = self._socket(owner.index)
            try:
                async with asyncio.timeout(HANDSHAKE_SECONDS):
                    await loop.sock_connect(sock, self._address.place)
                    _, connection = await loop.create_connection(
                        lambda: Connection(owner, self._uri, token, self._reader),
                        sock=sock,
                        ssl=self._tls,
                        server_hostname=self._uri.host if self._tls else None,
                    )
                    return await connection.opened
            except TimeoutError:
                refusal = Refusal("timeout")
            except OSError as error:
                refusal = Refusal(_name(error))
            if connection is not None:
                connection.cut()
            owner.opening = None
            sock.close()
            return refusal

    async def lets_in(self, member: Member) -> bool:
        """Whether the server accepts another connection with the member's token."""
        probe = Probe(member.index)
        refusal = await self.dial(probe, member.token)
        if probe.opening is not None:
            probe.opening.cut()
        return refusal is None

    def _socket(self, index: int) -> socket.socket:
        sock = socket.socket(self._address.family, socket.SOCK_STREAM)
        sock.setblocking(False)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        # No ports that linger into the next run.
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET_AT_THE_END)
        if (source := self.source(index)) is not None:
            sock.setsockopt(socket.SOL_IP, _BIND_ADDRESS_NO_PORT, 1)
            sock.bind((source, 0))
        return sock

    def source(self, index: int) -> str | None:
        """The address that a client calls from, if it matters: others than Linux have only one."""
        if sys.platform == "linux" and self._address.loopback:
            return f"127.0.0.{2 + index % SOURCES}"
        return None

    def settled(self, member: Member) -> None:
        """It is in its rooms, or will never be."""
        self._unsettled.discard(member.index)
        if not self._unsettled:
            self._all_settled.set()

    async def wait_settled(self) -> None:
        await self._all_settled.wait()

    # What became of it.

    def acked(self, room: str, epoch: str, offset: int) -> None:
        place = room, epoch
        if offset > self.tops.get(place, 0):
            self.tops[place] = offset

    def busy(self) -> bool:
        """Whether anything is under way that will end by itself."""
        return bool(self._tasks) or any(member.busy for member in self.everyone)

    def unanswered(self) -> int:
        return sum(member.unanswered for member in self.everyone)

    def overdue(self, tops: dict[tuple[str, str], int]) -> int:
        """Events that were acked and have not come to members that are there."""
        return sum(
            max(0, tops.get((room.decode(), position.epoch), 0) - position.last)
            for member in self.members
            if member.connection is not None
            for room, position in member.positions.items()
        )

    def count_what_is_missing(self, tops: dict[tuple[str, str], int]) -> None:
        counts = self.tally.counts
        counts["overdue"] += self.overdue(tops)
        counts["unanswered"] += self.unanswered()
        counts["absent"] += sum(
            member.begun and member.connection is None and not member.revoked_at
            for member in self.everyone
        )

    def stop(self) -> None:
        """Nothing new happens; what is under way goes on."""
        self.agenda.clear()
        for publisher in self.publishers:
            publisher.on_ack = None
        for member in self.members:
            member.read_on()

    def leave(self) -> None:
        """Everyone goes, for good."""
        self.over = True
        for member in self.everyone:
            member.leave()
        for task in self._tasks:
            task.cancel()


def _name(error: OSError) -> str:
    """Such as ``ECONNREFUSED``, or ``SSLCertVerificationError``, whose number means nothing."""
    if isinstance(error, ssl.SSLError) or error.errno is None:
        return type(error).__name__
    return errno.errorcode.get(error.errno, type(error).__name__)

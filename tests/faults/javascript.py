"""Members that use the JavaScript client, all in one process of Node.js (members.mjs).

They write down what an application sees, as those of the Python client do. Orders go to the process
and records come back, one JSON object a line; tokens are issued here.
"""

from __future__ import annotations

import asyncio
import itertools
import json
import random
import shutil
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from tests.faults.checker import rights as rights_in
from tests.faults.clients import OUTBOX, World, now
from tests.faults.history import (
    Joined,
    Position,
    Received,
    Reset,
    Sent,
    Session,
    decode,
)
from tests.support.worker import end

PROGRAM = Path(__file__).with_name("members.mjs")
LINE_BYTES = 2**22
REST_SECONDS = (0.1, 0.5)
"""Before a client is made anew."""
ANSWER_SECONDS = 6.0


class Company:
    """The process, and who is in it; it starts with the first one and ends with the last."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._members: dict[str, Member] = {}
        self._orders: list[bytes] = []
        self._process: asyncio.subprocess.Process | None = None
        self._reader: asyncio.Task[None] | None = None

    async def enter(self, member: Member) -> None:
        self._members[member.name] = member
        if self._reader is None:
            self._reader = asyncio.create_task(self._run())
        self.order("enlist", member, **member.description())

    async def depart(self, member: Member) -> None:
        self._members.pop(member.name, None)
        if not self._members and self._reader is not None:
            await end([self._reader])
            self._reader = None

    def order(self, what: str, member: Member, **fields: Any) -> None:
        line = json.dumps({"do": what, "member": member.name, **fields}).encode() + b"\n"
        if self._process is None:
            self._orders.append(line)
        elif self._process.stdin is not None:
            self._process.stdin.write(line)

    async def _run(self) -> None:
        node = shutil.which("node")
        assert node is not None, "these clients need node"
        process = await asyncio.create_subprocess_exec(
            node,
            "--experimental-websocket",
            "--no-warnings",
            str(PROGRAM),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LINE_BYTES,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            self._process = process
            process.stdin.writelines(self._orders)
            self._orders.clear()
            async for line in process.stdout:
                self._receive(line)
            for member in self._members.values():
                member.told({"type": "strange", "text": "the process of all clients has ended"})
        finally:
            self._process = None
            process.stdin.close()
            if process.returncode is None:
                process.kill()
            await process.wait()

    def _receive(self, line: bytes) -> None:
        frame = json.loads(line)
        if frame["type"] in ("status", "token", "answer", "strange", "count"):
            # What nobody in particular has done is for anybody to answer for.
            member = self._members.get(frame["member"]) or next(iter(self._members.values()), None)
            if member is not None:
                member.told(frame)
            return
        record = decode(line)
        self._world.add(record)
        name = record.sender if isinstance(record, Sent) else getattr(record, "member", "")
        if name in self._members:
            self._members[name].seen(record)


_companies: WeakKeyDictionary[World, Company] = WeakKeyDictionary()


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
        self.port = 0
        self.connected = False
        self.joined = False
        self._world = world
        self._company = _companies.setdefault(world, Company(world))
        self._random = random.Random(world.random.random())
        self._rights = rights
        self._lazy = lazy
        self._lifetime = lifetime
        self._logins = itertools.count(1)
        self._sequence = itertools.count(1)
        self._questions = itertools.count(1)
        self._answers: dict[int, asyncio.Future[Any]] = {}
        self._over: asyncio.Queue[int] = asyncio.Queue()
        self._reached: dict[str, int] = {}
        self._under_way = 0
        self._leaving = False
        self._log_in()

    def description(self) -> dict[str, Any]:
        return {
            "rooms": self.rooms,
            "readable": [room for room in self.rooms if self.may(room, "r")],
            "url": self._world.url(self._random),
        }

    @property
    def settled(self) -> bool:
        return self._under_way == 0

    def may(self, room: str, right: str) -> bool:
        return right in rights_in(self._rights, room)

    def reached(self, room: str) -> int:
        return self._reached.get(room, 0)

    def _log_in(self) -> None:
        self.session = f"{self.name} login {next(self._logins)}"
        self._world.add(
            Session(at=now(), member=self.name, session=self.session, rooms=self._rights)
        )

    async def run(self) -> None:
        await self._company.enter(self)
        try:
            while not self._leaving:
                self._order("begin", session=self.session)
                code = await self._over.get()
                if code == 1000:
                    return
                self._world.count(f"end {code}")
                if self.session in self._world.revoked or self._world.undaunted:
                    self._log_in()
                elif code >= 4500 or code == 401:
                    return
                await asyncio.sleep(self._random.uniform(*REST_SECONDS))
        finally:
            await self._company.depart(self)

    # What the process tells.

    def seen(self, record: object) -> None:
        match record:
            case Sent():
                self._under_way -= 1
            case Joined(room=room, offset=offset, replay=replay):
                self._reached[room] = offset - replay
            case Received(room=room, offset=offset) | Reset(room=room, offset=offset):
                self._reached[room] = offset

    def told(self, frame: dict[str, Any]) -> None:
        match frame:
            case {"type": "status"}:
                self.connected, self.joined = frame["connected"], frame["joined"]
                self.port = frame["port"]
                if "over" in frame:
                    self._over.put_nowait(frame["over"])
            case {"type": "token", "question": question}:
                self._order("token", question=question, token=self._fresh_token())
            case {"type": "answer", "question": question, "value": value}:
                answer = self._answers.pop(question, None)
                if answer is not None and not answer.done():
                    answer.set_result(value)
            case {"type": "count", "what": what}:
                self._world.count(what)
            case {"type": "strange", "text": text}:
                self.strange.append(text)

    def _fresh_token(self) -> str | None:
        if self._lazy and self.connected and self._random.random() < 0.8:
            return None
        return self._world.issuer.token(
            self.name, session=self.session, rooms=self._rights, lifetime=self._lifetime
        )

    # What the fleet orders.

    def _order(self, what: str, **fields: Any) -> None:
        self._company.order(what, self, **fields)

    def publish(
        self, rooms: Sequence[str], *, echo: bool = True, stubborn: bool = True, padding: int = 0
    ) -> bool:
        """All are stubborn and have an echo: an application cannot take a message back, and is not
        told where those are that it does not see."""
        if self._under_way + len(rooms) > OUTBOX:
            return False
        for room in rooms:
            key = str(uuid.UUID(int=self._random.getrandbits(128), version=4))
            self._under_way += 1
            self._order("publish", room=room, key=key, n=next(self._sequence), padding=padding)
        return True

    def wander(self, room: str) -> None:
        self._order("wander", room=room)

    async def end_of(self, room: str) -> Position | None:
        question = next(self._questions)
        answer = self._answers[question] = asyncio.get_running_loop().create_future()
        self._order("end_of", room=room, question=question)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                value = await answer
        except TimeoutError:
            return None
        return None if value is None else Position(value["epoch"], value["offset"])

    async def pause(self, seconds: float) -> None:
        self._order("pause", seconds=seconds)
        await asyncio.sleep(seconds)

    def abandon(self) -> None:
        self._order("abandon")

    async def leave(self) -> None:
        self._leaving = True
        self._order("leave")

"""A chat in the terminal: events to stdout, lines of stdin to the room, news of the link to stderr.

Reconnects by itself, and recovers by position: nothing is shown twice, and what may be missing is
said. A line goes out under one key however often it has to be sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import math
import re
import signal
import sys
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import TextIO
from urllib.parse import urlsplit
from uuid import uuid4

from .backoff import wait_before
from .connection import Client, connect
from .errors import ChatError, CommandError, DisconnectedError, RefusedError
from .events import Gap, Left, Message, Position
from .room import Event, Room
from .stdin import Lines

LAST = 20
# A connection that held this long was a good one: the backoff starts anew after it.
STEADY_SECONDS = 10.0
# After the end of the input: how long to wait for one's own last message to come back.
SHOW_SECONDS = 2.0
# 1002 and 1007 say that this client is at fault. It may be the network's doing, but not often.
OWN_FAULTS = (1002, 1007)
OWN_FAULT_TRIES = 3

# What a terminal obeys instead of showing (C0, DEL, C1), what breaks or reorders lines, and what
# cannot be encoded.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

ADVICE = {
    "token_missing": "Give a token.",
    "token_invalid": "Get a new token.",
    "token_expired": "Get a new token.",
    "session_revoked": "Log in again.",
    "https_required": "Use a wss:// URL.",
    "not_found": "The URL should end in /v1/ws.",
    "too_many_connections": "Close another connection first, or try again later.",
    "superseded": "Close another connection of this user first.",
    "bad_frame": "This client and the server do not understand each other: update the client.",
    "unsupported_version": "Update this client.",
    "rate_limited": "Try again later.",
    "unavailable": "Try again later.",
    "draining": "Try again later.",
    "overloaded": "Try again later.",
    "forbidden": "Ask for a token that allows this room.",
    "invalid": "Check the room's name.",
}


async def chat(url: str, room: str, token: Callable[[], Awaitable[str]]) -> int:
    """Chat in ``room`` until the input ends or Ctrl-C, and return an exit code.

    0 for these two. 1, after a line on stderr that says what happened and what to do, when the
    server refuses the connection or the room, cannot be reached at the start, or ends the
    connection for good. ``token`` is asked for each connection and refresh; what it raises comes
    out of here. Needs the main thread, for Ctrl-C.
    """
    loop = asyncio.get_running_loop()
    session = _Session(url, room, token)
    task = asyncio.create_task(session.run())
    interrupted = asyncio.Event()

    def interrupt() -> None:
        interrupted.set()
        task.cancel()

    loop.add_signal_handler(signal.SIGINT, interrupt)
    try:
        return await task
    except asyncio.CancelledError:
        if interrupted.is_set():
            return 0
        raise
    finally:
        loop.remove_signal_handler(signal.SIGINT)


def escape(text: str) -> str:
    """Make a stranger's text safe to print on one line of a terminal."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def render(event: Event, own: str) -> str:
    """One line for an event. Messages of user ``own`` begin with ``> ``."""
    match event:
        case Message(user=user, body={"text": str(text), **more}) if not more:
            words = text
        case Message(user=user, body=body):
            words = json.dumps(body, ensure_ascii=False, separators=(",", ":"))
        case Gap():
            return "* Some messages may be missing here."
        case Left(room=room, reason=reason):
            return f"* You are no longer in {escape(room)}: {escape(reason)}."
    mark = "> " if user == own else ""
    return f"{mark}{escape(user)}: {escape(words)}"


@dataclass
class _Outgoing:
    """A line on its way, under the one key that makes sending it again harmless."""

    text: str
    key: str = field(default_factory=lambda: str(uuid4()))
    since: float = field(default_factory=time.monotonic)

    def age(self) -> float:
        """Seconds since it was taken from the input, to be sent at once."""
        return time.monotonic() - self.since


class _Session:
    """The chat across its connections: what was shown, and the line that is not yet acked."""

    def __init__(self, url: str, room: str, token: Callable[[], Awaitable[str]]) -> None:
        self._url = url
        self._name = room
        self._token = token
        self._tty = sys.stdin is not None and sys.stdin.isatty()
        self._lines = Lines(sys.stdin.fileno()) if sys.stdin is not None else None
        self._outgoing: _Outgoing | None = None
        self._position: Position | None = None
        self._connected = False
        self._opened_at = math.inf
        self._attempt = 0
        self._own_faults = 0

    async def run(self) -> int:
        while True:
            self._opened_at = math.inf
            try:
                async with connect(self._url, token=self._token) as client:
                    self._connected = True
                    self._opened_at = time.monotonic()
                    return await self._converse(client)
            except (ChatError, TimeoutError) as exc:
                self._count(exc)
                if self._is_end(exc):
                    _say(f"{self._explain(exc)} {_advice(exc)}".rstrip())
                    return 1
                await self._wait(exc)
            except ValueError as exc:
                if self._connected:
                    raise
                _say(f"Cannot connect: {escape(str(exc))}.")
                return 1

    async def _converse(self, client: Client) -> int:
        last = LAST if self._position is None else None
        room = await client.join(self._name, since=self._position, last=last)
        self._greet(client, room)
        show = asyncio.create_task(self._show(client, room))
        feed = asyncio.create_task(self._feed(client, room))
        try:
            await asyncio.wait({show, feed}, return_when=asyncio.FIRST_COMPLETED)
            if not feed.done():
                return show.result()
        finally:
            show.cancel()
            feed.cancel()
            await asyncio.gather(show, feed, return_exceptions=True)
        await self._show_up_to(feed.result(), client, room)
        return 0

    def _greet(self, client: Client, room: Room) -> None:
        if self._position is None:
            may = "" if "w" in room.rights else " (read only)"
            _say(f"In {escape(room.name)} as {escape(client.welcome.user)}{may}. Ctrl-D leaves.")
        else:
            _say("Connected again.")
        self._position = room.position

    async def _show(self, client: Client, room: Room) -> int:
        async for event in room:
            self._print(event, client, room)
        return 1

    async def _show_up_to(self, last: Position, client: Client, room: Room) -> None:
        """Show what led up to ``last``, so that one's own words are seen to have arrived."""
        with contextlib.suppress(TimeoutError, StopAsyncIteration, DisconnectedError):
            async with asyncio.timeout(SHOW_SECONDS):
                while room.position.epoch == last.epoch and room.position.offset < last.offset:
                    self._print(await anext(room), client, room)

    def _print(self, event: Event, client: Client, room: Room) -> None:
        stream = sys.stdout if isinstance(event, Message) else sys.stderr
        _write(stream, render(event, client.welcome.user))
        self._position = room.position

    async def _feed(self, client: Client, room: Room) -> Position:
        """Send the input's lines to its end; return the last position they, or the join, gave."""
        last = room.head
        while line := await self._next_line():
            last = await self._deliver(line, client, room) or last
            self._outgoing = None
        return last

    async def _next_line(self) -> _Outgoing | None:
        """The line left over from a lost connection, or the input's next; None at its end."""
        while self._outgoing is None:
            text = await self._lines.read() if self._lines else None
            if text is None:
                return None
            if text or not self._tty:
                self._outgoing = _Outgoing(text)
        return self._outgoing

    async def _deliver(self, line: _Outgoing, client: Client, room: Room) -> Position | None:
        """Send ``line`` until it is acked; None if it cannot be, which the user is told."""
        for attempt in itertools.count():
            if line.age() * 1000 > client.welcome.limits.key_window:
                # The server has forgotten the key: sending again might say it twice.
                _say(f"Not known whether this was sent: {escape(line.text)}")
                break
            told = None
            try:
                return await room.send({"text": line.text}, key=line.key)
            except CommandError as exc:
                if not exc.temporary:
                    _say(f"Not sent ({escape(str(exc))}): {escape(line.text)}")
                    break
                told = exc.retry_after
            except TimeoutError:
                pass
            await asyncio.sleep(wait_before(attempt, told))
        return None

    def _count(self, exc: ChatError | TimeoutError) -> None:
        """Keep the numbers of tries that the waits and the giving up depend on."""
        if time.monotonic() - self._opened_at >= STEADY_SECONDS:
            self._attempt = self._own_faults = 0
        if isinstance(exc, DisconnectedError) and exc.code in OWN_FAULTS:
            self._own_faults += 1

    def _is_end(self, exc: ChatError | TimeoutError) -> bool:
        match exc:
            case RefusedError():
                # Behind a proxy, a server that restarts looks like 502 or 504.
                return not self._connected or (exc.status != 429 and exc.status < 500)
            case CommandError():
                return not exc.temporary
            case DisconnectedError():
                return exc.final or not self._connected or self._own_faults >= OWN_FAULT_TRIES
        return not self._connected

    async def _wait(self, exc: ChatError | TimeoutError) -> None:
        told = (
            exc.after if isinstance(exc, DisconnectedError) else getattr(exc, "retry_after", None)
        )
        seconds = wait_before(self._attempt, told)
        self._attempt += 1
        _say(f"{self._explain(exc)} Trying again in {seconds:.1f} s.")
        await asyncio.sleep(seconds)

    def _explain(self, exc: ChatError | TimeoutError) -> str:
        match exc:
            case RefusedError():
                code = f"{exc.status} {exc.code or ''}".rstrip()
                return f"The server refused the connection ({escape(code)}): {escape(exc.message)}"
            case CommandError():
                return (
                    f"Cannot join {escape(self._name)} ({escape(exc.code)}): {escape(exc.message)}"
                )
            case DisconnectedError() if not self._connected:
                return f"No connection to {_place(self._url)}: {escape(exc.reason)}."
            case DisconnectedError():
                return f"Disconnected ({exc.code} {escape(exc.reason)})."
        return "No answer in time."


def _advice(exc: ChatError | TimeoutError) -> str:
    match exc:
        case RefusedError() | CommandError():
            return ADVICE.get(exc.code or "", "")
        case DisconnectedError(code=1006):
            return "Is the server running?"
        case DisconnectedError():
            return ADVICE.get(exc.reason, "")
    return ""


def _place(url: str) -> str:
    """The server a URL names, without what might be secret in it."""
    parts = urlsplit(url)
    return escape(f"{parts.scheme}://{parts.netloc.rpartition('@')[2]}")


def _say(text: str) -> None:
    _write(sys.stderr, f"* {text}")


def _write(stream: TextIO, line: str) -> None:
    encoding = stream.encoding or "utf-8"
    stream.write(line.encode(encoding, "backslashreplace").decode(encoding) + "\n")
    stream.flush()

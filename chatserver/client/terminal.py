"""A chat in the terminal: what is typed goes to the room, what is said there is shown.

On a terminal the line being typed stays below what comes in, and its prompt tells how things
stand. Otherwise (a pipe, a file) lines of stdin are sent, messages go to stdout and news to stderr.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from urllib.parse import urlsplit

from .client import Client, connect
from .editor import Editor, Key
from .errors import ChatError, CommandError, DisconnectedError, RefusedError, UnknownOutcomeError
from .events import Position
from .room import Room
from .screen import Screen, ScreenLostError, Terminal, escape
from .states import Open, State, Waiting
from .stdin import Input, Lines, pieces

LAST = 20
# After the end of the input: how long to wait for one's own last message to come back.
SHOW_SECONDS = 2.0
# Lines typed that wait to be sent; then keys wait.
TYPED = 64

ADVICE = {
    "token_missing": "Give a token.",
    "token_invalid": "Get a new token.",
    "token_expired": "Get a new token.",
    "token_revoked": "Log in again.",
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

Read = Callable[[], Awaitable[str | None]]
"""The next line; None at the end of the input."""


async def chat(url: str, room: str, token: Callable[[], Awaitable[str]]) -> int:
    """Chat in ``room`` until the input ends or Ctrl-C, and return an exit code.

    0 for these two. 1 when nobody is left to see it, and, after a line that says what happened and
    what to do, when the server refuses the connection or the room, cannot be reached at the start,
    or ends the connection for good. ``token`` is asked for each new token; what it raises at the
    start comes out of here. Needs the main thread, for Ctrl-C.
    """
    loop = asyncio.get_running_loop()
    task = asyncio.create_task(_chat(url, room, token))
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


async def _chat(url: str, room: str, token: Callable[[], Awaitable[str]]) -> int:
    try:
        async with _seat() as (screen, read):
            return await _Session(url, room, screen, read).run(token)
    except ScreenLostError:
        return 1


@contextlib.asynccontextmanager
async def _seat() -> AsyncIterator[tuple[Screen, Read]]:
    """Where the user sits: at a terminal, or behind pipes."""
    if sys.stdin is None:
        yield Screen(sys.stdout, sys.stderr, colour=_colour()), _nothing
    elif sys.stdin.isatty() and sys.stdout.isatty() and os.environ.get("TERM") != "dumb":
        async with _keyboard(sys.stdin.fileno()) as seat:
            yield seat
    else:
        lines = Lines(Input(sys.stdin.fileno()))
        read = _some(lines.read) if sys.stdin.isatty() else lines.read
        yield Screen(sys.stdout, sys.stderr, colour=_colour()), read


@contextlib.asynccontextmanager
async def _keyboard(fd: int) -> AsyncIterator[tuple[Screen, Read]]:
    loop, editor = asyncio.get_running_loop(), Editor()
    terminal = Terminal(sys.stdout, editor, colour=_colour())
    typed: asyncio.Queue[str | None] = asyncio.Queue(TYPED)
    with terminal.typing(fd):
        loop.add_signal_handler(signal.SIGCONT, terminal.resume, fd)
        loop.add_signal_handler(signal.SIGWINCH, terminal.draw)
        typing = asyncio.create_task(_type(Input(fd), editor, terminal, typed))
        try:
            yield terminal, _some(typed.get)
        finally:
            loop.remove_signal_handler(signal.SIGCONT)
            loop.remove_signal_handler(signal.SIGWINCH)
            typing.cancel()
            await asyncio.gather(typing, return_exceptions=True)


async def _type(
    keys: Input, editor: Editor, terminal: Terminal, typed: asyncio.Queue[str | None]
) -> None:
    with contextlib.suppress(ScreenLostError):
        while (text := await keys.read()) is not None:
            for found in editor.feed(text):
                match found:
                    case str():
                        for piece in pieces(found):
                            await typed.put(piece)
                    case Key.END:
                        await typed.put(None)
                    case Key.REDRAW:
                        terminal.wipe()
            terminal.draw()
    await typed.put(None)


async def _nothing() -> str | None:
    return None


def _some(read: Read) -> Read:
    """Whoever presses Enter twice does not mean an empty message."""

    async def read_some() -> str | None:
        while (line := await read()) == "":
            pass
        return line

    return read_some


def _colour() -> bool:
    """https://no-color.org"""
    return not os.environ.get("NO_COLOR") and sys.stdout.isatty()


class _Session:
    """The chat: what is shown, and the lines on their way."""

    def __init__(self, url: str, room: str, screen: Screen, read: Read) -> None:
        self._url = url
        self._name = room
        self._screen = screen
        self._read = read
        self._greeted = False
        self._sending = 0
        self._online = True
        self._shown = asyncio.Event()

    async def run(self, token: Callable[[], Awaitable[str]]) -> int:
        say = self._screen.say
        try:
            async with connect(
                self._url, token=token, patience=0, on_state=self._receive_state
            ) as client:
                return await self._converse(client)
        except CommandError as exc:
            why = f"({escape(exc.code)}): {escape(exc.message)}"
            say(f"Cannot join {escape(self._name)} {why} {_advice(exc)}".rstrip())
        except (ChatError, TimeoutError) as exc:
            say(f"{self._explain(exc)} {_advice(exc)}".rstrip())
        except ValueError as exc:
            if self._greeted:
                raise
            say(f"Cannot connect: {escape(str(exc))}.")
        return 1

    async def _converse(self, client: Client) -> int:
        room = await client.join(self._name, last=LAST)
        may = "" if "w" in room.rights else " (read only)"
        self._greeted = True
        self._screen.say(
            f"In {escape(room.name)} as {escape(client.welcome.user)}{may}. Ctrl-D leaves."
        )
        self._prompt()
        show = asyncio.create_task(self._show(client, room))
        feed = asyncio.create_task(self._feed(room))
        try:
            await asyncio.wait({show, feed}, return_when=asyncio.FIRST_COMPLETED)
            if not feed.done():
                return show.result()
            last = feed.result()
            await self._show_up_to(last, room)
        finally:
            show.cancel()
            feed.cancel()
            await asyncio.gather(show, feed, return_exceptions=True)
        return 0

    async def _show(self, client: Client, room: Room) -> int:
        async for event in room:
            self._screen.show(event, client.welcome.user)
            self._shown.set()
        return 1

    async def _show_up_to(self, last: Position, room: Room) -> None:
        """Let appear what led up to ``last``, so that one's own words are seen to have arrived."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(SHOW_SECONDS):
                while room.position.epoch == last.epoch and room.position.offset < last.offset:
                    self._shown.clear()
                    await self._shown.wait()

    async def _feed(self, room: Room) -> Position:
        """Send the input's lines to its end; return the last position they, or the join, gave."""
        last = room.head
        while (line := await self._read()) is not None:
            self._sending += 1
            self._prompt()
            try:
                last = await room.send({"text": line})
            except CommandError as exc:
                self._screen.say(f"Not sent ({escape(str(exc))}): {escape(line)}")
            except UnknownOutcomeError as exc:
                self._screen.say(f"Not known whether this was sent: {escape(line)}")
                if exc.why is not None:
                    raise exc.why from None
            finally:
                self._sending -= 1
                self._prompt()
        return last

    def _receive_state(self, state: State) -> None:
        # Whoever reads the input, or shows the next message, notices as well, and can end it.
        with contextlib.suppress(ScreenLostError):
            self._tell(state)

    def _tell(self, state: State) -> None:
        match state:
            case Open():
                if self._greeted:
                    self._screen.say("Connected again.")
                self._online = True
            case Waiting():
                seconds = max(0.0, state.until - time.time())
                self._screen.say(f"{self._explain(state.why)} Trying again in {seconds:.1f} s.")
                self._online = False
        self._prompt()

    def _prompt(self) -> None:
        if isinstance(self._screen, Terminal) and self._greeted:
            how = "offline" if not self._online else "sending" if self._sending else ""
            self._screen.prompt = f"{escape(self._name)}{f' ({how})' if how else ''}> "
            self._screen.draw()

    def _explain(self, exc: Exception) -> str:
        match exc:
            case RefusedError():
                code = f"{exc.status} {exc.code or ''}".rstrip()
                return f"The server refused the connection ({escape(code)}): {escape(exc.message)}"
            case DisconnectedError(code=1006) if not self._greeted:
                return f"No connection to {_place(self._url)}: {escape(exc.reason)}."
            case DisconnectedError(code=1006):
                return f"No connection: {escape(exc.reason)}."
            case DisconnectedError():
                return f"Disconnected ({exc.code} {escape(exc.reason)})."
            case TimeoutError():
                return "No answer in time."
        return f"No new token ({type(exc).__name__})."


def _advice(exc: Exception) -> str:
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

"""What a chat shows: messages, news, and on a terminal the line that is being typed below them."""

from __future__ import annotations

import json
import os
import re
import shutil
import termios
import time
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TextIO

from .editor import Editor
from .events import Event, Gap, Left, Message

# What a terminal obeys instead of showing (C0, DEL, C1), what breaks or reorders lines, and what
# cannot be encoded.
UNSAFE = re.compile("[\x00-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")

# Readable on dark and on light; no red, which means trouble.
NAMES = (32, 33, 34, 35, 36, 92, 94, 95, 96)
DIM, BOLD, PLAIN = "\x1b[2m", "\x1b[1m", "\x1b[0m"
# To the beginning of the line, and nothing in it.
CLEAR = "\r\x1b[K"


class ScreenLostError(Exception):
    """Nobody can see it any more: the terminal, or the reader of a pipe, has gone."""


def escape(text: str) -> str:
    """Make a stranger's text safe to print on one line of a terminal."""
    return UNSAFE.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def words(message: Message) -> str:
    """A message's body on one line."""
    match message.body:
        case {"text": str(text), **more} if not more:
            return escape(text)
        case body:
            return escape(json.dumps(body, ensure_ascii=False, separators=(",", ":")))


class Screen:
    """Messages go to ``out``, news to ``news``. Nothing that comes in is printed as it is.

    In ``colour``, each name has its own, the same everywhere, and messages have their time.
    """

    def __init__(self, out: TextIO, news: TextIO, *, colour: bool = False) -> None:
        self._out = out
        self._news = news
        self._colour = colour

    def show(self, event: Event, own: str) -> None:
        """One line for an event. Messages of user ``own`` are marked."""
        match event:
            case Message():
                self._write(self._out, self._line(event, own))
            case Gap():
                self.say("Some messages may be missing here.")
            case Left(room=room, reason=reason):
                self.say(f"You are no longer in {escape(room)}: {escape(reason)}.")

    def say(self, text: str) -> None:
        """News, which must be safe to print."""
        self._write(self._news, f"{DIM}* {text}{PLAIN}" if self._colour else f"* {text}")

    def _line(self, message: Message, own: str) -> str:
        mark = "> " if message.user == own else ""
        name = escape(message.user)
        if not self._colour:
            return f"{mark}{name}: {words(message)}"
        at = time.strftime("%H:%M", time.localtime(message.ts / 1000))
        style = BOLD if message.user == own else f"\x1b[{colour_of(message.user)}m"
        return f"{DIM}{at}{PLAIN} {style}{mark}{name}{PLAIN} {words(message)}"

    def _write(self, stream: TextIO, line: str) -> None:
        self._print(stream, line + "\n")

    def _print(self, stream: TextIO, text: str) -> None:
        encoding = stream.encoding or "utf-8"
        try:
            stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
            stream.flush()
        except OSError as exc:
            _let_go(stream)
            raise ScreenLostError(str(exc)) from exc


def _let_go(stream: TextIO) -> None:
    """What it still holds goes nowhere: Python would try again at its end, and complain."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class Terminal(Screen):
    """A screen whose last line is being typed: what comes in is printed above it."""

    def __init__(self, out: TextIO, editor: Editor, *, colour: bool) -> None:
        super().__init__(out, out, colour=colour)
        self._editor = editor
        self.prompt = ""

    @contextmanager
    def typing(self, fd: int) -> Iterator[None]:
        """Keys come one by one, and are shown by us; signals are still the terminal's work."""
        before = termios.tcgetattr(fd)
        self._take_keys(fd)
        self.draw()
        try:
            yield
        finally:
            with suppress(termios.error, ScreenLostError):
                termios.tcsetattr(fd, termios.TCSADRAIN, before)
                self._print(self._out, CLEAR)

    def resume(self, fd: int) -> None:
        """Take the terminal back after the process was stopped (Ctrl-Z)."""
        self._take_keys(fd)
        self.draw()

    @staticmethod
    def _take_keys(fd: int) -> None:
        mode = termios.tcgetattr(fd)
        mode[3] &= ~(termios.ICANON | termios.ECHO)
        termios.tcsetattr(fd, termios.TCSADRAIN, mode)

    def draw(self) -> None:
        """Show the line as it is now."""
        columns = shutil.get_terminal_size().columns - len(self.prompt)
        text, behind = self._editor.view(max(8, columns))
        back = f"\x1b[{behind}D" if behind else ""
        dim, plain = (DIM, PLAIN) if self._colour else ("", "")
        self._print(self._out, f"{CLEAR}{dim}{self.prompt}{plain}{escape(text)}{back}")

    def wipe(self) -> None:
        """Begin anew at the top (Ctrl-L)."""
        self._print(self._out, "\x1b[2J\x1b[H")
        self.draw()

    def _write(self, stream: TextIO, line: str) -> None:
        super()._write(stream, CLEAR + line)
        self.draw()


def colour_of(name: str) -> int:
    """The same for a name wherever it is shown."""
    return NAMES[zlib.crc32(name.encode(errors="replace")) % len(NAMES)]

"""A line being typed: keys in, lines out, and what of it to show. Pure."""

from __future__ import annotations

import re
import unicodedata
from enum import Enum, auto

# What a key sends after ESC: CSI or SS3 and its parameters, or another single key (Alt).
ESCAPE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O[ -~]|[^\[O])")
UNFINISHED = re.compile(r"\x1b(?:\[[0-?]*[ -/]*|O)?$")


class Key(Enum):
    """What is not text."""

    END = auto()
    """Ctrl-D on an empty line."""
    REDRAW = auto()


class Editor:
    """Holds the line and the place in it. Control characters never get into a line."""

    def __init__(self) -> None:
        self.text = ""
        self._at = 0
        self._rest = ""

    def feed(self, keys: str) -> list[str | Key]:
        """Take what was typed; returns the lines that it completes, and keys that ask for more."""
        found: list[str | Key] = []
        keys, self._rest = self._rest + keys, ""
        while keys:
            if escape := ESCAPE.match(keys):
                self._move(escape[0])
                keys = keys[escape.end() :]
            elif UNFINISHED.match(keys):
                self._rest = keys
                break
            else:
                found += self._press(keys[0])
                keys = keys[1:]
        return found

    def _press(self, key: str) -> list[str | Key]:
        match key:
            case "\r" | "\n":
                line, self.text, self._at = self.text, "", 0
                return [line]
            case "\x04":
                if not self.text:
                    return [Key.END]
                self._replace(self._at, self._at + 1)
            case "\x0c":
                return [Key.REDRAW]
            case "\x7f" | "\x08":
                self._replace(max(0, self._at - 1), self._at)
            case "\x15":
                self._replace(0, self._at)
            case "\x17":
                word = re.search(r"\S*\s*$", self.text[: self._at])
                self._replace(word.start() if word else 0, self._at)
            case "\x0b":
                self._replace(self._at, len(self.text))
            case "\x01":
                self._at = 0
            case "\x05":
                self._at = len(self.text)
            case "\t":
                self._replace(self._at, self._at, " ")
            case _ if unicodedata.category(key) not in ("Cc", "Cs"):
                self._replace(self._at, self._at, key)
        return []

    def _move(self, escape: str) -> None:
        match escape[1:]:
            case "[D" | "OD":
                self._at = max(0, self._at - 1)
            case "[C" | "OC":
                self._at = min(len(self.text), self._at + 1)
            case "[H" | "OH" | "[1~":
                self._at = 0
            case "[F" | "OF" | "[4~":
                self._at = len(self.text)
            case "[3~":
                self._replace(self._at, self._at + 1)

    def _replace(self, start: int, end: int, text: str = "") -> None:
        self.text = self.text[:start] + text + self.text[end:]
        self._at = start + len(text)

    def view(self, columns: int) -> tuple[str, int]:
        """As much of the line as fits into so many columns, and how far its end is, in columns,
        behind the cursor."""
        start = self._at
        left = columns - 1
        while start > 0 and (wide := width(self.text[start - 1])) <= left:
            left -= wide
            start -= 1
        end = self._at
        while end < len(self.text) and (wide := width(self.text[end])) <= left:
            left -= wide
            end += 1
        return self.text[start:end], sum(map(width, self.text[self._at : end]))


def width(char: str) -> int:
    """How many columns a terminal takes for it."""
    if unicodedata.combining(char) or unicodedata.category(char) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(char) in "WF" else 1

"""How a benchmark's figures are shown: as a table, for a terminal or for Markdown."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH = 90


@dataclass(frozen=True)
class Table:
    """What was measured, in a sentence; the figures; what else there is to say of them.

    The first column is text, all others are figures.
    """

    title: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]
    remark: str = ""

    def text(self) -> str:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        lines = textwrap.wrap(self.title, WIDTH)
        for row in (self.head, ["-" * width for width in widths], *self.rows):
            first, *figures = zip(row, widths, strict=True)
            lines.append("  ".join([first[0].ljust(first[1]), *(t.rjust(w) for t, w in figures)]))
        lines += textwrap.wrap(self.remark, WIDTH)
        return textwrap.indent("\n".join(lines), "  ")

    def markdown(self) -> str:
        rule = ["---", *("---:" for _ in self.head[1:])]
        lines = [f"| {' | '.join(row)} |" for row in (self.head, rule, *self.rows)]
        return "\n\n".join(
            part
            for part in (_sentence(self.title), "\n".join(lines), _sentence(self.remark))
            if part
        )


def _sentence(text: str) -> str:
    return text and text[0].upper() + text[1:].removesuffix(".") + "."


def share(shares: Mapping[str, float], name: str) -> str:
    """A process's share of its core."""
    return f"{shares[name]:.0%}" if name in shares else "-"


def all_shares(shares: Mapping[str, float]) -> str:
    return ", ".join(share(shares, name) for name in ("server", "client", "store"))

"""How a benchmark's figures are shown: as a table, for a terminal or in a page."""

from __future__ import annotations

import re
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

    def text(self, notes: Sequence[str]) -> str:
        widths = [max(map(len, column)) for column in zip(self.head, *self.rows, strict=True)]
        lines = textwrap.wrap(self.title, WIDTH)
        for row in (self.head, ["-" * width for width in widths], *self.rows):
            first, *figures = zip(row, widths, strict=True)
            lines.append("  ".join([first[0].ljust(first[1]), *(t.rjust(w) for t, w in figures)]))
        lines += textwrap.wrap(self.remark, WIDTH)
        lines += [f"note: {note}" for note in notes]
        return textwrap.indent("\n".join(lines), "  ")

    def markdown(self, notes: Sequence[str]) -> str:
        rule = ["---", *("---:" for _ in self.head[1:])]
        rows = "\n".join(f"| {' | '.join(row)} |" for row in (self.head, rule, *self.rows))
        remarks = "\n".join(f"- {_sentence(each)}" for each in (self.remark, *notes) if each)
        return "\n\n".join(part for part in (_sentence(self.title), rows, remarks) if part)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:].removesuffix(".") + "."


def fill(page: str, blocks: Mapping[str, str]) -> str:
    """Replace what stands between ``<!-- name -->`` and ``<!-- /name -->``, for each name."""
    for name, block in blocks.items():
        page = re.sub(
            rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)",
            lambda found, block=block: f"{found[1]}\n{block}\n\n{found[2]}",
            page,
            flags=re.DOTALL,
        )
    return page


def share(shares: Mapping[str, float], name: str) -> str:
    """A process's share of its core."""
    return f"{shares[name]:.0%}" if name in shares else "-"


def all_shares(shares: Mapping[str, float]) -> str:
    return ", ".join(share(shares, name) for name in ("server", "client", "store"))

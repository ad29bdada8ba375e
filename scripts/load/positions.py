"""One member's place in one room, and what its events say about the server.

The rule is that of docs/protocol.md: offsets are consecutive. A hole is a loss at once, for a
connected client sees one only if the server could not mend it; nothing here asks for a repair
that would hide it.
"""

from __future__ import annotations

from collections import Counter

REMEMBERED = 10_000
"""Of so many lost offsets it is noticed if they come after all."""


class Position:
    """Where a member is in a room. Counts ``lost``, ``doubled`` and ``reordered`` events."""

    __slots__ = ("_missing", "epoch", "last")

    def __init__(self, epoch: str, last: int) -> None:
        self.epoch = epoch
        self.last = last
        self._missing: set[int] | None = None

    def __repr__(self) -> str:
        return f"<Position {self.epoch} {self.last}>"

    def take(self, first: int, last: int, counts: Counter[str]) -> None:
        """Events with these offsets, one after the other, have come."""
        if first == self.last + 1:
            self.last = last
            return
        for offset in range(first, last + 1):
            self._take_one(offset, counts)

    def _take_one(self, offset: int, counts: Counter[str]) -> None:
        if offset > self.last:
            hole = offset - self.last - 1
            counts["lost"] += hole
            if 0 < hole <= REMEMBERED:
                self._missing = (self._missing or set()) | set(range(self.last + 1, offset))
            self.last = offset
        elif self._missing and offset in self._missing:
            self._missing.discard(offset)
            counts["lost"] -= 1
            counts["reordered"] += 1
        else:
            counts["doubled"] += 1

    def rejoin(
        self, epoch: str, start: int, recovered: bool, gap: int, counts: Counter[str]
    ) -> None:
        """The ack of a ``join`` with ``since``: ``start`` is its offset less its replay.

        Where the server proves that nothing is missing, it must go on exactly here.
        """
        if recovered:
            counts["recovered"] += 1
            counts["lost"] += max(0, start - self.last)
            counts["doubled"] += max(0, self.last - start)
        else:
            counts["unrecovered"] += 1
            counts["told_gap"] += gap
        self.reset(epoch, start)

    def reset(self, epoch: str, last: int) -> None:
        self.epoch, self.last = epoch, last
        self._missing = None

"""Whether a link is alive, judged by its silence. Pure: times in seconds of one clock.

The server pings every ``ping_interval``, so a link that is alive is never silent for much longer.
One that is gets a ping of our own, and if that brings nothing either, it is dead. When an answer
is owed, a shorter silence is suspicious.
"""

from __future__ import annotations

from enum import Enum, auto

# Of the server's interval: it is late, not absent.
SILENCE_SHARE = 1.2


class Verdict(Enum):
    ALIVE = auto()
    PROBE = auto()
    """Ask for a sign of life."""
    DEAD = auto()


class Pulse:
    """One link's. ``interval`` is the server's; ``patience`` is how long an answer may take."""

    __slots__ = ("_limit", "_patience", "_probed_at")

    def __init__(self, interval: float, patience: float) -> None:
        self._limit = interval * SILENCE_SHARE
        self._patience = patience
        self._probed_at: float | None = None

    def judge(self, heard_at: float, owed_since: float | None, now: float) -> Verdict:
        """``heard_at`` is when the last byte came; ``owed_since``, when what is to be answered next
        was sent."""
        if self._probed_at is not None and heard_at < self._probed_at:
            return Verdict.DEAD if now >= self._probed_at + self._patience else Verdict.ALIVE
        self._probed_at = None
        if now < self._suspicious_at(heard_at, owed_since):
            return Verdict.ALIVE
        self._probed_at = now
        return Verdict.PROBE

    def wake_at(self, heard_at: float, owed_since: float | None) -> float:
        """When to judge again."""
        if self._probed_at is not None and heard_at < self._probed_at:
            return self._probed_at + self._patience
        return self._suspicious_at(heard_at, owed_since)

    def _suspicious_at(self, heard_at: float, owed_since: float | None) -> float:
        silent_at = heard_at + self._limit
        if owed_since is None:
            return silent_at
        return min(silent_at, max(heard_at, owed_since) + self._patience)

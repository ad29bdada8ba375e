"""How long to wait before trying again, so that a crowd does not come back all at once.

Pure: times are arguments, in seconds of one clock.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from .errors import ChatError, DisconnectedError, RefusedError

FIRST, LONGEST = 1.0, 30.0
# A connection that held this long was a good one: the tries are counted anew after it.
STEADY_SECONDS = 10.0
# Framing and UTF-8: whoever is told of these is at fault itself, and will be again.
OWN_FAULTS = (1002, 1007)
OWN_FAULT_TRIES = 3
# Within a connection a refusal passes sooner than an outage: this is the longest wait there.
LONGEST_AGAIN = 5.0

Draw = Callable[[float, float], float]


def full_jitter(
    attempt: int, first: float = FIRST, longest: float = LONGEST, draw: Draw = random.uniform
) -> float:
    """Seconds before try ``attempt`` (from 0): anywhere up to a limit that doubles each time."""
    return draw(0, min(longest, first * 2.0 ** min(attempt, 20)))


def wait_again(attempt: int, told: int | None) -> float:
    """Seconds before a command that was refused for now is repeated: as told, in milliseconds."""
    return full_jitter(attempt, longest=LONGEST_AGAIN) if told is None else told / 1000


class Backoff:
    """Decides, each time a connection ended or did not come about, whether and when to try again.

    ``first`` and ``longest`` are the limits of the jitter, before the first try and after many.
    """

    __slots__ = ("_draw", "_faults", "_first", "_longest", "_tries")

    def __init__(
        self, first: float = FIRST, longest: float = LONGEST, draw: Draw = random.uniform
    ) -> None:
        self._first = first
        self._longest = longest
        self._draw = draw
        self._tries = 0
        self._faults = 0

    def wait_after(self, why: Exception, lived: float = 0.0) -> float | None:
        """Seconds to wait after a connection that was open for ``lived``; None: do not come back.

        What the server told to wait goes before anything else. A crowd that is refused in one
        second is told the same one: it is spread over more than that.
        """
        if lived >= STEADY_SECONDS:
            self._tries = self._faults = 0
        if isinstance(why, DisconnectedError) and why.code in OWN_FAULTS:
            self._faults += 1
        if self._faults >= OWN_FAULT_TRIES or (isinstance(why, ChatError) and why.final):
            return None
        self._tries += 1
        wait = full_jitter(self._tries - 1, self._first, self._longest, self._draw)
        match why:
            case DisconnectedError(after=int(told)):
                return told / 1000
            case RefusedError(retry_after=int(told)):
                return told / 1000 + wait
        return wait

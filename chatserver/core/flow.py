"""Flow: how much a connection may ask for, and when patience ends."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from enum import Enum, auto


@dataclass(frozen=True, slots=True)
class Limits:
    """What one connection may do. Rates per second, times in seconds, sizes in bytes."""

    frame_bytes: int = 65536
    rooms: int = 256
    send_rate: float = 10.0
    send_burst: int = 20
    command_rate: float = 50.0
    command_burst: int = 320
    key_window: float = 600.0
    history: int = 1000
    replay: int = 1000
    ping_interval: float = 25.0


class Budget:
    """A token bucket: ``burst`` at once, ``rate`` per second after that."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = now

    def spend(self, now: float) -> float:
        """Take one. Returns 0.0, or the seconds until one is there (then nothing was taken)."""
        # A clock that steps back must not take budget away.
        elapsed = max(0.0, now - self._at)
        self._at = now
        self._left = min(self._burst, self._left + elapsed * self._rate)
        if self._left >= 1.0:
            self._left -= 1.0
            return 0.0
        return (1.0 - self._left) / self._rate


class Budgets:
    """A budget for each name; of too many, the one used longest ago is forgotten."""

    def __init__(self, rate: float, burst: float, most: int = 10_000) -> None:
        self._rate = rate
        self._burst = burst
        self._most = most
        self._budgets: OrderedDict[str, Budget] = OrderedDict()

    def spend(self, name: str, now: float) -> float:
        """As of the name's budget."""
        budget = self._budgets.get(name)
        if budget is None:
            budget = self._budgets[name] = Budget(self._rate, self._burst, now)
            if len(self._budgets) > self._most:
                self._budgets.popitem(last=False)
        else:
            self._budgets.move_to_end(name)
        return budget.spend(now)


LONGEST_WAIT = 60.0
"""Who is refused is not sent away for longer, whoever else was."""


class Admission:
    """Turns for newcomers: ``rate`` per second, in the order in which they come.

    A storm becomes a queue. Who would wait longer than ``patience`` is refused, and told when its
    turn would have been behind everyone before it, those refused among them: so they come back
    over the time that it takes to serve them. Nobody has a turn before it has come, so whoever
    leaves the queue lets those behind move up. ``waiting`` is how many are in it; times in seconds.
    """

    __slots__ = ("_burst", "_later", "_next", "_patience", "_step")

    def __init__(self, rate: float, *, burst: float, patience: float) -> None:
        """After a quiet time, the turns of ``burst`` seconds are there at once."""
        self._step = 1.0 / rate
        self._burst = burst
        self._patience = patience
        self._next = float("-inf")
        self._later = float("-inf")

    def admits(self, waiting: int, now: float) -> bool:
        """Whether one more may wait behind these."""
        if not waiting:
            self._next = max(self._next, now - self._burst)
        return self._next + waiting * self._step - now <= self._patience

    def turn(self, now: float) -> bool:
        """Take a turn for the first who waits, if it has come."""
        if self._next > now:
            return False
        self._next += self._step
        return True

    def come_back(self, waiting: int, now: float) -> float:
        """In how many seconds one that was just refused should come again."""
        end = self._next + waiting * self._step
        wait = min(max(self._later, end) - now, LONGEST_WAIT)
        self._later = now + wait + self._step
        return wait


class Verdict(Enum):
    BEAR = auto()
    DISCONNECT = auto()


# A client that sends a thousand commands in one segment is clumsy and gets a thousand answers;
# one that is refused all the time for five seconds, or twice as often, is a flood.
FLOOD_SECONDS = 5.0
FLOOD_REFUSALS = 100
FLOOD_HARD = 2000
FLOOD_PAUSE = 1.0


class Patience:
    """Judges a client that goes on although it is refused."""

    __slots__ = ("_began", "_last", "_refused")

    def __init__(self) -> None:
        self._began = 0.0
        self._last = float("-inf")
        self._refused = 0

    def refused(self, now: float) -> Verdict:
        """One more command was refused for its rate."""
        if not 0.0 <= now - self._last <= FLOOD_PAUSE:
            self._began = now
            self._refused = 0
        self._last = now
        self._refused += 1
        lasting = now - self._began >= FLOOD_SECONDS and self._refused >= FLOOD_REFUSALS
        return Verdict.DISCONNECT if lasting or self._refused >= FLOOD_HARD else Verdict.BEAR


def judge_reader(
    *, missing: int = 0, behind_for: float = 0.0, slow_seconds: float = 0.0
) -> Verdict:
    """A reader that is behind is borne until the log has dropped something that it needs next
    (``missing`` events), or it has been behind for too long. Until then it costs its position."""
    lost = missing > 0 or behind_for > slow_seconds
    return Verdict.DISCONNECT if lost else Verdict.BEAR

"""As much as the server lets a client ask for, so that it need not refuse. Pure."""

from __future__ import annotations


class Pace:
    """``burst`` at once, ``rate`` per second after that. Times in seconds of one clock."""

    __slots__ = ("_at", "_burst", "_left", "_rate")

    def __init__(self, rate: float, burst: float, now: float) -> None:
        self._rate = rate
        self._burst = burst
        self._left = burst
        self._at = now

    def wait(self, now: float) -> float:
        """Seconds until one may go; 0.0 for now."""
        self._left = min(self._burst, self._left + max(0.0, now - self._at) * self._rate)
        self._at = now
        return 0.0 if self._left >= 1.0 else (1.0 - self._left) / self._rate

    def take(self) -> None:
        """One goes."""
        self._left -= 1.0

"""How long to wait before trying again, so that a crowd does not come back all at once."""

from __future__ import annotations

import random

CEILING = 30.0


def full_jitter(attempt: int) -> float:
    """Seconds before try ``attempt`` (from 0): anywhere up to a limit that doubles each time."""
    return random.uniform(0, min(CEILING, 2.0 ** min(attempt, 10)))


def wait_before(attempt: int, told: int | None) -> float:
    """Seconds to wait: what the server told, in milliseconds, or else `full_jitter`."""
    return full_jitter(attempt) if told is None else told / 1000

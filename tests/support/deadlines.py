"""The store's deadlines, as most tests want them: a busy machine may hold it up for a second.

What is about the deadlines themselves asks for the real ones, with the fixture ``prompt``.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

from chatserver.net import fanout
from chatserver.store import link, topology

if TYPE_CHECKING:
    import pytest

LONG_SECONDS = 3.0
_LONG = {
    (topology, "CONNECT_SECONDS"): LONG_SECONDS,
    (topology, "SENTINEL_SECONDS"): LONG_SECONDS,
    (link, "ROUND_TRIP_SECONDS"): LONG_SECONDS,
    (link, "REPLICA_MILLISECONDS"): 2500,
    (fanout, "CONFIRM_SECONDS"): LONG_SECONDS,
}
_REAL = {(module, name): getattr(module, name) for module, name in _LONG}
_PROMPT = "TEST_PROMPT"


def lengthen() -> None:
    """In this process, unless a parent wants the real ones."""
    if _PROMPT not in os.environ:
        for (module, name), seconds in _LONG.items():
            setattr(module, name, seconds)


def restore(monkeypatch: pytest.MonkeyPatch) -> None:
    """The real ones in this process, and in workers that it starts from now on."""
    monkeypatch.setenv(_PROMPT, "1")
    for (module, name), seconds in _REAL.items():
        monkeypatch.setattr(module, name, seconds)

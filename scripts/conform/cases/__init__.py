"""The cases by name: scripts that a client has to live through. Their docstrings are the rules."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from conform.stage import Stage

Case = Callable[[Stage], Awaitable[None]]

CASES: dict[str, Case] = {}


def case(play: Case) -> Case:
    """Register a script under its function's name."""
    CASES[play.__name__] = play
    return play


def rule(name: str) -> str:
    """What the case is about, in a line."""
    return (CASES[name].__doc__ or "").partition("\n")[0]


from conform.cases import connecting, rooms, sending, tokens  # noqa: E402, F401

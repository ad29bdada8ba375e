"""What a run asks of its clients, whatever they are written in.

A member has one name and, in turn, several logins, connections and positions. It writes down what
it sees into ``world.history``, in the order in which it sees it: a ``session`` for each login, and
whatever else history.py has that its kind can tell. It never raises for what a fault does to it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from tests.faults.history import Position


class Member(Protocol):
    """One client of a fleet. Made as ``Kind(world, name, rooms, rights, lazy=, lifetime=)``, with
    its first login written down; ``run`` then keeps it there.

    ``lazy`` members let tokens expire now and then; ``lifetime`` is a token's, in seconds.
    """

    name: str
    session: str
    """The present login's."""
    strange: list[str]
    """What it saw that makes no sense; each is a violation."""

    @property
    def port(self) -> int:
        """Its own end of the link, by which a proxy knows it; 0 without one."""

    @property
    def rooms(self) -> Sequence[str]: ...
    @property
    def connected(self) -> bool: ...
    @property
    def joined(self) -> bool:
        """It is connected, and in every room that it may be in."""

    @property
    def settled(self) -> bool:
        """Of all that it was to publish, the outcome is written down (``sent``)."""

    def may(self, room: str, right: str) -> bool: ...
    def reached(self, room: str) -> int:
        """The last offset it has; 0 before the first."""

    async def run(self) -> None:
        """Returns when it has left, or was told that it must not come back."""

    def publish(
        self, rooms: Sequence[str], *, echo: bool = True, stubborn: bool = True, padding: int = 0
    ) -> bool:
        """Queue a message to each of these rooms, and return at once; False when too many wait.

        The key is to be unique, the body ``{"from": name, "n": …, "padding": "x" * padding}``.
        Without ``stubborn`` it may be given up at the first doubt.
        """

    def wander(self, room: str) -> None:
        """Leave a room soon, and come back to where it was."""

    async def end_of(self, room: str) -> Position | None:
        """Where the log ends, as a ``history`` tells; None when there is no answer."""

    async def pause(self, seconds: float) -> None:
        """Take in nothing for a while, as a program does that is busy."""

    def abandon(self) -> None:
        """Wait for no outcome any longer: what is not settled is unknown."""

    async def leave(self) -> None:
        """Go for good; ``run`` returns."""

"""What a client is doing about its connection."""

from __future__ import annotations

from msgspec import Struct


class Connecting(Struct, frozen=True):
    """Getting a token, connecting, waiting for the welcome."""


class Open(Struct, frozen=True):
    """Connected. ``connection`` is the server's name for it."""

    connection: str


class Waiting(Struct, frozen=True):
    """There is no connection, and the next try is at ``until``, in seconds since the Unix epoch."""

    until: float
    why: Exception


class Closed(Struct, frozen=True):
    """It is over. ``why`` is None when it was closed from here."""

    why: Exception | None = None


State = Connecting | Open | Waiting | Closed

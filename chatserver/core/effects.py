"""What a connection's protocol asks for, and what comes back: the words between core and shell.

``ChatProtocol`` answers everything with *effects*, which the shell carries out in order. Those
with a ``ref`` have an *outcome*, which the shell hands in with that number, in any order.
"""

from __future__ import annotations

from typing import NamedTuple

from chatserver.core.claims import Identity
from chatserver.core.errors import Disconnect, ReplyCode
from chatserver.core.frames import Command, Since
from chatserver.core.room import Reading

# --- effects -------------------------------------------------------------------------------


class Transmit(NamedTuple):
    """Send this frame."""

    payload: bytes


class Publish(NamedTuple):
    """Append to the room's log; the outcome is Published or Failed."""

    ref: int
    room: str
    head: bytes
    tail: bytes
    user: str
    key: str | None
    echo: bool


class Join(NamedTuple):
    """Register for the room, then read its log; the outcome is a Reading or Failed."""

    ref: int
    room: str
    since: Since | None
    last: int


class Admit(NamedTuple):
    """Replay the room's events after ``start``, then deliver live ones."""

    room: str
    start: int
    opening: Reading
    """What the join has read already."""


class Abandon(NamedTuple):
    """The join came to nothing. A membership from before stays as it was."""

    room: str


class Leave(NamedTuple):
    """Deliver nothing more of the room."""

    room: str


class Read(NamedTuple):
    """Read a page of a log; the outcome is a Page or Failed."""

    ref: int
    room: str
    before: int | None
    after: int | None
    limit: int


class Verify(NamedTuple):
    """Check a new access token; the outcome is Verified, or Failed with a token's code."""

    ref: int
    token: str

    def __repr__(self) -> str:
        return f"<Verify ref={self.ref}>"


class EndSession(NamedTuple):
    """Revoke this session everywhere; the outcome is Ended or Failed."""

    ref: int
    session: str


class Identify(NamedTuple):
    """The connection goes on under this identity."""

    identity: Identity


class Withhold(NamedTuple):
    """The token has expired: deliver nothing, remember the positions."""


class Resume(NamedTuple):
    """Deliver again, from the positions reached."""


class Refused(NamedTuple):
    """A command, or one room of a send, was refused, and the client is told. To be counted."""

    command: Command | None
    """None: it was no command at all."""
    code: ReplyCode


class Close(NamedTuple):
    """Say bye and close; nothing more comes in or goes out."""

    disconnect: Disconnect


Effect = (
    Transmit
    | Publish
    | Join
    | Admit
    | Abandon
    | Leave
    | Read
    | Verify
    | EndSession
    | Identify
    | Withhold
    | Resume
    | Refused
    | Close
)


# --- outcomes ------------------------------------------------------------------------------


class Published(NamedTuple):
    epoch: str
    offset: int
    ts: int
    duplicate: bool


class Page(NamedTuple):
    reading: Reading
    more: bool


class Verified(NamedTuple):
    identity: Identity
    revoked: bool


class Ended(NamedTuple):
    """The session is revoked."""


class Failed(NamedTuple):
    code: ReplyCode


Outcome = Published | Reading | Page | Verified | Ended | Failed

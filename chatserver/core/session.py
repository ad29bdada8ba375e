"""The rules of a session's life: rotation, reuse, revocation.

A session begins with a login and is a *family* of refresh tokens, one generation after another.
Each is good for one rotation:

                     ┌ generation        rotate: the next generation is the answer
    presented ──────┤ the one before     within the leeway the same answer again, for it may have
                     │                   been lost on the way; later it is reuse
                     └ older             reuse: somebody has a copy, so nobody may go on

A revocation ends a session, a user's sessions up to now, or one access token, everywhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum, StrEnum, auto
from typing import NamedTuple

from chatserver.core.claims import CLOCK_SKEW, MAX_LIFETIME, Identity

REVOCATION_SECONDS = MAX_LIFETIME + 2 * CLOCK_SKEW
"""The last token that a revocation covers has expired by then, whichever clock was ahead."""
STALE_SECONDS = 3.0
"""A list that was not confirmed for this long may miss a revocation: nothing is accepted."""
CLOCK_TOLERANCE = 5.0
"""A clock further than this from the store's judges ``exp`` and cutoffs wrongly."""


REFRESH_SECONDS = 7 * 86_400
"""From login to the end of the last refresh token, whatever the number of rotations."""
LEEWAY_MILLISECONDS = 10_000
MAX_REPLAYS = 5
"""How long, and how often, the same answer is given again."""


class Family(NamedTuple):
    """What is kept of a session's refresh tokens. No token can be made of it alone."""

    session: str
    user: str
    roles: tuple[str, ...]
    rooms: Mapping[str, str] | None
    begun_at: int
    """Seconds since the epoch, as ``expires_at``."""
    expires_at: int
    generation: int
    """Of the token that is good now."""
    rotated_at: int
    """Milliseconds since the epoch, when that token was made."""
    replays: int
    """How often it was handed out again."""
    ended: bool

    @property
    def issued_at(self) -> int:
        """``iat`` of the access token that goes with this generation."""
        return max(self.begun_at, self.rotated_at // 1000)


class Denial(Enum):
    """Why a genuine refresh token gets no answer."""

    REVOKED = auto()
    EXPIRED = auto()
    REUSED = auto()
    """The family is to be revoked."""
    TOO_OFTEN = auto()
    """Nothing happens to the family."""


def rotate(family: Family, presented: int, *, cutoff: int, now: int) -> Family | Denial:
    """What becomes of a family when the token of the generation ``presented`` is.

    The family as it must be stored before the token of its generation is handed out, or why not.
    ``now`` is in milliseconds, ``cutoff`` the user's last revocation in seconds; both by the
    store's clock.
    """
    if family.ended or family.begun_at <= cutoff:
        return Denial.REVOKED
    if now >= family.expires_at * 1000:
        return Denial.EXPIRED
    if presented >= family.generation:
        # Beyond it only after an older copy of the store was restored: it is genuine, and newer
        # than all the store knows of.
        return family._replace(generation=presented + 1, rotated_at=now, replays=0)
    elapsed = now - family.rotated_at
    if presented < family.generation - 1 or elapsed > LEEWAY_MILLISECONDS:
        return Denial.REUSED
    if family.replays >= MAX_REPLAYS:
        return Denial.TOO_OFTEN
    return family._replace(replays=family.replays + 1)


class Kind(StrEnum):
    SESSION = "session"
    USER = "user"
    TOKEN = "token"


class Revocation(NamedTuple):
    """One entry of the list."""

    kind: Kind
    value: str
    until: float
    """Wall clock, seconds: forget it after that."""
    cutoff: int = 0
    """Of a user: tokens with ``iat`` up to here are revoked; later logins are not."""

    def covers(self, identity: Identity) -> bool:
        match self.kind:
            case Kind.SESSION:
                return identity.session == self.value
            case Kind.TOKEN:
                return identity.token_id == self.value
            case Kind.USER:
                return identity.user == self.value and identity.issued_at <= self.cutoff


class RevocationList:
    """Everything revoked and still dangerous; it fits in memory since tokens live 15 minutes."""

    def __init__(self) -> None:
        self._entries: dict[tuple[Kind, str], Revocation] = {}

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, revocation: Revocation) -> bool:
        """True when this says something new. A cutoff never goes back."""
        place = (revocation.kind, revocation.value)
        known = self._entries.get(place)
        if known and known.cutoff >= revocation.cutoff and known.until >= revocation.until:
            return False
        if known:
            revocation = revocation._replace(
                until=max(known.until, revocation.until),
                cutoff=max(known.cutoff, revocation.cutoff),
            )
        self._entries[place] = revocation
        return True

    def covers(self, identity: Identity) -> bool:
        entries = self._entries
        if not entries:
            return False
        if (Kind.SESSION, identity.session) in entries:
            return True
        if (Kind.TOKEN, identity.token_id) in entries:
            return True
        user = entries.get((Kind.USER, identity.user))
        return user is not None and user.covers(identity)

    def forget(self, now: float) -> None:
        """Drop what no living token can match any more."""
        entries = self._entries
        for place in [place for place, entry in entries.items() if entry.until < now]:
            del entries[place]

    def entries(self) -> list[Revocation]:
        return list(self._entries.values())

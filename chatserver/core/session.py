"""The rules of revocation: what a revocation covers, and for how long it must be remembered."""

from __future__ import annotations

from enum import StrEnum
from typing import NamedTuple

from chatserver.core.claims import CLOCK_SKEW, MAX_LIFETIME, Identity

REVOCATION_SECONDS = MAX_LIFETIME + 2 * CLOCK_SKEW
"""The last token that a revocation covers has expired by then, whichever clock was ahead."""
STALE_SECONDS = 3.0
"""A list that was not confirmed for this long may miss a revocation: nothing is accepted."""
CLOCK_TOLERANCE = 5.0
"""A clock further than this from the store's judges ``exp`` and cutoffs wrongly."""


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

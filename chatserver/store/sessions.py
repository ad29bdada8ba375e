"""Sessions: begun by a login, carried on by rotation, given other rights, ended by revocation.

What a session may do next is decided in core/session.py; the store keeps its state and lets it
change only from the state that was judged (``rotate.lua``), so that of fifty who present one
token at once exactly one rotates it.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Mapping, Sequence
from typing import NamedTuple, Self

import orjson

from chatserver import telemetry
from chatserver.core.claims import MAX_LIFETIME
from chatserver.core.errors import ReplyCode, TokenRefused
from chatserver.core.session import REFRESH_SECONDS, Denial, Family, Kind, rotate
from chatserver.settings import Settings
from chatserver.store import keys
from chatserver.store.keyring import Keyring
from chatserver.store.link import ANNOUNCE, BEGIN, ENTITLE, ROTATE, Call, Reply
from chatserver.store.refresh import Named, RefreshTokens
from chatserver.store.revocations import STREAM_MILLISECONDS, new_incarnation, store_revocation

log = telemetry.logger(__name__)


class TokenPair(NamedTuple):
    """What a login or a rotation gives. Times are milliseconds since the epoch."""

    access_token: str
    refresh_token: str
    session: str
    expires_at: int
    refresh_expires_at: int

    def __repr__(self) -> str:
        return f"<TokenPair session={self.session!r}>"


class TooManyReplays(Exception):
    """The token before the last was presented too often. Nothing has changed by it."""


class Sessions:
    """Begins and carries on sessions. All times are the store's, so that one clock decides."""

    def __init__(
        self,
        call: Call,
        keyring: Keyring,
        refresh_tokens: RefreshTokens,
        *,
        access_seconds: int = MAX_LIFETIME,
        refresh_seconds: int = REFRESH_SECONDS,
    ) -> None:
        self._call = call
        self._keyring = keyring
        self._refresh_tokens = refresh_tokens
        self._access_seconds = access_seconds
        self._refresh_seconds = refresh_seconds

    @classmethod
    def of(cls, settings: Settings, call: Call) -> Self:
        return cls(
            call,
            Keyring.of(settings),
            RefreshTokens.of(settings),
            access_seconds=settings.access_seconds,
            refresh_seconds=settings.refresh_seconds,
        )

    async def salt(self) -> bytes:
        """The store's part of the refresh keys. A worker's mirror knows it, too."""
        salt = await self._call(["GET", keys.INCARNATION])
        if salt is None:
            fresh = new_incarnation()
            salt = await self._call(["SET", keys.INCARNATION, fresh, "NX", "GET"]) or fresh.encode()
        return bytes(salt)

    async def begin(
        self, user: str, roles: Sequence[str], rooms: Mapping[str, str] | None = None
    ) -> TokenPair:
        """A new session and its first tokens.

        Raises ValueError, which says why, when no token can say that, and StoreUnavailable.
        """
        session = "s-" + secrets.token_urlsafe(16)
        self._check(session, user, roles, rooms)
        salt = await self.salt()
        command = BEGIN.command(
            [keys.family(session), keys.ended(user)],
            [user, _json(list(roles)), _rooms_json(rooms), self._refresh_seconds],
        )
        begun_at, wait = await self._call(command)
        while wait:
            await asyncio.sleep(wait / 1000)
            begun_at, wait = await self._call(command)
        family = Family(
            session=session,
            user=user,
            roles=tuple(roles),
            rooms=rooms,
            begun_at=begun_at,
            expires_at=begun_at + self._refresh_seconds,
            generation=1,
            rotated_at=begun_at * 1000,
            replays=0,
            ended=False,
        )
        log.info("session begun", session=session, user=user)
        return self._tokens(family, self._refresh_tokens.first(session), salt)

    async def rotate(self, refresh_token: str, salt: bytes) -> TokenPair:
        """The successor of a refresh token, with an access token.

        Raises TokenRefused, TooManyReplays or StoreUnavailable. A token that was used before ends
        its session.
        """
        named = self._refresh_tokens.read(refresh_token, salt)
        family, now = await self.find(named.family)
        cutoff = 0 if family is None else await self._cutoff(family.user)
        while True:
            if family is None:
                raise TokenRefused(ReplyCode.TOKEN_INVALID)
            match rotate(family, named.generation, cutoff=cutoff, now=now):
                case Family() as following:
                    done, now, cutoff, family = await self._advance(family, following)
                    if done:
                        assert family is not None
                        # Rights may have changed since it was judged; the script saw the latest.
                        following = following._replace(roles=family.roles, rooms=family.rooms)
                        successor = named._replace(generation=following.generation)
                        return self._tokens(following, successor, salt)
                case Denial.REUSED:
                    log.warning("refresh token reused", session=family.session, user=family.user)
                    await store_revocation(
                        self._call, Kind.SESSION, family.session, reason="refresh token reused"
                    )
                    raise TokenRefused(ReplyCode.TOKEN_REVOKED)
                case Denial.REVOKED:
                    raise TokenRefused(ReplyCode.TOKEN_REVOKED)
                case Denial.EXPIRED:
                    raise TokenRefused(ReplyCode.TOKEN_EXPIRED)
                case Denial.TOO_OFTEN:
                    raise TooManyReplays

    def session_of(self, refresh_token: str, salt: bytes) -> str:
        """The session that a refresh token is of, whatever became of it. Raises TokenRefused."""
        return self._refresh_tokens.read(refresh_token, salt).family

    async def find(self, session: str) -> tuple[Family | None, int]:
        """What is kept of a session, and the time, in milliseconds."""
        flat, (seconds, microseconds) = await asyncio.gather(  # one round trip
            self._call(["HGETALL", keys.family(session)]), self._call(["TIME"])
        )
        return _family(session, flat), _milliseconds(seconds, microseconds)

    async def entitle(
        self,
        session: str,
        *,
        roles: Sequence[str] | None = None,
        rooms: Mapping[str, str] | None = None,
        without_rooms: bool = False,
    ) -> Family | None:
        """Change what the session's next tokens say; None leaves it. Its sockets are told.

        Returns None when there is no such session, or no more. Raises ValueError, which says why,
        when no token can say that, and StoreUnavailable.
        """
        family, now = await self.find(session)
        if family is None or now >= family.expires_at * 1000:
            return None
        if family.begun_at <= await self._cutoff(family.user):
            return None
        if roles is not None:
            family = family._replace(roles=tuple(roles))
        if rooms is not None or without_rooms:
            family = family._replace(rooms=rooms)
        self._check(session, family.user, family.roles, family.rooms)
        flat = await self._call(
            ENTITLE.command(
                [keys.family(session), keys.STREAM],
                [
                    session,
                    keys.CHANNEL,
                    int(roles is not None),
                    _json(list(roles or ())),
                    int(rooms is not None or without_rooms),
                    _rooms_json(rooms),
                    STREAM_MILLISECONDS,
                    ANNOUNCE,
                ],
            )
        )
        return _family(session, flat)

    async def _cutoff(self, user: str) -> int:
        """Families of the user that were begun up to then (seconds) have ended."""
        return int(await self._call(["GET", keys.ended(user)]) or 0)

    async def _advance(
        self, family: Family, following: Family
    ) -> tuple[bool, int, int, Family | None]:
        """Store the next state if nobody was faster: done, the time, the cutoff, what was there."""
        reply = await self._call(
            ROTATE.command(
                [keys.family(family.session), keys.ended(family.user)],
                [
                    family.generation,
                    family.replays,
                    following.generation,
                    following.rotated_at,
                    following.replays,
                ],
            )
        )
        done, seconds, microseconds, cutoff, *flat = reply
        found = _family(family.session, flat)
        return done == 1, _milliseconds(seconds, microseconds), cutoff, found

    def _check(
        self, session: str, user: str, roles: Sequence[str], rooms: Mapping[str, str] | None
    ) -> None:
        """Raises ValueError: before anything is stored that no token can say."""
        self._keyring.issue(
            user=user,
            session=session,
            roles=roles,
            rooms=rooms,
            issued_at=2**40,  # as long as any
            ttl=self._access_seconds,
            token_id="t-" + "x" * 22,
        )

    def _tokens(self, family: Family, named: Named, salt: bytes) -> TokenPair:
        """The same for the same state, to the byte: an answer can be given again."""
        # Not beyond the session's own end.
        ttl = max(1, min(self._access_seconds, family.expires_at - family.issued_at))
        access_token = self._keyring.issue(
            user=family.user,
            session=family.session,
            roles=family.roles,
            rooms=family.rooms,
            issued_at=family.issued_at,
            ttl=ttl,
            token_id=self._refresh_tokens.token_id(named, salt),
        )
        return TokenPair(
            access_token=access_token,
            refresh_token=self._refresh_tokens.write(named, salt),
            session=family.session,
            expires_at=(family.issued_at + ttl) * 1000,
            refresh_expires_at=family.expires_at * 1000,
        )


def _family(session: str, flat: Reply) -> Family | None:
    if not flat:
        return None
    texts = [text.decode() for text in flat]
    fields = dict(zip(texts[::2], texts[1::2], strict=True))
    return Family(
        session=session,
        user=fields["user"],
        roles=tuple(orjson.loads(fields["roles"])),
        rooms=orjson.loads(fields["rooms"]) if fields["rooms"] else None,
        begun_at=int(fields["begun_at"]),
        expires_at=int(fields["expires_at"]),
        generation=int(fields["generation"]),
        rotated_at=int(fields["rotated_at"]),
        replays=int(fields["replays"]),
        ended=fields["ended"] != "",
    )


def _milliseconds(seconds: Reply, microseconds: Reply) -> int:
    return int(seconds) * 1000 + int(microseconds) // 1000


def _json(value: object) -> str:
    return orjson.dumps(value).decode()


def _rooms_json(rooms: Mapping[str, str] | None) -> str:
    return "" if rooms is None else _json(dict(rooms))

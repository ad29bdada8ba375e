"""Tokens over HTTP, for whoever holds one: traded for the next, or ended.

The two public routes of protocol.md, section 6, and development's login; who may come to them is
the listener's business.
"""

from __future__ import annotations

import time

from chatserver.core import errors
from chatserver.core.claims import TokenExpired
from chatserver.core.errors import Refusal, StoreUnavailable, TokenRefused
from chatserver.core.flow import Budgets
from chatserver.core.handshake import Deposit, Login, TokenRoute
from chatserver.core.session import Kind
from chatserver.store.keyring import Keyring
from chatserver.store.link import Call
from chatserver.store.revocations import Mirror, revoke
from chatserver.store.sessions import Sessions, TooManyReplays

FAMILY_RATE = 1.0
FAMILY_BURST = 60.0
"""What may be asked for one session: a client needs one rotation in 15 minutes."""

Answer = dict[str, object]


class TokenCounter:
    """Takes tokens in, and hands out what is due for them."""

    def __init__(self, call: Call, keyring: Keyring, sessions: Sessions, mirror: Mirror) -> None:
        self._call = call
        self._keyring = keyring
        self._sessions = sessions
        self._mirror = mirror
        self._families = Budgets(FAMILY_RATE, FAMILY_BURST)

    async def take(self, deposit: Deposit | Login) -> Answer | Refusal:
        salt = self._mirror.incarnation
        if salt is None or not self._mirror.fresh():
            return errors.UNAVAILABLE
        try:
            if isinstance(deposit, Login):
                return await self._begin(deposit.user)
            match deposit.route:
                case TokenRoute.REFRESH:
                    return await self._refresh(deposit.token, salt)
                case TokenRoute.REVOKE:
                    return await self._revoke(deposit.token, salt)
        except StoreUnavailable:
            return errors.UNAVAILABLE

    async def _begin(self, user: str) -> Answer | Refusal:
        try:
            return (await self._sessions.begin(user, ["member"]))._asdict()
        except ValueError:
            return errors.NOT_A_NAME

    async def _refresh(self, token: str, salt: bytes) -> Answer | Refusal:
        try:
            if self._too_often(self._sessions.session_of(token, salt)):
                return errors.TOO_MANY_ROTATIONS
            return (await self._sessions.rotate(token, salt))._asdict()
        except TokenRefused as refused:
            return errors.TOKEN_REFUSALS[refused.code]
        except TooManyReplays:
            return errors.TOO_MANY_ROTATIONS

    async def _revoke(self, token: str, salt: bytes) -> Answer | Refusal:
        """End the session, on every worker before this returns. RFC 7009, section 2.2: a token
        that nobody knows is as good as revoked, and the answer is the same."""
        session = self._session_of(token, salt)
        if session is not None:
            if self._too_often(session):
                return errors.TOO_MANY_ROTATIONS
            await revoke(self._call, Kind.SESSION, session, reason="logout")
        return {}

    def _too_often(self, session: str) -> bool:
        return self._families.spend(session, time.monotonic()) > 0.0

    def _session_of(self, token: str, salt: bytes) -> str | None:
        try:
            if token.startswith("rt1."):
                return self._sessions.session_of(token, salt)
            return self._keyring.verify(token, now=time.time()).session
        except TokenExpired as expired:
            return expired.identity.session
        except TokenRefused:
            return None

"""Sessions begun from a test, as a login service would, with the issuer's secret."""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager

from chatserver.core.session import REFRESH_SECONDS, Kind
from chatserver.store import keys
from chatserver.store.keyring import Keyring
from chatserver.store.link import Call, Store
from chatserver.store.refresh import RefreshTokens
from chatserver.store.revocations import revoke
from chatserver.store.sessions import Sessions, TokenPair
from tests.support.tokens import Issuer, unique


class Office:
    """A store's sessions; what it hands out is remembered as what no log may hold."""

    def __init__(self, call: Call, issuer: Issuer, sessions: Sessions) -> None:
        self.call = call
        self.issuer = issuer
        self.sessions = sessions

    async def begin(
        self,
        user: str = "",
        roles: Sequence[str] = ("member",),
        rooms: Mapping[str, str] | None = None,
    ) -> TokenPair:
        return self.keep(await self.sessions.begin(user or unique("user"), roles, rooms))

    async def rotate(self, token: str) -> TokenPair:
        return self.keep(await self.sessions.rotate(token, await self.sessions.salt()))

    def keep(self, pair: TokenPair) -> TokenPair:
        self.issuer.keep(pair.access_token)
        self.issuer.keep(pair.refresh_token)
        return pair

    async def state(self, session: str) -> dict[str, str]:
        flat = [each.decode() for each in await self.call(["HGETALL", keys.family(session)])]
        return dict(zip(flat[::2], flat[1::2], strict=True))

    async def change(self, session: str, **fields: str | int) -> None:
        """As if time had passed, or another copy of the store had been restored."""
        flat = [part for pair in fields.items() for part in pair]
        await self.call(["HSET", keys.family(session), *flat])

    async def age(self, session: str, milliseconds: int) -> None:
        """The last rotation was so much earlier."""
        rotated_at = int((await self.state(session))["rotated_at"])
        await self.change(session, rotated_at=rotated_at - milliseconds)

    async def revoke(self, kind: Kind, value: str) -> None:
        await revoke(self.call, kind, value)


@asynccontextmanager
async def office(
    url: str,
    issuer: Issuer,
    *,
    refresh_seconds: int = REFRESH_SECONDS,
) -> AsyncIterator[Office]:
    async with Store(url) as store:
        sessions = Sessions(
            store.call,
            Keyring(issuer.key),
            RefreshTokens(issuer.key),
            refresh_seconds=refresh_seconds,
        )
        yield Office(store.call, issuer, sessions)

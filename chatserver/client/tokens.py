"""The access token of one client: the one in use, and where the next one comes from."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable

from .flight import Flight
from .keeper import LEEWAY_SECONDS, TokenKeeper
from .link import check_token

TokenSource = Callable[[], Awaitable[str]]

# As the server counts when it says ``expiring``: the share of a lifetime, and seconds at most.
EXPIRING_SHARE = 0.2
EXPIRING_SECONDS = 60.0
# A source whose every token is refused has nothing better to give.
STRIKES = 2


class NoTokenError(Exception):
    """The server refused the token for ``why``, and there is no other."""

    def __init__(self, why: Exception) -> None:
        super().__init__(why)
        self.why = why


class Tokens:
    """One client's. ``source`` is a token, or an async function that returns a fresh one.

    The function is asked when there is need of a new token and not for every connection: a
    thousand clients that come back at once do not all ask. Never twice at the same time.
    """

    __slots__ = (
        "_deadline",
        "_flight",
        "_refused",
        "_shown",
        "_source",
        "_strikes",
        "_token",
        "_until",
    )

    def __init__(self, source: str | TokenSource, deadline: float) -> None:
        self._source = None if isinstance(source, str) else source
        self._token = source if isinstance(source, str) else None
        self._shown: str | None = None
        self._deadline = deadline
        self._until = float("inf")
        self._refused: Exception | None = None
        self._strikes = 0
        self._flight = Flight(self._fetch)

    @property
    def renewable(self) -> bool:
        return self._source is not None

    async def get(self, now: float) -> str:
        """A token to connect with: the one in use, as long as it is good for a while.

        Raises `NoTokenError`, and as `renew` does.
        """
        if self._token is None or self._refused or now >= self._until or self._flight.under_way:
            refused, before = self._refused, self._token
            if self._source is not None:
                await self.renew()
            if refused is not None and self._token == before:
                raise NoTokenError(refused)
        assert self._token is not None
        self._shown = self._token
        return self._token

    async def renew(self) -> str:
        """Ask for a new token, or wait for the answer when it is being asked for already.

        Raises what the function raises, TimeoutError, and ValueError for what is no token.
        """
        return await self._flight.join()

    async def _fetch(self) -> str:
        assert self._source is not None
        async with asyncio.timeout(self._deadline):
            token = await self._source()
        # Here, or it would be shown again and again, and the function never asked for a better one.
        check_token(token)
        self.replace(token)
        return token

    def replace(self, token: str | None) -> str | None:
        """Use this one from now on, and return the one before; how long it is good for is not
        known yet."""
        before = self._token
        if token != before:
            self._token, self._refused = token, None
            self._until = float("inf")
        return before

    def withdraw(self, token: str, before: str | None) -> None:
        """It was refused, so the one ``before`` is in use still, unless a newer one is by now."""
        if self._token == token:
            self.replace(before)

    def accept(self, left: float, now: float) -> None:
        """The server takes the token; it expires in ``left`` seconds."""
        self._refused, self._strikes = None, 0
        self._shown = self._token
        self._until = now + left - min(EXPIRING_SECONDS, left * EXPIRING_SHARE)

    def refuse(self, why: Exception, *, expired: bool) -> bool:
        """The server takes the token no longer. Returns whether there may be another."""
        if self._token == self._shown:  # Unless a newer one is at hand already.
            self._refused = why
        if not expired:
            self._strikes += 1
        return self._source is not None and self._strikes < STRIKES

    def outdate(self) -> None:
        """There is a newer one to be had, with other rights; this one will do otherwise."""
        if self._source is not None:
            self._until = 0.0

    async def close(self) -> None:
        await self._flight.close(cancel=True)
        if isinstance(self._source, TokenKeeper):
            # The server has made the trade, perhaps: who loses its answer now loses the session.
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(LEEWAY_SECONDS):
                    await self._source.close()

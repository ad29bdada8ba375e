"""Who the clients are: tokens made here from a secret, or brought along in a file."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from pathlib import Path
from typing import Protocol

from pydantic import SecretStr

from chatserver.settings import development_secret, load
from chatserver.store.keyring import Keyring

from . import http

TRIES = 5


class TokenError(Exception):
    """There is no such token to be had; the message is for a person."""


class Credentials(Protocol):
    """The tokens of all clients, by their number."""

    renewable: bool
    """Whether a client can have another token of its session."""

    async def token(self, client: int) -> str:
        """The one it has. Raises TokenError."""

    async def renew(self, client: int, source: str | None) -> str:
        """The next one, asked for from the address ``source``. Raises TokenError and OSError."""


class Minted:
    """A user and a session for each client, signed with the server's secret."""

    renewable = True

    def __init__(self, run: str, keyring: Keyring) -> None:
        self._run = run
        self._keyring = keyring

    async def token(self, client: int) -> str:
        return self._keyring.issue(
            user=f"{self._run}-{client}",
            session=f"s-{self._run}-{client}",
            roles=["member"],
            issued_at=int(time.time()),
            token_id=secrets.token_urlsafe(12),
        )

    async def renew(self, client: int, source: str | None) -> str:
        return await self.token(client)


class Listed:
    """Access tokens as they are. Clients share them if there are too few."""

    renewable = False

    def __init__(self, tokens: list[str]) -> None:
        self._tokens = tokens

    async def token(self, client: int) -> str:
        return self._tokens[client % len(self._tokens)]

    async def renew(self, client: int, source: str | None) -> str:
        raise TokenError("a list of access tokens has no next ones")


class Pairs:
    """Sessions from a login, one for each client; the refresh tokens are traded for the next."""

    renewable = True

    def __init__(self, base: str, pairs: list[tuple[str, str]]) -> None:
        self._base = base
        self._pairs = pairs

    async def token(self, client: int) -> str:
        return self._pairs[client][0]

    async def renew(self, client: int, source: str | None) -> str:
        for _ in range(TRIES):
            # An answer that was lost, or a 503: the same token again gives the same pair.
            answer = await http.post(
                self._base, "/v1/tokens/refresh", self._pairs[client][1], source=source
            )
            if answer.status == 200:
                self._pairs[client] = answer.body["access_token"], answer.body["refresh_token"]
                return self._pairs[client][0]
            if answer.retry_after is None:
                break
            await asyncio.sleep(answer.retry_after)
        code = answer.body.get("error", {}).get("code", answer.status)
        raise TokenError(f"a refresh token was not traded: {code}")


def from_secret(run: str) -> Minted:
    """With CHATSERVER_SECRET, else the development server's. Raises ConfigurationError."""
    settings = load()
    if settings.secret is None:
        secret = SecretStr(development_secret(settings.data_dir).decode())
        settings = settings.model_copy(update={"secret": secret})
    return Minted(run, Keyring.of(settings))


def from_file(path: Path, base: str, clients: int, fresh: bool) -> Listed | Pairs:
    """Raises TokenError for a file that will not do; ``fresh`` if next tokens will be needed."""
    try:
        text = path.read_text().strip()
    except (OSError, UnicodeDecodeError) as error:
        raise TokenError(f"{path} cannot be read: {error}") from None
    if not text:
        raise TokenError(f"{path} is empty")
    if not text.startswith("{"):
        if fresh:
            raise TokenError(
                f"this scenario needs fresh tokens: {path} must hold pairs, JSON objects with "
                "access_token and refresh_token, as `chatserver token issue --pair` prints them"
            )
        return Listed(text.split())
    pairs = _pairs(path, text)
    if len(pairs) < clients:
        raise TokenError(
            f"{path} holds {len(pairs)} pairs for {clients} clients and publishers; each needs one "
            "of its own, for a refresh token that is used twice ends its session"
        )
    return Pairs(base, pairs)


def _pairs(path: Path, text: str) -> list[tuple[str, str]]:
    decoder, pairs, at = json.JSONDecoder(), [], 0
    try:
        while at < len(text):
            pair, end = decoder.raw_decode(text, at)
            pairs.append((str(pair["access_token"]), str(pair["refresh_token"])))
            at = end + len(text[end:]) - len(text[end:].lstrip())
    except (ValueError, LookupError, TypeError):
        raise TokenError(
            f"{path} is not made of JSON objects with access_token and refresh_token"
        ) from None
    return pairs

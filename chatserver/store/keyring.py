"""The keys that sign and verify access tokens. Nothing else imports python-jose.

The library is trusted with the signature and with nothing more. Before it sees a token, length
and canonical form are checked, so that a token has one spelling; after it, `identify` goes over
every claim. The wall clock that the library would consult decides nothing.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Self

from jose import jwk, jws, jwt
from jose.backends.base import Key

from chatserver.core.claims import ALGORITHM, TOKEN_TYPE, Identity, identify
from chatserver.core.errors import ReplyCode, TokenRefused
from chatserver.core.frames import too_deep
from chatserver.settings import Settings

MIN_SECRET_BYTES = 32
"""RFC 7518, section 3.2: a key of HS256 is at least as long as its digest."""

# Unpadded base64url in which the bits that the last character leaves over are zero: they
# would be ignored on decoding, and several spellings would then be the same token.
_SEGMENT = (
    r"(?=[^.])(?:[A-Za-z0-9_-]{4})*+"
    r"(?:[A-Za-z0-9_-][AQgw]|[A-Za-z0-9_-]{2}[AEIMQUYcgkosw048])?"
)
_CANONICAL = re.compile(rf"{_SEGMENT}\.{_SEGMENT}\.{_SEGMENT}")


class Keyring:
    """Signs with one secret, verifies with it and with the one before it.

    The secret's bytes are the HS256 key as they stand, so that whoever holds them can issue
    tokens with any JWT library; they need `kid` for the header. Whether a secret is strong
    enough is for `weaknesses` to say; only an empty one is refused here.
    """

    def __init__(
        self,
        secret: bytes,
        *,
        previous: bytes | None = None,
        issuer: str = "chatserver",
        audience: str = "chatserver",
        token_bytes: int = 4096,
    ) -> None:
        secrets = [secret] if previous is None else [secret, previous]
        if not all(secrets):
            raise ValueError("a secret is empty")
        self._keys: dict[object, Key] = {key_id(each): _key(each) for each in secrets}
        self._kid = key_id(secret)
        self._issuer = issuer
        self._audience = audience
        self._token_bytes = token_bytes

    @classmethod
    def of(cls, settings: Settings) -> Self:
        """Under the settings' secrets, for tokens from and to whom they say."""
        secret, previous = secrets_of(settings)
        return cls(
            secret,
            previous=previous,
            issuer=settings.issuer,
            audience=settings.audience,
            token_bytes=settings.token_bytes,
        )

    def __repr__(self) -> str:
        return f"<Keyring kid={self._kid} verifies={list(self._keys)}>"

    @property
    def kid(self) -> str:
        """The name of the signing key, for the header of every token signed with it."""
        return self._kid

    def issue(
        self,
        *,
        user: str,
        session: str,
        roles: Sequence[str],
        rooms: Mapping[str, str] | None = None,
        issued_at: int,
        ttl: int = 900,
        token_id: str,
    ) -> str:
        """A new access token, good from ``issued_at`` for ``ttl`` seconds.

        Raises ValueError, which says why, rather than issue what `verify` would refuse.
        """
        header = {"alg": ALGORITHM, "typ": TOKEN_TYPE, "kid": self._kid}
        claims: dict[str, object] = {
            "iss": self._issuer,
            "aud": self._audience,
            "sub": user,
            "sid": session,
            "jti": token_id,
            "iat": issued_at,
            "exp": issued_at + ttl,
            "roles": list(roles),
        }
        if rooms is not None:
            claims["rooms"] = dict(rooms)
        try:
            self._identify(header, claims, now=issued_at)
        except TokenRefused as refused:
            raise ValueError(f"no such token can be issued: {refused.__cause__}") from refused
        token = jwt.encode(claims, self._keys[self._kid], algorithm=ALGORITHM, headers=header)
        if len(token) > self._token_bytes:
            raise ValueError(f"the token is longer than the {self._token_bytes} bytes accepted")
        return token

    def verify(self, token: str, *, now: float) -> Identity:
        """Whose token this is at ``now``, in seconds since the epoch.

        Raises TokenRefused and nothing else, whatever the text. Revocation is not looked at.
        """
        if len(token) > self._token_bytes or not _CANONICAL.fullmatch(token):
            raise TokenRefused(ReplyCode.TOKEN_INVALID)
        try:
            header, claims = self._open(token)
        except Exception as fault:
            # Crafted input draws RecursionError, AttributeError, TypeError and OverflowError
            # out of the library, beside its own errors; none of them is more than a refusal.
            raise TokenRefused(ReplyCode.TOKEN_INVALID) from fault
        return self._identify(header, claims, now=now)

    def _open(self, token: str) -> tuple[dict[str, object], dict[str, object]]:
        header = _members(urlsafe_b64decode(token.partition(".")[0] + "=="))
        # A str of algorithms would match "HS" and "256" too. Not jwt.decode(): in its reading of
        # the claims a member may occur twice, and its checks of them are the weaker ones.
        claims = jws.verify(token, self._keys[header["kid"]], algorithms=[ALGORITHM])
        return header, _members(claims)

    def _identify(
        self, header: Mapping[str, object], claims: Mapping[str, object], *, now: float
    ) -> Identity:
        return identify(header, claims, now=now, issuer=self._issuer, audience=self._audience)


def secrets_of(settings: Settings) -> tuple[bytes, bytes | None]:
    """The secret and the one before it, as bytes: never parsed, whatever they look like."""
    assert settings.secret is not None
    previous = settings.secret_previous
    return (
        settings.secret.get_secret_value().encode(),
        None if previous is None else previous.get_secret_value().encode(),
    )


def key_id(secret: bytes) -> str:
    """The name of a secret, by which tokens say what they were signed with."""
    # No signature is given away by it: what a token signs has a dot in it, and this has none.
    digest = hmac.digest(secret, b"chatserver kid v1", hashlib.sha256)
    return urlsafe_b64encode(digest)[:16].decode()


def _key(secret: bytes) -> Key:
    # As the value of a JWK, any bytes are a key. Given as they are, the library refuses those
    # that look like PEM or SSH keys; given to decode(), it would try to parse them as JSON.
    value = urlsafe_b64encode(secret).rstrip(b"=").decode()
    return jwk.construct({"kty": "oct", "k": value}, ALGORITHM)


def _members(text: bytes) -> dict[str, object]:
    # How deep Python's own reader goes depends on its version.
    if too_deep(text):
        raise ValueError("nested too deep")
    members = _JSON.decode(text.decode())
    if isinstance(members, dict):
        return members
    raise ValueError("not a JSON object")


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    members = dict(pairs)
    if len(members) == len(pairs):
        return members
    raise ValueError("a member occurs twice")


_JSON = json.JSONDecoder(object_pairs_hook=_unique)


# Found in tutorials and sample configurations, and from there in production.
_PUBLISHED = frozenset(
    {
        b"09d25e094faa6ca2556c818166b7a9563b93f7099f6f0f4caa6cf63b88e8d3e7",
        b"a-string-secret-at-least-256-bits-long",
        b"your-super-secret-jwt-token-with-at-least-32-characters-long",
    }
)
_WORDS = re.compile(
    rb"asdfghjkl|qwertyuiop|qwerty|zxcvbnm|1234567890|12345678|123456|[ ._-]"
    rb"|admin|change|default|example|insecure|password|passwd|please|replace|secret|super|your"
    rb"|chat|server|token|jwt|key|me|this"
)


def weaknesses(secret: bytes) -> list[str]:
    """Why ``secret`` must not sign tokens, in sentences that do not quote it; empty if it may.

    Catches what people type, paste and forget. It cannot tell a random secret from one that
    merely looks like it.
    """
    found = []
    if len(secret) < MIN_SECRET_BYTES:
        found.append(f"It is {len(secret)} bytes long; use at least {MIN_SECRET_BYTES}.")
    # Of 32 random hexadecimal digits fewer than 8 are distinct once in 20 million times, of 64
    # never; the steps from one to the next are more varied still.
    if len(set(secret)) < 8:
        found.append("It has fewer than 8 distinct bytes.")
    elif len({b - a for a, b in pairwise(secret)}) < 8:
        found.append("It is a sequence, like abcdef.")
    if _repeats(secret):
        found.append("It is a shorter secret repeated.")
    if secret in _PUBLISHED:
        found.append("It is a published example.")
    elif len(_WORDS.sub(b"", secret.lower())) < len(secret) / 2:
        found.append("It is mostly made of words that everybody tries first.")
    return found


def _repeats(secret: bytes) -> bool:
    # A unit of 32 bytes or more is a good secret by itself.
    units = range(1, min(len(secret) // 2 + 1, MIN_SECRET_BYTES))
    return any(secret[unit:] == secret[:-unit] for unit in units)

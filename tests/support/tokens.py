"""Access tokens made by hand from the protocol's text, with none of the server's code."""

from __future__ import annotations

import hmac
import json
import secrets
import time
from base64 import urlsafe_b64encode
from collections.abc import Mapping, Sequence
from typing import Any


def b64url(data: bytes) -> str:
    return urlsafe_b64encode(data).rstrip(b"=").decode()


def kid_of(secret: bytes) -> str:
    """The name under which the server knows a secret."""
    return b64url(hmac.digest(secret, b"chatserver kid v1", "sha256"))[:16]


def sign(header: Mapping[str, Any], claims: Mapping[str, Any], secret: bytes) -> str:
    parts = [b64url(json.dumps(part, separators=(",", ":")).encode()) for part in (header, claims)]
    return seal(".".join(parts), secret)


def seal(signed: str, secret: bytes, digest: str = "sha256") -> str:
    return f"{signed}.{b64url(hmac.digest(secret, signed.encode(), digest))}"


def unique(prefix: str) -> str:
    """A name nobody else has: users and rooms of different tests never meet."""
    return f"{prefix}-{secrets.token_hex(6)}"


class Issuer:
    """Whoever logs people in. Remembers what must never be seen in a log."""

    def __init__(self, secret: str | None = None) -> None:
        self.secret = secret or secrets.token_urlsafe(40)
        self.issued: list[str] = []

    @property
    def key(self) -> bytes:
        return self.secret.encode()

    def header(self) -> dict[str, Any]:
        return {"alg": "HS256", "typ": "at+jwt", "kid": kid_of(self.key)}

    def claims(
        self,
        user: str,
        *,
        session: str | None = None,
        roles: Sequence[str] = ("member",),
        rooms: Mapping[str, str] | None = None,
        issued_at: int | None = None,
        lifetime: int = 900,
        token_id: str | None = None,
    ) -> dict[str, Any]:
        issued_at = int(time.time()) if issued_at is None else issued_at
        claims: dict[str, Any] = {
            "iss": "chatserver",
            "aud": "chatserver",
            "sub": user,
            "sid": session or f"session of {user}",
            "jti": token_id or secrets.token_hex(8),
            "iat": issued_at,
            "exp": issued_at + lifetime,
            "roles": list(roles),
        }
        return claims if rooms is None else claims | {"rooms": dict(rooms)}

    def token(self, user: str, **options: Any) -> str:
        return self.make(self.header(), self.claims(user, **options))

    def make(self, header: Mapping[str, Any], claims: Mapping[str, Any]) -> str:
        return self.keep(sign(header, claims, self.key))

    def keep(self, token: str) -> str:
        """Also remember this one, which was made elsewhere."""
        self.issued.append(token)
        return token

    def secrets_in(self, text: str) -> list[str]:
        """What was issued here, or the secret, and stands in the text."""
        signatures = [token.rpartition(".")[2] for token in self.issued]
        return [secret for secret in {self.secret, *signatures} if secret and secret in text]

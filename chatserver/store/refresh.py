"""Refresh tokens: names of a family and a generation, with a seal that needs two things to make.

``rt1.<kid>.<family>.<generation>.<seal>``, where the seal is an HMAC-SHA256 under a key that
HKDF (RFC 5869) makes of a server secret and the store's salt: neither a dump of the store nor a
leak of the environment is enough. Nothing else goes in, so that a token can be made again for a
client whose answer was lost, and a forged one is refused without asking the store.

A family stays with the secret that it began under: taking that away ends it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from base64 import urlsafe_b64encode
from collections.abc import Sequence
from typing import NamedTuple, Self

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from chatserver.core.errors import ReplyCode, TokenRefused
from chatserver.settings import Settings
from chatserver.store.keyring import key_id, secrets_of

LABEL = b"chatserver refresh v1"

# The seal's last character has two bits to spare: one spelling for each token.
_FORM = re.compile(
    r"rt1\.(?P<kid>[A-Za-z0-9_-]{16})\.(?P<family>[A-Za-z0-9_-]{1,64})"
    r"\.(?P<generation>[1-9][0-9]{0,9})\.[A-Za-z0-9_-]{42}[AEIMQUYcgkosw048]"
)


class Named(NamedTuple):
    """What a refresh token says."""

    kid: str
    family: str
    generation: int


class RefreshTokens:
    """Makes and reads refresh tokens under the secret, and reads those under the one before."""

    def __init__(self, secret: bytes, previous: bytes | None = None) -> None:
        secrets: Sequence[bytes] = [secret] if previous is None else [secret, previous]
        self._secrets = {key_id(each): each for each in secrets}
        self._kid = key_id(secret)
        self._salt = b""
        self._keys: dict[str, bytes] = {}

    @classmethod
    def of(cls, settings: Settings) -> Self:
        return cls(*secrets_of(settings))

    def __repr__(self) -> str:
        return f"<RefreshTokens kid={self._kid}>"

    def first(self, family: str) -> Named:
        """What the first token of a new family says."""
        return Named(self._kid, family, 1)

    def write(self, named: Named, salt: bytes) -> str:
        body = f"rt1.{named.kid}.{named.family}.{named.generation}"
        return f"{body}.{self._seal(named.kid, salt, body)}"

    def read(self, text: str, salt: bytes) -> Named:
        """Raises TokenRefused unless this was written here, under this salt."""
        form = _FORM.fullmatch(text)
        if form is None or form["kid"] not in self._secrets:
            raise TokenRefused(ReplyCode.TOKEN_INVALID)
        named = Named(form["kid"], form["family"], int(form["generation"]))
        if not hmac.compare_digest(self.write(named, salt).encode(), text.encode()):
            raise TokenRefused(ReplyCode.TOKEN_INVALID)
        return named

    def token_id(self, named: Named, salt: bytes) -> str:
        """``jti`` of the access token beside this one: the same whenever it is made again."""
        body = f"jti.{named.family}.{named.generation}"
        return f"t-{self._seal(named.kid, salt, body)[:22]}"

    def _seal(self, kid: str, salt: bytes, body: str) -> str:
        digest = hmac.digest(self._key(kid, salt), body.encode(), hashlib.sha256)
        return urlsafe_b64encode(digest).rstrip(b"=").decode()

    def _key(self, kid: str, salt: bytes) -> bytes:
        if salt != self._salt:
            self._salt, self._keys = salt, {}
        if kid not in self._keys:
            derivation = HKDF(algorithm=SHA256(), length=32, salt=salt, info=LABEL)
            self._keys[kid] = derivation.derive(self._secrets[kid])
        return self._keys[kid]

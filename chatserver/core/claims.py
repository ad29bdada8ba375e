"""What a signed token must say before its bearer is anybody: protocol.md, section 5.

A good signature shows that whoever holds the key wrote these claims, not that they wrote them
well. So every type, bound and time is checked here, whatever the library that checked the
signature looked at, and against the caller's ``now``, so that one clock decides.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import permutations

from chatserver.core.errors import ReplyCode, TokenRefused

MAX_LIFETIME = 900
"""Seconds from ``iat`` to ``exp``, at most."""

CLOCK_SKEW = 5
"""Seconds that ``iat`` and ``nbf`` may lie ahead of our clock."""

MAX_ROLES = 32
MAX_ROOMS = 256

ALGORITHM = "HS256"
TOKEN_TYPE = "at+jwt"  # RFC 9068, section 2.1.

_HEADER_MEMBERS = frozenset({"alg", "typ", "kid"})

# Beyond it a JSON number is not the same integer in every language (RFC 8259, section 6).
_MAX_INTEGER = 2**53

# Neither category Cc, which garbles logs, nor a surrogate, which no UTF-8 can carry.
_PLAIN = r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]"
_ID = re.compile(_PLAIN + "{1,128}")
_ROLE = re.compile(_PLAIN + "{1,64}")
_ROOM_PATTERN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._:@+-]{0,127}\*?|\*")
_RIGHTS = frozenset("".join(some) for n in range(4) for some in permutations("rwm", n))


@dataclass(frozen=True, slots=True)
class Identity:
    """Who bears a token, in which session, with which roles, and until when.

    ``rooms`` maps a room pattern to its rights, letters of ``rwm``; it is None, and the roles
    decide, when the token has no such claim. Times are whole seconds since the epoch.
    """

    user: str
    session: str
    token_id: str
    roles: tuple[str, ...]
    rooms: Mapping[str, str] | None
    issued_at: int
    expires_at: int


class TokenExpired(TokenRefused):
    """Age is all that is wrong with it: enough to end its session, and for nothing else."""

    def __init__(self, identity: Identity) -> None:
        super().__init__(ReplyCode.TOKEN_EXPIRED)
        self.identity = identity


def identify(
    header: Mapping[str, object],
    claims: Mapping[str, object],
    *,
    now: float,
    issuer: str,
    audience: str,
) -> Identity:
    """The identity behind a token of which nothing but the signature has been verified.

    Raises TokenExpired if age is all that is wrong with it, else TokenRefused with
    TOKEN_INVALID, whose ``__cause__`` is a ValueError that names the part at fault.
    """
    try:
        _check_header(header)
        _check_parties(claims, issuer, audience)
        issued_at, expires_at = _times(claims, now)
        identity = Identity(
            user=_text("sub", claims.get("sub"), _ID),
            session=_text("sid", claims.get("sid"), _ID),
            token_id=_text("jti", claims.get("jti"), _ID),
            roles=_roles(claims.get("roles")),
            rooms=_rooms(claims["rooms"]) if "rooms" in claims else None,
            issued_at=issued_at,
            expires_at=expires_at,
        )
    except ValueError as fault:
        raise TokenRefused(ReplyCode.TOKEN_INVALID) from fault
    if now >= expires_at:
        raise TokenExpired(identity)
    return identity


def _check_header(header: Mapping[str, object]) -> None:
    # An exact set also refuses crit, b64, jku, x5u and zip, now and in later RFCs.
    if header.keys() != _HEADER_MEMBERS:
        raise ValueError("the header must have exactly alg, typ and kid")
    if header["alg"] != ALGORITHM or header["typ"] != TOKEN_TYPE:
        raise ValueError(f"alg must be {ALGORITHM} and typ {TOKEN_TYPE}")
    if not isinstance(header["kid"], str):
        raise ValueError("kid must be a string")


def _check_parties(claims: Mapping[str, object], issuer: str, audience: str) -> None:
    # Equality refuses a list of audiences as well: a token for others is not for us.
    if claims.get("iss") != issuer:
        raise ValueError("iss is another than ours")
    if claims.get("aud") != audience:
        raise ValueError("aud is another than ours")


def _times(claims: Mapping[str, object], now: float) -> tuple[int, int]:
    issued_at = _second("iat", claims.get("iat"))
    expires_at = _second("exp", claims.get("exp"))
    not_before = _second("nbf", claims.get("nbf", issued_at))
    if not 0 < expires_at - issued_at <= MAX_LIFETIME:
        raise ValueError(f"exp must be 1 to {MAX_LIFETIME} seconds after iat")
    if max(issued_at, not_before) > now + CLOCK_SKEW:
        raise ValueError("iat or nbf lies in the future")
    return issued_at, expires_at


def _second(name: str, value: object) -> int:
    # isinstance() would let a bool pass.
    if type(value) is int and 0 <= value <= _MAX_INTEGER:
        return value
    raise ValueError(f"{name} must be a whole number of seconds")


def _text(name: str, value: object, form: re.Pattern[str]) -> str:
    if isinstance(value, str) and form.fullmatch(value):
        return value
    raise ValueError(f"{name} must be a string of bounded length without control characters")


def _roles(value: object) -> tuple[str, ...]:
    if isinstance(value, list) and len(value) <= MAX_ROLES:
        return tuple([_text("roles", role, _ROLE) for role in value])
    raise ValueError(f"roles must be a list of at most {MAX_ROLES} strings")


def _rooms(value: object) -> dict[str, str]:
    if isinstance(value, dict) and len(value) <= MAX_ROOMS:
        # A copy: what the caller does to its claims later must not change an identity.
        return {_room_pattern(pattern): _rights(rights) for pattern, rights in value.items()}
    raise ValueError(f"rooms must be an object of at most {MAX_ROOMS} entries")


def _room_pattern(value: object) -> str:
    if isinstance(value, str) and _ROOM_PATTERN.fullmatch(value):
        return value
    raise ValueError("a key of rooms must be a room name, or a prefix of one and a *")


def _rights(value: object) -> str:
    if isinstance(value, str) and value in _RIGHTS:
        return value
    raise ValueError("a value of rooms must be distinct letters of rwm")

"""Every way to say no: reply errors, refused handshakes, disconnects.

The tables of protocol.md, sections 1, 2 and 4. What is not in here is never sent.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum


class ReplyCode(StrEnum):
    """Codes of an ``error`` frame. None of them closes the connection by itself."""

    INVALID = "invalid"
    UNKNOWN_TYPE = "unknown_type"
    FORBIDDEN = "forbidden"
    NOT_FOUND = "not_found"
    RATE_LIMITED = "rate_limited"
    TOO_LARGE = "too_large"
    ROOM_LIMIT = "room_limit"
    TOKEN_INVALID = "token_invalid"
    TOKEN_EXPIRED = "token_expired"
    TOKEN_REVOKED = "token_revoked"
    IDENTITY_MISMATCH = "identity_mismatch"
    UNAVAILABLE = "unavailable"
    INTERNAL = "internal"


MESSAGES: dict[ReplyCode, str] = {
    ReplyCode.INVALID: "The command is not well formed; see path.",
    ReplyCode.UNKNOWN_TYPE: "This server does not know a command of this type.",
    ReplyCode.FORBIDDEN: "The token gives no such right in this room.",
    ReplyCode.NOT_FOUND: "There is no such thing.",
    ReplyCode.RATE_LIMITED: "Too many commands; wait retry_after milliseconds.",
    ReplyCode.TOO_LARGE: "The event is too large.",
    ReplyCode.ROOM_LIMIT: "This connection has joined as many rooms as it may; leave one first.",
    ReplyCode.TOKEN_INVALID: "The token is not valid; get a new one.",
    ReplyCode.TOKEN_EXPIRED: "The token has expired; get a new one and refresh.",
    ReplyCode.TOKEN_REVOKED: "The token was revoked; log in again.",
    ReplyCode.IDENTITY_MISMATCH: "The token is of another user or session, or an older one.",
    ReplyCode.UNAVAILABLE: "The outcome is unknown or nothing was stored; repeat it, same key.",
    ReplyCode.INTERNAL: "The server failed to carry this out.",
}


class TokenRefused(Exception):
    """A token was not accepted. ``code`` is all that may be told about why."""

    def __init__(self, code: ReplyCode) -> None:
        assert code in (
            ReplyCode.TOKEN_INVALID,
            ReplyCode.TOKEN_EXPIRED,
            ReplyCode.TOKEN_REVOKED,
        )
        super().__init__(code.value)
        self.code = code


class StoreUnavailable(Exception):
    """The store did not answer, or refused: whether a write took effect is unknown."""


class StoreRefused(StoreUnavailable):
    """The store answers, and will not do it: it is full, loading, or a replica."""


@dataclass(frozen=True, slots=True)
class Disconnect:
    """Why the server closes a connection. From 4500 on a client must not come back."""

    code: int
    reason: str

    @property
    def reconnect(self) -> bool:
        return self.code < 4500


DRAINING = Disconnect(1012, "draining")
OVERLOADED = Disconnect(1013, "overloaded")
SERVER_ERROR = Disconnect(1011, "server error")
NOT_TEXT = Disconnect(1007, "text that is not UTF-8")
MESSAGE_TOO_BIG = Disconnect(1009, "message too big")
TOKEN_EXPIRED = Disconnect(4401, "token_expired")
NO_PONG = Disconnect(4408, "no_pong")
RATE_LIMITED = Disconnect(4429, "rate_limited")
SLOW_CONSUMER = Disconnect(4430, "slow_consumer")
BAD_FRAME = Disconnect(4500, "bad_frame")
SESSION_REVOKED = Disconnect(4503, "session_revoked")
SUPERSEDED = Disconnect(4505, "superseded")


@dataclass(frozen=True, slots=True)
class Refusal:
    """A handshake that ends before the upgrade: an HTTP status and its JSON body."""

    status: int
    code: str
    message: str


BAD_REQUEST = Refusal(400, "bad_request", "This is not a valid request.")
NOT_A_NAME = Refusal(
    400, "bad_request", "A name has 1 to 128 characters, none of them a control character."
)
TOKEN_IN_URL = Refusal(
    400, "token_in_url", "A URL ends up in logs: send the token in a header or a sub-protocol."
)
AMBIGUOUS_CREDENTIALS = Refusal(
    400, "ambiguous_credentials", "Send exactly one token, in one place."
)
UNSUPPORTED_VERSION = Refusal(400, "unsupported_version", "This server speaks chat.v1.")
TOKEN_MISSING = Refusal(401, "token_missing", "Send a token.")
ORIGIN_DENIED = Refusal(403, "origin_denied", "Pages of this origin may not connect.")
HTTPS_REQUIRED = Refusal(403, "https_required", "Connect over TLS.")
NOT_FOUND = Refusal(404, "not_found", "There is nothing at this path.")
METHOD_NOT_ALLOWED = Refusal(405, "method_not_allowed", "This path has no such method.")
URI_TOO_LONG = Refusal(414, "bad_request", "The request line is too long.")
UPGRADE_REQUIRED = Refusal(426, "upgrade_required", "The token is good; connect by WebSocket.")
HEADERS_TOO_LARGE = Refusal(431, "bad_request", "The headers are too long or too many.")
TOO_MANY_CONNECTIONS = Refusal(
    429, "too_many_connections", "As many connections are open as there may be."
)
TOO_MANY_HANDSHAKES = Refusal(429, "rate_limited", "Too many handshakes from this address.")
TOO_MANY_ROTATIONS = Refusal(
    429, "rate_limited", "This token was used too often; use the one that it was traded for."
)
UNAVAILABLE = Refusal(503, "unavailable", "Revocations cannot be checked right now.")
HOST_DRAINING = Refusal(503, "draining", "This host is going away.")
HANDSHAKES_IN_FLIGHT = Refusal(503, "overloaded", "Too many handshakes are in flight.")

TOKEN_REFUSALS: dict[ReplyCode, Refusal] = {
    code: Refusal(401, code.value, MESSAGES[code])
    for code in (ReplyCode.TOKEN_INVALID, ReplyCode.TOKEN_EXPIRED, ReplyCode.TOKEN_REVOKED)
}

"""What holds a token does not show it: reprs end up in logs and in tracebacks."""

from __future__ import annotations

import pytest

from chatserver.core.effects import Verify
from chatserver.core.frames import Refresh, parse_command
from chatserver.core.handshake import Attempt, Deposit, Request, TokenRoute
from chatserver.store.keyring import Keyring
from chatserver.store.refresh import RefreshTokens
from chatserver.store.sessions import TokenPair

TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
SECRET = b"not for anybody to see, 0123456789abcdef"


@pytest.mark.parametrize(
    "holder",
    [
        Attempt(TOKEN, "203.0.113.7", None, True, None),
        Deposit(TokenRoute.REFRESH, TOKEN, "203.0.113.7", None),
        Request("GET", f"/v1/ws?x={TOKEN}", {"authorization": [TOKEN]}, "203.0.113.7", True),
        Verify(1, TOKEN),
        Refresh(token=TOKEN),
        parse_command(b'{"type":"refresh","id":1,"token":"%b"}' % TOKEN.encode()),
        TokenPair(TOKEN, TOKEN, "s", 1, 2),
        Keyring(SECRET, previous=SECRET + b"1"),
        RefreshTokens(SECRET, SECRET + b"1"),
    ],
    ids=lambda holder: type(holder).__name__,
)
def test_a_token_or_secret_is_in_no_repr(holder: object) -> None:
    for text in (repr(holder), str(holder), repr([holder])):
        assert TOKEN not in text
        assert SECRET.decode() not in text

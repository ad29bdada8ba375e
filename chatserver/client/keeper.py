"""A session's two tokens, kept fresh over HTTP by the rules of the protocol's page on tokens.

The refresh token is traded for the next pair; whoever trades one twice loses the session, but for
an answer that was lost on its way. So: one trade at a time, the new pair is saved before anything
of it is used, and what was not answered is asked again with the same token.
"""

from __future__ import annotations

import asyncio
import http.client
import itertools
import ssl
import time
import urllib.error
import urllib.request
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, Self
from urllib.parse import urlsplit, urlunsplit

import msgspec

from .backoff import full_jitter
from .errors import ChatError, DisconnectedError, RefusedError, TokenRefusedError
from .flight import Flight
from .link import LOOPBACK, check_url, default_tls, read_refusal

# A lost answer is given again for 10 s after the trade, five times at most.
LEEWAY_SECONDS = 10.0
TRIES = 5
TRY_SECONDS = 4.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 4.0
# A token that ends sooner is not worth handing out.
LEAST_SECONDS = 5.0
ANSWER_BYTES = 65536

Save = Callable[["TokenPair"], Awaitable[None] | None]


class TokenPair(msgspec.Struct, frozen=True):
    """What a login and each trade give. Times are in milliseconds since the Unix epoch."""

    access_token: str
    refresh_token: str
    session: str
    expires_at: int
    refresh_expires_at: int

    def __repr__(self) -> str:
        return f"<TokenPair of {self.session}>"

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read a login's answer, or what `to_json` gave. Raises ValueError."""
        return msgspec.json.decode(text, type=cls)

    def to_json(self) -> str:
        """As the server gives it. It is a secret: keep it as one."""
        return msgspec.json.encode(self).decode()


class TokenKeeper:
    """Gives fresh access tokens of one session: ``connect(url, token=TokenKeeper(…))``.

    ``url`` is the WebSocket's; the tokens are traded on the same host. ``save`` is called,
    and awaited if there is anything to await, with each new pair before it is used: keep it
    durably, and begin with the last one that was saved.
    What it raises comes out of the call, and it is called again by the next one.

    Calling it raises `TokenRefusedError` when the session is over, from then on without asking:
    log in again. Any other `ChatError` will pass. One keeper for each session; clients may share
    it.
    """

    def __init__(
        self, url: str, pair: TokenPair, *, save: Save, tls: ssl.SSLContext | None = None
    ) -> None:
        check_url(url)
        self.pair = pair
        """The latest that was saved."""
        self._url = _refresh_url(url)
        self._save = save
        self._tls = tls
        self._unsaved: TokenPair | None = None
        self._given = ""
        self._over: TokenRefusedError | None = None
        self._flight = Flight(self._trade)

    def __repr__(self) -> str:
        return f"<TokenKeeper of {self.pair.session}>"

    async def __call__(self) -> str:
        """An access token that was not given before: of the pair at hand, or of the next one."""
        if self._over is not None:
            raise self._over.with_traceback(None)
        pair = self.pair
        if pair.access_token == self._given or pair.expires_at / 1000 < time.time() + LEAST_SECONDS:
            pair = await self._flight.join()
        self._given = pair.access_token
        return pair.access_token

    async def close(self) -> None:
        """Wait until a trade that is under way has been saved. A client that has it for its
        ``token`` does so when it is closed."""
        await self._flight.close(cancel=False)

    async def _trade(self) -> TokenPair:
        pair = self._unsaved or await self._insist()
        self._unsaved = pair
        saving = self._save(pair)
        if saving is not None:
            await saving
        self.pair, self._unsaved = pair, None
        return pair

    async def _insist(self) -> TokenPair:
        """Trade the refresh token, with the same one again when there is no answer."""
        for attempt in itertools.count(1):
            try:
                return await asyncio.to_thread(self._post)
            except TokenRefusedError as exc:
                # Shown once more, it could only be taken for a stolen one.
                self._over = exc
                raise
            except ChatError as exc:
                told = getattr(exc, "retry_after", None)
                wait = full_jitter(attempt - 1, FIRST_WAIT, LONGEST_WAIT)
                if told is not None:
                    wait = max(wait, told / 1000)
                if exc.final or attempt == TRIES or wait > LONGEST_WAIT:
                    raise
                await asyncio.sleep(wait)
        raise AssertionError

    def _post(self) -> TokenPair:
        """One request. Raises `RefusedError` and `DisconnectedError`."""
        request = urllib.request.Request(
            self._url,
            headers={"Authorization": f"Bearer {self.pair.refresh_token}"},
            method="POST",
        )
        try:
            with _opener(self._url, self._tls).open(request, timeout=TRY_SECONDS) as answer:
                return TokenPair.from_json(answer.read(ANSWER_BYTES))
        except urllib.error.HTTPError as exc:
            with exc:
                _refuse(exc)
        except msgspec.ValidationError as exc:
            raise DisconnectedError(1002, f"no tokens in the answer: {exc}") from None
        except (OSError, http.client.HTTPException, msgspec.DecodeError) as exc:
            raise DisconnectedError(1006, f"no tokens: {exc}") from exc


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A token goes where it was sent, and nowhere else."""

    def redirect_request(self, *_: Any) -> None:
        return None


def _opener(url: str, tls: ssl.SSLContext | None) -> urllib.request.OpenerDirector:
    handlers: list[urllib.request.BaseHandler] = [_NoRedirect()]
    if url.startswith("https:"):
        handlers.append(urllib.request.HTTPSHandler(context=tls or default_tls()))
    if urlsplit(url).hostname in LOOPBACK:
        handlers.append(urllib.request.ProxyHandler({}))
    return urllib.request.build_opener(*handlers)


def _refuse(answer: urllib.error.HTTPError) -> NoReturn:
    code, message, after = read_refusal(
        answer.read(ANSWER_BYTES), answer.headers.get("Retry-After"), answer.reason
    )
    kind = TokenRefusedError if answer.code == 401 else RefusedError
    raise kind(answer.code, code, message, after)


def _refresh_url(url: str) -> str:
    """Beside the WebSocket: ``wss://host/v1/ws`` → ``https://host/v1/tokens/refresh``."""
    parts = urlsplit(url)
    scheme = "https" if parts.scheme == "wss" else "http"
    path = parts.path.removesuffix("/ws") + "/tokens/refresh"
    return urlunsplit((scheme, parts.netloc, path, "", ""))

"""The control API's door: nobody without the key, and nothing that is not bounded, strict JSON."""

from __future__ import annotations

import asyncio
import hashlib
import hmac

import orjson
from fastapi.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from chatserver.control.answers import fault

REQUEST_BYTES = 1_048_576
BODY_SECONDS = 2.0
"""How long a body may take. Revoking takes three seconds more, and stopping waits for five."""
_WITH_BODY = ("POST", "PATCH")
_GUARDED = ("/v1", "/metrics")


class Door:
    """Outside of everything: the key, and a body that is bounded and strict JSON.

    Where a request has no meaning for a body, it is read and not looked at.
    """

    def __init__(self, app: ASGIApp, key: bytes) -> None:
        self._app = app
        self._key = hashlib.sha256(key).digest()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return

        async def unkept(message: Message) -> None:
            """FastAPI's own pages are not to be kept, either."""
            if message["type"] == "http.response.start":
                rest = [pair for pair in message["headers"] if pair[0] != b"cache-control"]
                message["headers"] = [*rest, (b"cache-control", b"no-store")]
            await send(message)

        refusal, body = await self._admit(scope, receive)
        if refusal is not None:
            await refusal(scope, receive, send)
            return
        told = False

        async def again() -> Message:
            nonlocal told
            if told:
                return await receive()
            told = True
            return {"type": "http.request", "body": body, "more_body": False}

        # Whatever a client calls it, it is JSON: curl -d says it was a form.
        headers = [pair for pair in scope["headers"] if pair[0] != b"content-type"]
        headers.append((b"content-type", b"application/json"))
        await self._app({**scope, "headers": headers}, again, unkept)

    async def _admit(self, scope: Scope, receive: Receive) -> tuple[Response | None, bytes]:
        if scope["path"].startswith(_GUARDED) and not self._knows_key(scope):
            return fault(401, WWW_Authenticate="Bearer"), b""
        try:
            async with asyncio.timeout(BODY_SECONDS):
                body = await _whole(receive)
        except TimeoutError:
            return fault(408, Connection="close"), b""
        if len(body) > REQUEST_BYTES:
            return fault(413, Connection="close"), b""
        if body and scope["method"] in _WITH_BODY:
            try:
                orjson.loads(body)
            except orjson.JSONDecodeError:
                return fault(400, "The body is not JSON (RFC 8259).", "$"), b""
        return None, body

    def _knows_key(self, scope: Scope) -> bool:
        given = [value for name, value in scope["headers"] if name == b"authorization"]
        scheme, _, key = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
        digest = hashlib.sha256(key.strip()).digest()
        # Of the digests, so that not even the length shows in the time.
        return hmac.compare_digest(digest, self._key) and scheme.lower() == b"bearer"


async def _whole(receive: Receive) -> bytes:
    """The body, or a little more of it than is allowed."""
    body = bytearray()
    more = True
    while more and len(body) <= REQUEST_BYTES:
        message = await receive()
        body += message.get("body", b"")
        more = message.get("more_body", False)
    return bytes(body)

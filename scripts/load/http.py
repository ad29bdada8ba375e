"""One POST at a time: tokens are traded and sessions revoked over HTTP."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Mapping
from http.client import HTTPException, HTTPResponse
from io import BytesIO
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import orjson

DEADLINE = 10.0


class Answer(NamedTuple):
    status: int
    body: dict[str, Any]
    retry_after: float | None
    """Seconds."""


class _Received:
    """What HTTPResponse wants for a socket."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    def makefile(self, mode: str) -> BytesIO:
        return BytesIO(self._data)


async def post(
    base: str,
    path: str,
    bearer: str,
    body: Mapping[str, object] | None = None,
    *,
    source: str | None = None,
) -> Answer:
    """``base`` is a URL without a path, ``source`` the address to call from.

    Raises OSError (TimeoutError is one) if there is no answer.
    """
    url = urlsplit(base)
    secure = url.scheme == "https"
    content = b"" if body is None else orjson.dumps(body)
    request = (
        f"POST {path} HTTP/1.1\r\nHost: {url.netloc}\r\nAuthorization: Bearer {bearer}\r\n"
        f"Connection: close\r\nContent-Length: {len(content)}\r\n"
        + ("Content-Type: application/json\r\n" if content else "")
        + "\r\n"
    )
    async with asyncio.timeout(DEADLINE):
        reader, writer = await asyncio.open_connection(
            url.hostname,
            url.port or (443 if secure else 80),
            ssl=ssl.create_default_context() if secure else None,
            local_addr=(source, 0) if source else None,
        )
        try:
            writer.write(request.encode() + content)
            return _answer(await reader.read(-1))
        finally:
            writer.close()


def _answer(data: bytes) -> Answer:
    response = HTTPResponse(_Received(data))  # type: ignore[arg-type]
    try:
        response.begin()
        body = orjson.loads(response.read() or b"{}")
    except (HTTPException, ValueError) as error:
        raise OSError(f"this is no answer in JSON over HTTP: {data[:80]!r}") from error
    after = response.getheader("Retry-After", "")
    return Answer(
        response.status,
        body if isinstance(body, dict) else {},
        float(after) if after.isdigit() else None,
    )

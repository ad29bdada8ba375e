"""HTTP answers: the 101, the page's files, JSON bodies; nothing tells what software sent them."""

from __future__ import annotations

import http
from importlib.resources import files

import orjson
from websockets.datastructures import Headers
from websockets.http11 import Response

from chatserver.core.errors import Refusal

_MEDIA_TYPES = {
    "html": "text/html; charset=utf-8",
    "css": "text/css; charset=utf-8",
    "js": "text/javascript; charset=utf-8",
    "svg": "image/svg+xml",
}
# Nothing from elsewhere, nothing inline, no text that becomes markup, in nobody's frame.
_PAGE_HEADERS = {
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self'; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}

# RFC 6455 section 4.4: to whoever speaks another one.
_VERSION = {"Sec-WebSocket-Version": "13"}


def switch(key: str, subprotocol: str | None, extensions: str | None) -> bytes:
    """The 101 that ends a handshake (RFC 6455 section 4.2.2); the connection goes on after it."""
    chosen = "" if subprotocol is None else f"Sec-WebSocket-Protocol: {subprotocol}\r\n"
    agreed = "" if extensions is None else f"Sec-WebSocket-Extensions: {extensions}\r\n"
    return (
        "HTTP/1.1 101 Switching Protocols\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        f"Sec-WebSocket-Accept: {key}\r\n{chosen}{agreed}\r\n"
    ).encode()


def answer(status: int, body: dict[str, object], headers: dict[str, str]) -> Response:
    """A whole response; the connection ends after it."""
    payload = orjson.dumps(body) + b"\n"
    return _response(
        status, payload, {"Content-Type": "application/json"} | _length(payload) | headers
    )


def asset(name: str) -> Response:
    """A file of the page. It is read each time, so that an edit shows when the page is loaded."""
    payload = (files("chatserver") / "web" / name).read_bytes()
    kind = {"Content-Type": _MEDIA_TYPES[name.rpartition(".")[2]]}
    return _response(200, payload, kind | _length(payload) | _PAGE_HEADERS)


def _response(status: int, payload: bytes, headers: dict[str, str]) -> Response:
    fields = {"Connection": "close", "Cache-Control": "no-store"}
    return Response(status, http.HTTPStatus(status).phrase, Headers(fields | headers), payload)


def _length(payload: bytes) -> dict[str, str]:
    return {"Content-Length": str(len(payload))}


def refuse(
    refusal: Refusal,
    *,
    origin: str | None = None,
    retry_after: int | None = None,
    token_given: bool = False,
    allowed: str = "GET",
) -> Response:
    """A refused request. ``origin``: the page that may read why. ``retry_after`` in seconds."""
    headers = cors(origin)
    match refusal.status:
        case 401:
            # RFC 6750 section 3.1: the error only when a token came along.
            detail = ' error="invalid_token"' if token_given else ""
            headers["WWW-Authenticate"] = f"Bearer{detail}"
        case 405:
            headers["Allow"] = allowed
        case 400:
            headers |= _VERSION
        case 426:
            headers |= {"Upgrade": "websocket"} | _VERSION
        case _:
            pass
    if retry_after is not None:
        headers["Retry-After"] = str(retry_after)
    body: dict[str, object] = {"error": {"code": refusal.code, "message": refusal.message}}
    return answer(refusal.status, body, headers)


def cors(origin: str | None) -> dict[str, str]:
    if origin is None:
        return {}
    return {
        "Access-Control-Allow-Origin": origin,
        "Access-Control-Expose-Headers": "Retry-After, WWW-Authenticate",
        "Vary": "Origin",
    }


def preflight(origin: str, allowed: str) -> Response:
    """The answer to a browser that asks whether it may send a token (Fetch, CORS preflight)."""
    headers = cors(origin) | {
        "Access-Control-Allow-Methods": allowed,
        "Access-Control-Allow-Headers": "Authorization",
        "Access-Control-Max-Age": "600",
    }
    return _response(204, b"", headers)  # without a length: RFC 9110 section 8.6


def health(healthy: bool, body: dict[str, object]) -> Response:
    return answer(200 if healthy else 503, body, {})

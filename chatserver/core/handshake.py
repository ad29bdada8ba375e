"""One HTTP request: what it asks for, and whether it may.

protocol.md section 1, in the order that gives nothing away: what is malformed, then where it
comes from, and only then the token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import NamedTuple
from urllib.parse import parse_qs, parse_qsl, unquote

from chatserver.core import errors
from chatserver.core.errors import Refusal

SUBPROTOCOL = "chat.v1"
_BEARER = "bearer."
_TOKEN_NAMES = {"token", "access_token", "refresh_token", "bearer", "authorization", "auth", "jwt"}
_LOOKS_LIKE_TOKEN = re.compile(r"eyJ[\w-]+\.[\w-]+\.[\w-]*|rt1\.[\w-]+\.")
_HOST = re.compile(r"[A-Za-z0-9._~-]+(:[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](:[0-9]{1,5})?")
_HOP = re.compile(r"^(?:\[([^]]*)\](?::[0-9]+)?|([0-9.]+):[0-9]+)$", re.ASCII)
"""An address with the port behind it, as some proxies write it."""
LOOPBACK_NAMES = {"localhost", "127.0.0.1", "::1"}
_LOOPBACK_ORIGIN = re.compile(r"https?://(localhost|127\.0\.0\.1|\[::1\])(:[0-9]{1,5})?")

Network = IPv4Network | IPv6Network


class Request(NamedTuple):
    """A parsed request line and headers; ``target`` with its query."""

    method: str
    target: str
    headers: Mapping[str, Sequence[str]]
    """Each one's values, by its name in lower case."""
    peer: str
    """Address of the socket's other end."""
    tls: bool

    def __repr__(self) -> str:
        return f"<Request {self.method} peer={self.peer!r}>"

    def all(self, name: str) -> Sequence[str]:
        return self.headers.get(name, ())


@dataclass(frozen=True, slots=True)
class Policy:
    """What the operator allows. ``origins`` None: pages served from this machine itself."""

    origins: frozenset[str] | None = None
    https_required: bool = False
    trusted_proxies: tuple[Network, ...] = field(default=())
    page: bool = False
    """Show the page to this machine's browsers, and let them log in by a name: development."""


class Health(NamedTuple):
    """GET /healthz, or with ``ready`` GET /readyz."""

    ready: bool


class Preflight(NamedTuple):
    """A browser asks whether it may ask."""

    origin: str
    allowed: str
    """The method that the path has."""


class Attempt(NamedTuple):
    """Somebody wants to connect, or asks why they could not."""

    token: str
    address: str
    """The client's, for counting; the proxy's word for it if the proxy is trusted."""
    origin: str | None
    """Allowed already."""
    upgrade: bool
    subprotocol: str | None

    def __repr__(self) -> str:
        return f"<Attempt address={self.address!r} origin={self.origin!r}>"


class TokenRoute(StrEnum):
    """What can be done with a token over HTTP: protocol.md, section 6."""

    REFRESH = "/v1/tokens/refresh"
    REVOKE = "/v1/tokens/revoke"


class Deposit(NamedTuple):
    """Somebody hands in a token, to be traded or to be ended."""

    route: TokenRoute
    token: str
    address: str
    origin: str | None

    def __repr__(self) -> str:
        return f"<Deposit route={self.route} address={self.address!r} origin={self.origin!r}>"


class Asset(NamedTuple):
    """A file of the page, by its name in ``chatserver/web``."""

    name: str


class Login(NamedTuple):
    """Somebody on this machine says who they are, and in development is believed."""

    user: str
    address: str
    origin: str | None

    @property
    def route(self) -> str:
        return _LOGIN


class Refused(NamedTuple):
    refusal: Refusal
    origin: str | None = None
    """The page that may read the answer."""
    allowed: str = "GET"
    """The method that the path has."""


Judgement = Health | Preflight | Attempt | Deposit | Asset | Login | Refused


_SOCKET = "/v1/ws"
_METHODS: dict[str, str] = {_SOCKET: "GET"} | {str(route): "POST" for route in TokenRoute}
_ASSETS = {"/": "index.html"} | {
    f"/{name}": name for name in ("page.css", "page.js", "chat.js", "icon.svg")
}
_LOGIN = "/dev/sessions"


def judge(request: Request, policy: Policy) -> Judgement:
    """What to answer; a token that comes along is still to be verified."""
    path, _, query = request.target.partition("?")
    if path not in (*_METHODS, "/healthz", "/readyz"):
        return _at_the_page(request, path, query, policy)
    hosts = request.all("host")
    if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
        return Refused(errors.BAD_REQUEST)
    if path not in _METHODS:
        if request.method not in ("GET", "HEAD"):
            return Refused(errors.METHOD_NOT_ALLOWED)
        return Health(ready=path == "/readyz")
    if not _secure(request, policy):
        return Refused(errors.HTTPS_REQUIRED)
    origin = _origin(request, policy)
    if isinstance(origin, Refused):
        return origin
    allowed = _METHODS[path]
    if request.method == "OPTIONS" and origin is not None:
        return Preflight(origin, allowed)
    if request.method != allowed:
        return Refused(errors.METHOD_NOT_ALLOWED, origin, allowed)
    if _holds_token(query):
        return Refused(errors.TOKEN_IN_URL, origin)
    if path == _SOCKET:
        return _attempt(request, policy, origin)
    return _deposit(TokenRoute(path), request, policy, origin)


def _origin(request: Request, policy: Policy) -> str | Refused | None:
    """The page that asks, if one does and may."""
    origins = request.all("origin")
    if len(origins) > 1:
        return Refused(errors.BAD_REQUEST)
    if origins and not _allowed(origins[0], policy):
        return Refused(errors.ORIGIN_DENIED)
    return origins[0] if origins else None


def _at_the_page(
    request: Request, path: str, query: str, policy: Policy
) -> Asset | Login | Refused:
    """What development offers beyond the protocol, to the browsers of this machine alone."""
    asset = _ASSETS.get(path)
    offered = policy.page and (asset is not None or path == _LOGIN)
    # Who wants to upgrade is no browser that looks for a page, but lost.
    if not offered or request.all("upgrade") or not _at_home(request, policy):
        return Refused(errors.NOT_FOUND)
    origin = _origin(request, policy)
    if isinstance(origin, Refused):
        return origin
    allowed = "GET" if asset else "POST"
    if request.method != allowed:
        return Refused(errors.METHOD_NOT_ALLOWED, origin, allowed)
    if asset is not None:
        return Asset(asset)
    try:
        [user] = parse_qs(query, errors="strict")["user"]
    except (KeyError, ValueError):
        return Refused(errors.NOT_A_NAME, origin)
    return Login(user, client_address(request, policy), origin)


def _at_home(request: Request, policy: Policy) -> bool:
    """Whether this machine asks, under a name whose pages may connect.

    A name that somebody else points here (DNS rebinding) is none.
    """
    peer = _parse_address(request.peer)
    if peer is None or not peer.is_loopback or _trusted(request.peer, policy):
        return False
    hosts = request.all("host")
    own = [f"{scheme}://{host.lower()}" for host in hosts for scheme in ("http", "https")]
    return len(hosts) == 1 and any(_allowed(origin, policy) for origin in own)


def _attempt(request: Request, policy: Policy, origin: str | None) -> Attempt | Refused:
    offered = [
        item.strip() for value in request.all("sec-websocket-protocol") for item in value.split(",")
    ]
    authorizations = request.all("authorization")
    tokens = [item[len(_BEARER) :] for item in offered if item.startswith(_BEARER)]
    if len(authorizations) + len(tokens) > 1:
        return Refused(errors.AMBIGUOUS_CREDENTIALS, origin)
    if offered and SUBPROTOCOL not in offered:
        return Refused(errors.UNSUPPORTED_VERSION, origin)
    tokens = _bearers(authorizations) or tokens
    if not any(tokens):
        return Refused(errors.TOKEN_MISSING, origin)
    return Attempt(
        token=tokens[0],
        address=client_address(request, policy),
        origin=origin,
        upgrade=bool(request.all("upgrade")),
        subprotocol=SUBPROTOCOL if offered else None,
    )


def _deposit(
    route: TokenRoute, request: Request, policy: Policy, origin: str | None
) -> Deposit | Refused:
    authorizations = request.all("authorization")
    if len(authorizations) > 1:
        return Refused(errors.AMBIGUOUS_CREDENTIALS, origin)
    tokens = _bearers(authorizations)
    if not any(tokens):
        return Refused(errors.TOKEN_MISSING, origin)
    return Deposit(route, tokens[0], client_address(request, policy), origin)


def _bearers(authorizations: Sequence[str]) -> list[str]:
    """The tokens in ``Authorization`` headers (RFC 6750 section 2.1)."""
    parts = [authorization.partition(" ") for authorization in authorizations]
    return [token.strip(" ") for scheme, _, token in parts if scheme.lower() == "bearer"]


def _holds_token(query: str) -> bool:
    if not query:
        return False
    names = {name.lower().replace("-", "_") for name, _ in parse_qsl(query, keep_blank_values=True)}
    return bool(names & _TOKEN_NAMES) or bool(_LOOKS_LIKE_TOKEN.search(unquote(query)))


def client_address(request: Request, policy: Policy) -> str:
    """Who is behind the request: the nearest address that no trusted proxy owns.

    Of an IPv6 address the /64, which is what one subscriber gets.
    """
    address = request.peer
    hops = [hop for value in request.all("x-forwarded-for") for hop in value.split(",")]
    while hops and _trusted(address, policy):
        address = _HOP.sub(r"\1\2", hops.pop().strip())
    if address is request.peer and ":" not in address:
        return address  # an IPv4 address, as the kernel writes it
    parsed = _parse_address(address)
    if parsed is None:
        return request.peer
    return str(ip_network((parsed, 64), strict=False) if parsed.version == 6 else parsed)


def _secure(request: Request, policy: Policy) -> bool:
    if _trusted(request.peer, policy):
        said = [value.strip().lower() for value in request.all("x-forwarded-proto")]
        # Traefik for one says wss of an upgrade.
        return said in (["https"], ["wss"]) or (not said and not policy.https_required)
    return request.tls or not policy.https_required


def _trusted(address: str, policy: Policy) -> bool:
    if not policy.trusted_proxies:
        return False
    parsed = _parse_address(address)
    return parsed is not None and any(parsed in network for network in policy.trusted_proxies)


def _parse_address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        address = ip_address(text)
    except ValueError:
        return None
    # What a dual-stack socket calls an IPv4 peer; all of them share one /64.
    mapped = address.ipv4_mapped if isinstance(address, IPv6Address) else None
    return mapped or address


def _allowed(origin: str, policy: Policy) -> bool:
    if policy.origins is not None:
        return origin in policy.origins
    return _LOOPBACK_ORIGIN.fullmatch(origin) is not None

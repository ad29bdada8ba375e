from __future__ import annotations

from ipaddress import ip_network

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chatserver.core import errors
from chatserver.core.errors import Refusal
from chatserver.core.handshake import (
    Asset,
    Attempt,
    Deposit,
    Health,
    Judgement,
    Login,
    Policy,
    Preflight,
    Refused,
    Request,
    TokenRoute,
    client_address,
    judge,
)

Headers = list[tuple[str, str]]

TOKEN = "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiJhIn0.c2lnbmF0dXJl"
BEARER = ("Authorization", f"Bearer {TOKEN}")
UPGRADE = ("Upgrade", "websocket")
HOST = ("Host", "chat.example")
ORIGIN = "https://app.example"
PEER = "203.0.113.7"

OPEN = Policy()
STRICT = Policy(
    origins=frozenset({ORIGIN}),
    https_required=True,
    trusted_proxies=(ip_network("10.0.0.0/8"), ip_network("fd00::/8")),
)


def by_name(headers: Headers) -> dict[str, list[str]]:
    grouped: dict[str, list[str]] = {}
    for name, value in headers:
        grouped.setdefault(name.lower(), []).append(value)
    return grouped


def ask(
    *headers: tuple[str, str],
    method: str = "GET",
    target: str = "/v1/ws",
    host: Headers | None = None,
    peer: str = PEER,
    tls: bool = True,
    policy: Policy = STRICT,
) -> Judgement:
    hosts = [HOST] if host is None else host
    return judge(Request(method, target, by_name([*hosts, *headers]), peer, tls), policy)


def refused(judgement: Judgement) -> Refusal:
    assert isinstance(judgement, Refused)
    return judgement.refusal


def attempt(judgement: Judgement) -> Attempt:
    assert isinstance(judgement, Attempt)
    return judgement


# --- credentials ---------------------------------------------------------------------------


def test_a_bearer_header_is_a_credential() -> None:
    judgement = ask(UPGRADE, BEARER)

    assert judgement == Attempt(
        token=TOKEN, address=PEER, origin=None, upgrade=True, subprotocol=None
    )


def test_a_subprotocol_is_a_credential_and_only_the_version_is_selected() -> None:
    judgement = ask(
        UPGRADE, ("Sec-WebSocket-Protocol", f"chat.v1, bearer.{TOKEN}"), ("Origin", ORIGIN)
    )

    assert judgement == Attempt(
        token=TOKEN, address=PEER, origin=ORIGIN, upgrade=True, subprotocol="chat.v1"
    )


@pytest.mark.parametrize(
    "lines",
    [
        [f"chat.v1,bearer.{TOKEN}"],
        [f"bearer.{TOKEN}, chat.v1"],
        ["chat.v1", f"bearer.{TOKEN}"],
        [f"bearer.{TOKEN}", "chat.v1"],
        [f"chat.v2 ,\t chat.v1 , bearer.{TOKEN} "],
        ["chat.v2, chat.v1", f"other,bearer.{TOKEN}"],
    ],
)
def test_subprotocols_may_be_split_over_lines_and_commas(lines: list[str]) -> None:
    found = attempt(ask(UPGRADE, *[("sec-websocket-protocol", line) for line in lines]))

    assert found.token == TOKEN
    assert found.subprotocol == "chat.v1"


def test_a_header_token_goes_with_an_offered_version() -> None:
    found = attempt(ask(UPGRADE, BEARER, ("Sec-WebSocket-Protocol", "chat.v1")))

    assert found.token == TOKEN
    assert found.subprotocol == "chat.v1"


@pytest.mark.parametrize("offer", ["chat.v2", "", "CHAT.V1", "chat.v10", f"bearer.{TOKEN}"])
def test_an_offer_without_our_version_is_unsupported(offer: str) -> None:
    headers = [] if "bearer" in offer else [BEARER]

    judgement = ask(UPGRADE, *headers, ("Sec-WebSocket-Protocol", offer))

    assert refused(judgement) == errors.UNSUPPORTED_VERSION


@pytest.mark.parametrize("value", [f"bearer {TOKEN}", f"BEARER {TOKEN}", f"Bearer   {TOKEN}  "])
def test_the_scheme_is_told_in_any_case_and_with_any_spaces(value: str) -> None:
    assert attempt(ask(UPGRADE, ("authorization", value))).token == TOKEN


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [("Authorization", "")],
        [("Authorization", "Bearer")],
        [("Authorization", "Bearer ")],
        [("Authorization", f"Basic {TOKEN}")],
        [("Authorization", TOKEN)],
        [("Authorization", f"Bearer\t{TOKEN}")],
        [("Sec-WebSocket-Protocol", "chat.v1")],
        [("Sec-WebSocket-Protocol", "chat.v1, bearer.")],
        [("Sec-WebSocket-Protocol", f"chat.v1, Bearer.{TOKEN}")],
        [("Cookie", f"token={TOKEN}; access_token={TOKEN}; Authorization=Bearer {TOKEN}")],
        [("X-Authorization", f"Bearer {TOKEN}"), ("Proxy-Authorization", f"Bearer {TOKEN}")],
    ],
)
def test_without_a_credential_the_token_is_missing(headers: Headers) -> None:
    assert refused(ask(UPGRADE, *headers)) == errors.TOKEN_MISSING


@pytest.mark.parametrize("credential", ["not a token", "a,b", f"{TOKEN} {TOKEN}", "null"])
def test_whatever_is_presented_goes_to_verification_whole(credential: str) -> None:
    assert attempt(ask(UPGRADE, ("Authorization", f"Bearer {credential}"))).token == credential


@pytest.mark.parametrize(
    "headers",
    [
        [BEARER, BEARER],
        [BEARER, ("authorization", "Basic dTpw")],
        [BEARER, ("Sec-WebSocket-Protocol", f"chat.v1, bearer.{TOKEN}")],
        [BEARER, ("Sec-WebSocket-Protocol", "chat.v1, bearer.")],
        [("Sec-WebSocket-Protocol", f"chat.v1, bearer.{TOKEN}, bearer.{TOKEN}")],
        [
            ("Sec-WebSocket-Protocol", f"chat.v1, bearer.{TOKEN}"),
            ("Sec-WebSocket-Protocol", "bearer.another"),
        ],
    ],
)
def test_two_credentials_are_ambiguous(headers: Headers) -> None:
    assert refused(ask(UPGRADE, *headers)) == errors.AMBIGUOUS_CREDENTIALS


@pytest.mark.parametrize(
    "query",
    [
        f"token={TOKEN}",
        "token=opaque",
        "token=",
        "token",
        "a=b&token=opaque",
        "TOKEN=opaque",
        "access_token=opaque",
        "Access_Token=opaque",
        "refresh_token=opaque",
        "bearer=opaque",
        "authorization=Bearer+opaque",
        "auth=opaque",
        "jwt=opaque",
        "%74oken=opaque",
        "access%5Ftoken=opaque",
        TOKEN,
        f"bearer.{TOKEN}",
        f"x={TOKEN}",
        f"x=1;y={TOKEN}",
        f"x={TOKEN.rpartition('.')[0]}.",
        f"x={TOKEN.replace('.', '%2E')}",
        f"x=%65{TOKEN[1:]}",
    ],
)
@pytest.mark.parametrize("headers", [[], [BEARER]])
def test_a_token_in_the_query_is_refused_and_never_read(query: str, headers: Headers) -> None:
    assert refused(ask(UPGRADE, *headers, target=f"/v1/ws?{query}")) == errors.TOKEN_IN_URL


@pytest.mark.parametrize("query", ["", "v=1", "tokens=1", "x=eyJ", "room=token", "?", "a=b.c.d"])
def test_another_query_is_ignored(query: str) -> None:
    assert attempt(ask(UPGRADE, BEARER, target=f"/v1/ws?{query}")).token == TOKEN


def test_a_plain_get_is_told_from_an_upgrade() -> None:
    assert not attempt(ask(BEARER, ("Origin", ORIGIN))).upgrade
    assert attempt(ask(BEARER, ("UPGRADE", "websocket"))).upgrade


# --- paths and methods ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "target",
    [
        "//v1/ws",
        "/v1/ws/",
        "/v1//ws",
        "/v1/ws/..",
        "/../v1/ws",
        "/v1/./ws",
        "/v1/ws%00",
        "/v1/ws\0",
        "/v1/%77s",
        "/V1/WS",
        "/v2/ws",
        "/v1/ws#x",
        "/v1/ws;x",
        "/",
        "",
        "*",
        "?/v1/ws",
        "http://chat.example/v1/ws",
        "/etc/passwd",
        "/healthz/",
        f"/{TOKEN}",
    ],
)
def test_any_other_path_is_not_found(target: str) -> None:
    assert refused(ask(UPGRADE, BEARER, target=target)) == errors.NOT_FOUND


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "HEAD", "CONNECT", "get", ""])
def test_another_method_is_not_allowed(method: str) -> None:
    judgement = ask(BEARER, ("Origin", ORIGIN), method=method)

    assert judgement == Refused(errors.METHOD_NOT_ALLOWED, ORIGIN)


def test_a_preflight_is_answered_to_an_allowed_origin_without_a_token() -> None:
    assert ask(("Origin", ORIGIN), method="OPTIONS") == Preflight(ORIGIN, "GET")


def test_a_preflight_of_another_origin_is_denied() -> None:
    judgement = ask(("Origin", "https://evil.example"), method="OPTIONS")

    assert judgement == Refused(errors.ORIGIN_DENIED)


def test_options_without_an_origin_is_no_preflight() -> None:
    assert refused(ask(method="OPTIONS")) == errors.METHOD_NOT_ALLOWED


@pytest.mark.parametrize("method", ["GET", "HEAD"])
@pytest.mark.parametrize("tls", [True, False])
def test_health_is_told_to_anybody(method: str, tls: bool) -> None:
    assert ask(method=method, target="/healthz", tls=tls) == Health(ready=False)
    assert ask(method=method, target="/readyz?verbose", tls=tls) == Health(ready=True)


def test_health_is_only_read() -> None:
    assert refused(ask(method="POST", target="/readyz")) == errors.METHOD_NOT_ALLOWED


# --- hosts ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "host",
    [
        "chat.example",
        "chat.example:8443",
        "localhost",
        "127.0.0.1:8080",
        "[::1]",
        "[::1]:8080",
        "[2001:db8::192.0.2.1]:1",
        "chat_1.internal",
    ],
)
def test_a_host_is_a_name_or_an_address_and_perhaps_a_port(host: str) -> None:
    assert attempt(ask(UPGRADE, BEARER, host=[("host", host)]))


@pytest.mark.parametrize(
    "hosts",
    [
        [],
        [""],
        ["chat.example", "chat.example"],
        ["chat.example", "evil.example"],
        ["chat.example:"],
        ["chat.example:port"],
        ["chat.example:123456"],
        ["::1"],
        ["[::1"],
        ["[chat.example]"],
        ["chat.example/v1"],
        ["user@chat.example"],
        ["chat.example, evil.example"],
        ["chat.example\n"],
        ["chat example"],
        ["<script>"],
    ],
)
@pytest.mark.parametrize("target", ["/v1/ws", "/healthz"])
def test_a_missing_doubled_or_malformed_host_is_a_bad_request(
    hosts: list[str], target: str
) -> None:
    judgement = ask(UPGRADE, BEARER, target=target, host=[("Host", host) for host in hosts])

    assert judgement == Refused(errors.BAD_REQUEST)


# --- origins -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "https://evil.example",
        "http://app.example",
        "wss://app.example",
        "https://app.example:443",
        "https://app.example:8443",
        "https://app.example/",
        "https://app.example.evil.example",
        "https://app.example@evil.example",
        "https://evil.example/https://app.example",
        "https://evilapp.example",
        "https://sub.app.example",
        "https://app.examplе",  # the last letter is Cyrillic
        "https://app.example.",
        "https://APP.example",
        "https://app.example https://app.example",
        "https://app.example, https://evil.example",
        " https://app.example",
        "app.example",
        "*",
    ],
)
def test_only_the_exact_origin_is_allowed(origin: str) -> None:
    judgement = ask(UPGRADE, BEARER, ("Origin", origin))

    assert judgement == Refused(errors.ORIGIN_DENIED)


@pytest.mark.parametrize(
    "origins", [[ORIGIN, ORIGIN], [ORIGIN, "https://evil.example"], ["null", ORIGIN]]
)
def test_two_origin_headers_are_a_bad_request(origins: list[str]) -> None:
    judgement = ask(UPGRADE, BEARER, *[("Origin", origin) for origin in origins])

    assert judgement == Refused(errors.BAD_REQUEST)


def test_the_origin_is_judged_before_anything_about_the_token() -> None:
    evil = ("Origin", "https://evil.example")

    assert refused(ask(UPGRADE, evil)) == errors.ORIGIN_DENIED
    assert refused(ask(UPGRADE, evil, BEARER, BEARER)) == errors.ORIGIN_DENIED
    assert refused(ask(UPGRADE, evil, target=f"/v1/ws?token={TOKEN}")) == errors.ORIGIN_DENIED


@pytest.mark.parametrize(
    ("headers", "target", "refusal"),
    [
        ([], "/v1/ws", errors.TOKEN_MISSING),
        ([BEARER, BEARER], "/v1/ws", errors.AMBIGUOUS_CREDENTIALS),
        ([("Sec-WebSocket-Protocol", "chat.v9")], "/v1/ws", errors.UNSUPPORTED_VERSION),
        ([BEARER], "/v1/ws?token=x", errors.TOKEN_IN_URL),
    ],
)
def test_an_allowed_page_may_read_why_it_was_refused(
    headers: Headers, target: str, refusal: Refusal
) -> None:
    judgement = ask(("Origin", ORIGIN), *headers, target=target)

    assert judgement == Refused(refusal, ORIGIN)


@pytest.mark.parametrize(
    "origin",
    [
        "http://localhost",
        "http://localhost:3000",
        "https://localhost:3000",
        "http://127.0.0.1:8080",
        "http://[::1]:8080",
    ],
)
def test_without_a_list_pages_of_this_machine_are_allowed(origin: str) -> None:
    found = attempt(ask(UPGRADE, BEARER, ("Origin", origin), policy=OPEN))

    assert found.origin == origin


@pytest.mark.parametrize(
    "origin",
    [
        "null",
        "",
        "localhost",
        "http://localhost.evil.example",
        "http://localhost@evil.example",
        "http://user@localhost",
        "http://:@localhost",
        "http://@localhost",
        "http://evil.example:80#@localhost",
        "http://evil.example/localhost",
        "http://127.0.0.2",
        "http://127.0.0.1.evil.example",
        "http://localhost/",
        "http://localhost?x",
        "http://local\thost",
        "ftp://localhost",
        "file://localhost",
        "http://[::1",
        "http://[::2]",
        "http://0.0.0.0",
        "http://[::1]evil.example",
        "http://[::1].evil.example:80",
        "http://localhost:",
        "http://127.0.0.1:80:80",
    ],
)
def test_without_a_list_any_other_page_is_denied(origin: str) -> None:
    judgement = ask(UPGRADE, BEARER, ("Origin", origin), policy=OPEN)

    assert judgement == Refused(errors.ORIGIN_DENIED)


def test_an_empty_list_allows_no_page_but_every_native_client() -> None:
    policy = Policy(origins=frozenset())

    assert refused(ask(BEARER, ("Origin", "http://localhost"), policy=policy)) == (
        errors.ORIGIN_DENIED
    )
    assert attempt(ask(BEARER, policy=policy)).origin is None


# --- proxies and TLS -----------------------------------------------------------------------

HTTPS = ("X-Forwarded-Proto", "https")
PROXY = "10.1.2.3"


def test_plain_http_is_refused_where_https_is_required() -> None:
    assert refused(ask(UPGRADE, BEARER, tls=False)) == errors.HTTPS_REQUIRED
    assert attempt(ask(UPGRADE, BEARER, tls=False, policy=OPEN))


def test_plain_http_is_refused_before_the_origin_or_the_token_is_looked_at() -> None:
    judgement = ask(("Origin", "null"), ("Origin", "null"), tls=False)

    assert judgement == Refused(errors.HTTPS_REQUIRED)


@pytest.mark.parametrize(
    ("headers", "good"),
    [
        ([HTTPS], True),
        ([("x-forwarded-proto", " HTTPS ")], True),
        ([], False),
        ([("X-Forwarded-Proto", "http")], False),
        ([("X-Forwarded-Proto", "")], False),
        ([("X-Forwarded-Proto", "https, http")], False),
        ([HTTPS, ("X-Forwarded-Proto", "http")], False),
        ([("Forwarded", "proto=https"), ("X-Forwarded-Ssl", "on")], False),
    ],
)
@pytest.mark.parametrize("peer", [PROXY, "fd12::1"])
def test_a_trusted_proxy_must_say_https(headers: Headers, good: bool, peer: str) -> None:
    judgement = ask(UPGRADE, BEARER, *headers, peer=peer, tls=False)

    assert isinstance(judgement, Attempt) is good
    assert good or refused(judgement) == errors.HTTPS_REQUIRED


def test_a_trusted_proxy_that_says_http_is_refused_even_where_http_is_allowed() -> None:
    policy = Policy(trusted_proxies=STRICT.trusted_proxies)
    http = ("X-Forwarded-Proto", "http")

    assert refused(ask(BEARER, http, peer=PROXY, tls=False, policy=policy)) == (
        errors.HTTPS_REQUIRED
    )
    assert attempt(ask(BEARER, peer=PROXY, tls=False, policy=policy))


@pytest.mark.parametrize("peer", [PEER, "11.0.0.1", "2001:db8::1", "unix", ""])
def test_what_an_untrusted_peer_says_about_tls_is_ignored(peer: str) -> None:
    assert refused(ask(BEARER, HTTPS, peer=peer, tls=False)) == errors.HTTPS_REQUIRED
    assert attempt(ask(BEARER, ("X-Forwarded-Proto", "http"), peer=peer, tls=True))


def forwarded(peer: str, *lines: str, policy: Policy = STRICT) -> str:
    headers = {"x-forwarded-for": lines}
    return client_address(Request("GET", "/v1/ws", headers, peer, True), policy)


def test_a_spoofed_forwarded_address_is_ignored() -> None:
    assert forwarded(PEER, "198.51.100.9") == PEER
    assert forwarded(PROXY, "198.51.100.9", policy=OPEN) == PROXY
    assert attempt(ask(BEARER, ("X-Forwarded-For", "198.51.100.9"))).address == PEER


def test_the_nearest_untrusted_hop_is_the_client() -> None:
    assert forwarded(PROXY, "198.51.100.9") == "198.51.100.9"
    assert forwarded(PROXY, "1.1.1.1, 198.51.100.9") == "198.51.100.9"
    assert forwarded(PROXY, "1.1.1.1", "198.51.100.9") == "198.51.100.9"
    assert forwarded(PROXY, "1.1.1.1, 198.51.100.9 , 10.9.9.9", "10.8.8.8") == "198.51.100.9"


@pytest.mark.parametrize(
    ("hop", "address"),
    [
        ("198.51.100.9:51234", "198.51.100.9"),
        ("[2001:db8:1:2::9]:443", "2001:db8:1:2::/64"),
        ("[2001:db8:1:2::9]", "2001:db8:1:2::/64"),
        ("[198.51.100.9]x:1", PROXY),
        ("198.51.100.9:", PROXY),
        ("x:1", PROXY),
    ],
)
def test_a_hop_may_come_with_its_port(hop: str, address: str) -> None:
    assert forwarded(PROXY, hop) == address
    assert forwarded(PROXY, f"{hop}, 10.9.9.9:80") == address


def test_a_proxy_that_names_nobody_is_counted_itself() -> None:
    assert forwarded(PROXY) == PROXY
    assert forwarded(PROXY, "") == PROXY
    assert forwarded(PROXY, "unknown") == PROXY
    assert forwarded(PROXY, "10.9.9.9") == "10.9.9.9"


def test_an_ipv6_client_is_counted_by_its_64() -> None:
    assert forwarded("2001:db8:1:2:3:4:5:6") == "2001:db8:1:2::/64"
    assert forwarded("2001:db8:1:2::9") == "2001:db8:1:2::/64"
    assert forwarded(PROXY, "2001:db8:1:2:aaaa::1") == "2001:db8:1:2::/64"
    assert forwarded("fe80::1%eth0") == "fe80::/64"


def test_an_ipv4_client_of_a_dual_stack_socket_is_counted_by_its_own_address() -> None:
    assert forwarded("::ffff:203.0.113.7") == "203.0.113.7"
    assert forwarded(PROXY, "::ffff:198.51.100.9") == "198.51.100.9"


def test_a_trusted_proxy_on_a_dual_stack_socket_is_trusted() -> None:
    assert forwarded("::ffff:10.1.2.3", "198.51.100.9") == "198.51.100.9"
    assert attempt(ask(BEARER, HTTPS, peer="::ffff:10.1.2.3", tls=False))


def test_a_peer_without_an_address_is_counted_by_its_name() -> None:
    assert forwarded("unix") == "unix"


# --- whatever comes ------------------------------------------------------------------------

NAMES = st.sampled_from(
    [
        "host",
        "Host",
        "Origin",
        "Authorization",
        "Sec-WebSocket-Protocol",
        "X-Forwarded-For",
        "X-Forwarded-Proto",
        "Upgrade",
    ]
)
VALUES = st.one_of(
    st.text(max_size=30),
    st.sampled_from(
        [HOST[1], ORIGIN, BEARER[1], f"chat.v1, bearer.{TOKEN}", "chat.v1", "https", PROXY, PEER]
    ),
)
TARGETS = st.one_of(
    st.just("/v1/ws"), st.text(max_size=20), st.text(max_size=20).map(lambda q: f"/v1/ws?{q}")
)


@settings(max_examples=200)
@given(
    st.builds(
        Request,
        st.sampled_from(["GET", "OPTIONS", "POST"]),
        TARGETS,
        st.lists(st.tuples(NAMES, VALUES), max_size=8).map(by_name),
        st.sampled_from([PEER, PROXY, "::1", ""]),
        st.booleans(),
    ),
    st.sampled_from([OPEN, STRICT]),
)
def test_every_request_is_judged_and_a_refusal_repeats_no_token(
    request: Request, policy: Policy
) -> None:
    judgement = judge(request, policy)

    assert isinstance(judgement, Health | Preflight | Attempt | Refused)
    if isinstance(judgement, Attempt):
        assert judgement.token
        assert judgement.origin is None or judgement.origin in request.all("origin")
        assert judgement.subprotocol in (None, "chat.v1")
    elif isinstance(judgement, Refused):
        assert TOKEN not in repr(judgement.refusal)


# --- tokens over HTTP ----------------------------------------------------------------------

REFRESH = "rt1.abcdefghijklmnop.s-1.1.c2VhbA"


@pytest.mark.parametrize("route", list(TokenRoute))
def test_a_token_is_handed_in_by_post_and_header(route: TokenRoute) -> None:
    judgement = ask(
        ("Authorization", f"Bearer {REFRESH}"),
        ("Origin", ORIGIN),
        method="POST",
        target=str(route),
    )

    assert judgement == Deposit(route, REFRESH, PEER, ORIGIN)


@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "DELETE", "post"])
def test_a_token_is_handed_in_by_no_other_method(method: str) -> None:
    judgement = ask(BEARER, method=method, target="/v1/tokens/refresh")

    assert judgement == Refused(errors.METHOD_NOT_ALLOWED, None, "POST")


def test_a_preflight_of_a_token_route_allows_its_method() -> None:
    judgement = ask(("Origin", ORIGIN), method="OPTIONS", target="/v1/tokens/revoke")

    assert judgement == Preflight(ORIGIN, "POST")


@pytest.mark.parametrize(
    ("headers", "target", "refusal"),
    [
        ([], "", errors.TOKEN_MISSING),
        ([("Authorization", "Basic YTpi")], "", errors.TOKEN_MISSING),
        ([("Authorization", "Bearer ")], "", errors.TOKEN_MISSING),
        ([BEARER, BEARER], "", errors.AMBIGUOUS_CREDENTIALS),
        ([BEARER], "?refresh_token=x", errors.TOKEN_IN_URL),
        ([BEARER], f"?x={REFRESH}", errors.TOKEN_IN_URL),
        ([BEARER, ("Origin", "https://evil.example")], "", errors.ORIGIN_DENIED),
        ([("Sec-WebSocket-Protocol", f"bearer.{TOKEN}")], "", errors.TOKEN_MISSING),
    ],
)
def test_a_token_that_is_handed_in_otherwise_is_refused(
    headers: Headers, target: str, refusal: Refusal
) -> None:
    judgement = ask(*headers, method="POST", target="/v1/tokens/refresh" + target)

    assert refused(judgement) == refusal


def test_a_token_is_handed_in_over_tls_only() -> None:
    judgement = ask(BEARER, method="POST", target="/v1/tokens/refresh", tls=False)

    assert refused(judgement) == errors.HTTPS_REQUIRED


def test_a_hyphen_does_not_hide_a_token_in_the_url() -> None:
    assert refused(ask(UPGRADE, BEARER, target="/v1/ws?access-token=x")) == errors.TOKEN_IN_URL


def test_a_proxy_may_say_that_the_socket_is_secure() -> None:
    """Traefik says wss of an upgrade."""
    judgement = ask(UPGRADE, BEARER, ("X-Forwarded-Proto", "wss"), peer="10.0.0.1", tls=False)

    assert attempt(judgement).token == TOKEN


# --- development's page ----------------------------------------------------------------------

DEVELOPMENT = Policy(page=True)
LOCAL = ("Host", "127.0.0.1:8000")
LOGIN = "/dev/sessions?user=alice"


def look(
    *headers: tuple[str, str],
    target: str = "/",
    method: str = "GET",
    host: Headers | None = None,
    peer: str = "127.0.0.1",
    policy: Policy = DEVELOPMENT,
) -> Judgement:
    hosts = [LOCAL] if host is None else host
    return judge(Request(method, target, by_name([*hosts, *headers]), peer, False), policy)


@pytest.mark.parametrize(
    ("target", "name"),
    [
        ("/", "index.html"),
        ("/?lang=en", "index.html"),
        ("/page.js", "page.js"),
        ("/page.css", "page.css"),
        ("/chat.js", "chat.js"),
        ("/icon.svg", "icon.svg"),
    ],
)
def test_in_development_there_is_a_page(target: str, name: str) -> None:
    assert look(target=target) == Asset(name)


@pytest.mark.parametrize("target", ["/index.html", "//", "/../page.js", "/chat.d.ts", "/dev/"])
def test_there_is_nothing_beside_the_page(target: str) -> None:
    assert refused(look(target=target)) == errors.NOT_FOUND


@pytest.mark.parametrize(
    "host", ["localhost:8000", "LOCALHOST", "127.0.0.1", "[::1]:8000", "localhost:80"]
)
def test_the_page_is_shown_under_this_machines_names(host: str) -> None:
    assert look(host=[("Host", host)]) == Asset("index.html")


@pytest.mark.parametrize(
    "host",
    [
        [("Host", "rebound.example:8000")],
        [("Host", "localhost.rebound.example")],
        [("Host", "127.0.0.1.rebound.example")],
        [("Host", "192.0.2.1:8000")],
        [("Host", "localhost@rebound.example")],
        [("Host", "localhost/x")],
        [("Host", "")],
        [LOCAL, LOCAL],
        [],
    ],
)
@pytest.mark.parametrize(("target", "method"), [("/", "GET"), (LOGIN, "POST")])
def test_a_name_that_somebody_points_at_this_machine_gets_no_page_and_no_login(
    host: Headers, target: str, method: str
) -> None:
    assert refused(look(host=host, target=target, method=method)) == errors.NOT_FOUND


@pytest.mark.parametrize(
    "peer", ["192.0.2.1", "10.0.0.1", "fe80::1", "2001:db8::1", "", "gibberish"]
)
@pytest.mark.parametrize(("target", "method"), [("/", "GET"), (LOGIN, "POST")])
def test_other_machines_get_no_page_and_no_login(peer: str, target: str, method: str) -> None:
    assert refused(look(peer=peer, target=target, method=method)) == errors.NOT_FOUND


def test_whoever_comes_by_a_proxy_is_no_browser_of_this_machine() -> None:
    behind = Policy(page=True, trusted_proxies=(ip_network("127.0.0.0/8"),))

    assert refused(look(("X-Forwarded-For", "192.0.2.1"), policy=behind)) == errors.NOT_FOUND
    assert refused(look(target=LOGIN, method="POST", policy=behind)) == errors.NOT_FOUND


def test_the_page_is_shown_only_where_it_may_connect() -> None:
    elsewhere = Policy(page=True, origins=frozenset({ORIGIN}))
    named = Policy(page=True, origins=frozenset({"http://chat.test:8000"}))

    assert refused(look(policy=elsewhere)) == errors.NOT_FOUND
    assert look(policy=named, host=[("Host", "chat.test:8000")]) == Asset("index.html")


def test_there_is_no_websocket_at_the_page() -> None:
    assert refused(look(UPGRADE, BEARER)) == errors.NOT_FOUND


@pytest.mark.parametrize(("target", "method"), [("/", "GET"), ("/chat.js", "GET"), (LOGIN, "POST")])
def test_otherwise_there_is_neither_page_nor_login(target: str, method: str) -> None:
    assert refused(look(target=target, method=method, policy=OPEN)) == errors.NOT_FOUND
    strict = ask(target=target, method=method, host=[LOCAL], peer="127.0.0.1")
    assert refused(strict) == errors.NOT_FOUND


@pytest.mark.parametrize(
    ("query", "user"),
    [("user=alice", "alice"), ("user=%C3%A9+%2F%23", "é /#"), ("x=1&user=bob", "bob")],
)
def test_in_development_a_name_is_believed(query: str, user: str) -> None:
    judgement = look(
        ("Origin", "http://localhost:3000"), target=f"/dev/sessions?{query}", method="POST"
    )

    assert judgement == Login(user, "127.0.0.1", "http://localhost:3000")


@pytest.mark.parametrize("query", ["", "user=", "user", "user=a&user=b", "user=%FF", "name=alice"])
def test_a_login_needs_one_name(query: str) -> None:
    judgement = look(target=f"/dev/sessions?{query}", method="POST")

    assert refused(judgement) == errors.NOT_A_NAME


@pytest.mark.parametrize(
    "origin", ["https://evil.example", "null", "http://localhost.evil.example"]
)
@pytest.mark.parametrize(("target", "method"), [("/", "GET"), (LOGIN, "POST")])
def test_pages_from_elsewhere_get_no_page_and_no_login(
    origin: str, target: str, method: str
) -> None:
    judgement = look(("Origin", origin), target=target, method=method)

    assert refused(judgement) == errors.ORIGIN_DENIED


def test_two_origins_are_one_too_many_for_a_login() -> None:
    local = ("Origin", "http://localhost:3000")

    assert refused(look(local, local, target=LOGIN, method="POST")) == errors.BAD_REQUEST


@pytest.mark.parametrize(
    ("target", "method", "allowed"), [("/", "POST", "GET"), (LOGIN, "GET", "POST")]
)
def test_a_wrong_method_is_told_the_right_one(target: str, method: str, allowed: str) -> None:
    assert look(target=target, method=method) == Refused(errors.METHOD_NOT_ALLOWED, allowed=allowed)

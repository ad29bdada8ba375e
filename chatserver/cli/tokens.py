"""``secret`` and ``token``: make, trade and read what clients bring."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import secrets
import sys
import time
from base64 import urlsafe_b64decode
from contextlib import suppress
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from chatserver import telemetry
from chatserver.cli.complaints import complain
from chatserver.cli.server import (
    ask,
    keyring_of,
    refresh_tokens_of,
    sessions_of,
    store_url,
    with_secret,
)
from chatserver.core.errors import ReplyCode, StoreUnavailable, TokenRefused
from chatserver.settings import Settings, load
from chatserver.store.keyring import Keyring, secrets_of
from chatserver.supervisor import EXIT_OK, EXIT_STORE

if TYPE_CHECKING:  # It takes a while to load, and --help needs none of it.
    from chatserver.store.link import Store
    from chatserver.store.sessions import TokenPair

EXIT_NO = 1
CUTOFF_SECONDS = 0.5
"""How long issuing a token waits for a store, which it can do without."""

REFUSED_REFRESHES = {
    ReplyCode.TOKEN_INVALID: "This is not a refresh token of this server and its store.",
    ReplyCode.TOKEN_EXPIRED: "The session has reached its end: log in again.",
    ReplyCode.TOKEN_REVOKED: "The session was revoked: log in again.",
}


@click.command(
    epilog="""\b
Examples:
  chatserver secret
  export CHATSERVER_SECRET=$(chatserver secret)"""
)
def secret() -> None:
    """Print a new secret, fit for CHATSERVER_SECRET and for API keys."""
    click.echo(secrets.token_urlsafe(48))


@click.group(
    epilog="""\b
Examples:
  chatserver token issue --user alice --role member
  chatserver token issue --user alice --pair"""
)
def token() -> None:
    """Issue, refresh and inspect tokens."""


class Issued(NamedTuple):
    access_token: str
    user: str
    session: str
    token_id: str
    roles: list[str]
    rooms: dict[str, str] | None
    issued_at: int
    expires_at: int
    kid: str


def _rights(_: click.Context, __: click.Parameter, given: tuple[str, ...]) -> dict[str, str] | None:
    rooms: dict[str, str] = {}
    for text in given:
        pattern, separator, rights = text.rpartition("=")
        if not separator or pattern in rooms:
            raise click.BadParameter(
                "must be PATTERN=RIGHTS, each pattern once, as in general=rw or team-*=r"
            )
        rooms[pattern] = rights
    return rooms or None


@token.command(
    epilog="""\b
Examples:
  chatserver token issue --user alice
  chatserver token issue --user alice --room general=rw --room 'news-*=r' --ttl 60
  chatserver token issue --user alice --pair"""
)
@click.option("--user", required=True, help="Whose token it is: the `sub` claim.")
@click.option(
    "--role",
    "roles",
    multiple=True,
    default=("member",),
    show_default=True,
    help="A role: guest, member, moderator, admin, service. Give it once for each.",
)
@click.option(
    "--room",
    "rooms",
    multiple=True,
    metavar="PATTERN=RIGHTS",
    callback=_rights,
    help="Rights in a room, or in all whose name begins so (team-*): r join and read, w send, m "
    "moderate. With it, roles give no rights in rooms.",
)
@click.option("--session", help="The session it belongs to.  [default: a new one]")
@click.option(
    "--ttl",
    type=click.IntRange(1, 900),
    help="Seconds until it expires.  [default: 900]",
)
@click.option("--json", "as_json", is_flag=True, help="Print a JSON object with all there is.")
@click.option(
    "--pair",
    is_flag=True,
    help="Begin a session in the store, and print its access token and its refresh token as JSON.",
)
def issue(
    user: str,
    roles: tuple[str, ...],
    rooms: dict[str, str] | None,
    session: str | None,
    ttl: int | None,
    as_json: bool,
    pair: bool,
) -> None:
    """Print an access token, and nothing else.

    It is signed with CHATSERVER_SECRET, in development with the secret in the data directory.
    """
    if pair and (session is not None or ttl is not None or as_json):
        raise click.UsageError("--pair goes with none of --session, --ttl and --json.")
    settings = load()
    if pair:
        _print_pair(asyncio.run(_begin(settings, user, roles, rooms)))
        return
    session = session or new_session()
    issued = asyncio.run(issue_token(settings, user, roles, rooms, session, ttl or 900))
    click.echo(json.dumps(issued._asdict(), indent=2) if as_json else issued.access_token)


def _print_pair(pair: TokenPair) -> None:
    click.echo(json.dumps(pair._asdict(), indent=2))


async def _begin(
    settings: Settings, user: str, roles: tuple[str, ...], rooms: dict[str, str] | None
) -> TokenPair:
    try:
        return await ask(
            settings, lambda store: sessions_of(settings, store.call).begin(user, roles, rooms)
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def new_session() -> str:
    return "s-" + secrets.token_hex(8)


async def issue_token(
    settings: Settings,
    user: str,
    roles: tuple[str, ...],
    rooms: dict[str, str] | None,
    session: str,
    ttl: int,
) -> Issued:
    keyring = keyring_of(settings)
    # A revocation of the user covers its whole second: a login right after it comes later.
    issued_at = max(int(time.time()), await _cutoff(settings, user) + 1)
    token_id = "t-" + secrets.token_hex(8)
    try:
        text = keyring.issue(
            user=user,
            session=session,
            roles=roles,
            rooms=rooms,
            issued_at=issued_at,
            ttl=ttl,
            token_id=token_id,
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None
    expires_at = issued_at + ttl
    return Issued(
        text, user, session, token_id, list(roles), rooms, issued_at, expires_at, keyring.kid
    )


async def _cutoff(settings: Settings, user: str) -> int:
    """The user's last revocation, as far as a store can be reached at once."""
    from chatserver.store import revocations
    from chatserver.store.cluster import store_at

    with suppress(StoreUnavailable, TimeoutError, UnicodeError):
        async with asyncio.timeout(CUTOFF_SECONDS), store_at(store_url(settings)) as store:
            return await revocations.cutoff(store.call, user)
    return 0


def _given(text: str) -> str:
    """A token from the command line, or from standard input, where no other user sees it."""
    if text != "-":
        return text
    return sys.stdin.buffer.read(1 << 20).decode(errors="replace").strip()


@token.command(
    epilog="""\b
Examples:
  chatserver token refresh < refresh-token
  chatserver token issue --user alice --pair | jq -r .refresh_token | chatserver token refresh"""
)
@click.argument("text", metavar="[TOKEN]", default="-")
@click.pass_context
def refresh(context: click.Context, text: str) -> None:
    """Trade a refresh token for the next pair of tokens, as JSON.

    Reads standard input without TOKEN, or when it is -. Trading a token again ends its session,
    but for the last one traded, within 10 seconds: that gives the same pair. Exit code 1 when it
    is refused.
    """
    settings = load()
    from chatserver.store.sessions import TooManyReplays

    try:
        _print_pair(asyncio.run(_rotate(settings, _given(text))))
        return
    except TokenRefused as refused:
        complain(REFUSED_REFRESHES[refused.code])
    except TooManyReplays:
        complain("This token was used too often: use the one that it was traded for.")
    context.exit(EXIT_NO)


async def _rotate(settings: Settings, text: str) -> TokenPair:
    async def rotate(store: Store) -> TokenPair:
        sessions = sessions_of(settings, store.call)
        return await sessions.rotate(text, await sessions.salt())

    return await ask(settings, rotate)


@token.command(
    epilog="""\b
Examples:
  chatserver token inspect eyJhbGciOi…
  chatserver token issue --user alice | chatserver token inspect"""
)
@click.argument("text", metavar="[TOKEN]", default="-")
@click.pass_context
def inspect(context: click.Context, text: str) -> None:
    """Show what is in a token, and whether this server would take it.

    Reads standard input without TOKEN, or when it is -. The token itself and its signature are
    not printed. Revocations are not looked at, and of a refresh token only its seal is checked,
    which takes the store. Exit code 1 when it is not good.
    """
    settings = load()
    text = _given(text)
    if text.startswith("rt1."):
        report = asyncio.run(_inspect_refresh(settings, text))
    else:
        keys = [key for key in secrets_of(with_secret(settings)) if key is not None]
        report = _inspect(keyring_of(settings), keys, text, time.time())
    click.echo(json.dumps(report, indent=2))
    if report["good"] is None:
        context.exit(EXIT_STORE)
    context.exit(EXIT_OK if report["good"] else EXIT_NO)


async def _inspect_refresh(settings: Settings, text: str) -> dict[str, Any]:
    """What a refresh token says; ``good`` is None when nobody could say."""
    from chatserver.store import keys

    refresh_tokens = refresh_tokens_of(settings)
    report: dict[str, Any] = {"good": False, "reason": None, "kind": "refresh token"}
    match text.split(".") if len(text) <= 256 else []:
        case [_, kid, session, generation, _]:
            report |= {"session": session, "generation": generation, "kid": kid}
        case _:
            return report | {"reason": "this is not a refresh token of five parts"}
    try:
        salt = await ask(settings, lambda store: store.call(["GET", keys.INCARNATION]))
    except StoreUnavailable as error:
        why = telemetry.redact(str(error))
        return report | {"good": None, "reason": f"its seal could not be checked: {why}"}
    try:
        refresh_tokens.read(text, salt or b"")
    except TokenRefused as refused:
        return report | {"reason": f"{refused.code}: its seal is not of this secret and store"}
    return report | {"good": True}


def _inspect(keyring: Keyring, keys: list[bytes], text: str, now: float) -> dict[str, Any]:
    report: dict[str, Any] = {"good": False, "reason": "this is not a JWT of three parts"}
    parts = text.split(".") if len(text) <= 65536 else []
    if len(parts) != 3:
        return report
    header, claims = (_opened(part) for part in parts[:2])
    report |= {"signature_verifies": _signed(parts, keys), "header": header, "claims": claims}
    expires_at = claims.get("exp") if isinstance(claims, dict) else None
    # No date lies beyond the year 9999.
    if type(expires_at) is int and 0 <= expires_at < 253402300800:
        report["expires_at"] = datetime.fromtimestamp(expires_at, UTC).isoformat()
        report["expires_in"] = int(expires_at - now)
    try:
        keyring.verify(text, now=now)
    except TokenRefused as refused:
        # Of a forger's token no more is told than on the wire.
        why = refused.__cause__ if report["signature_verifies"] else None
        report["reason"] = f"{refused.code}: {why}" if why else refused.code
    else:
        report |= {"good": True, "reason": None}
    return report


def _opened(part: str) -> Any:
    """A part of a token for the eye, None when it is no JSON in base64url."""
    with suppress(ValueError, RecursionError):
        value = json.loads(urlsafe_b64decode(part + "=" * (-len(part) % 4)))
        json.dumps(value, indent=2)  # What can be read may still be too deep to be printed.
        return value
    return None


def _signed(parts: list[str], keys: list[bytes]) -> bool:
    """Whether the HMAC is right, whatever the rest is worth: the keyring only says yes or no."""
    with suppress(ValueError):
        signature = urlsafe_b64decode(parts[2] + "=" * (-len(parts[2]) % 4))
        signed = f"{parts[0]}.{parts[1]}".encode()
        right = [hmac.digest(key, signed, hashlib.sha256) for key in keys]
        return any(hmac.compare_digest(signature, each) for each in right)
    return False

"""The command line. Commands, what they print, and exit codes; what they do is elsewhere.

Standard output has what was asked for and nothing else; advice and errors go to standard error.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import re
import secrets
import shlex
import socket
import sys
import time
from base64 import urlsafe_b64decode
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlsplit

import click
from pydantic import SecretStr

from chatserver import supervisor, telemetry
from chatserver.core.errors import ReplyCode, StoreRefused, StoreUnavailable, TokenRefused
from chatserver.core.handshake import LOOPBACK_NAMES
from chatserver.core.session import Kind
from chatserver.settings import (
    ConfigurationError,
    Settings,
    command,
    development_secret,
    load,
    unknown_variables,
    variable,
)
from chatserver.store.embedded import OLDEST, StoreFailed, executable, socket_url
from chatserver.store.keyring import Keyring, secrets_of
from chatserver.supervisor import (
    EXIT_CONFIGURATION,
    EXIT_INTERNAL,
    EXIT_OK,
    EXIT_STORE,
    Address,
)

if TYPE_CHECKING:  # It takes a while to load, and --help needs none of it.
    from chatserver.store.link import Call, Store
    from chatserver.store.refresh import RefreshTokens
    from chatserver.store.registry import Entry
    from chatserver.store.revocations import Outcome
    from chatserver.store.sessions import Sessions, TokenPair

T = TypeVar("T")

EXIT_NO = 1
CUTOFF_SECONDS = 0.5
"""How long issuing a token waits for a store, which it can do without."""
STORE_TRIES = 3

REFUSED_REFRESHES = {
    ReplyCode.TOKEN_INVALID: "This is not a refresh token of this server and its store.",
    ReplyCode.TOKEN_EXPIRED: "The session has reached its end: log in again.",
    ReplyCode.TOKEN_REVOKED: "The session was revoked: log in again.",
}

EPILOG = """\b
Example:
  chatserver serve
  chatserver chat --room general --user bob

\b
Exit codes:
  0   it is done; the server stopped as it was told to
  1   the answer is no: a token is not good, a chat was refused
  2   the command line is wrong
  69  the store cannot be reached, or refuses
  70  the server failed, or its workers keep dying
  78  the configuration is wrong

Settings come from CHATSERVER_* variables and from a file .env in the current directory; every one
is in docs/configuration.md."""

log = telemetry.logger("cli")


class Commands(click.Group):
    """The commands, with their failures as exit codes and sentences."""

    def invoke(self, context: click.Context) -> Any:
        try:
            return super().invoke(context)
        except ConfigurationError as error:
            complain(*error.reasons)
            context.exit(EXIT_CONFIGURATION)
        except (StoreFailed, StoreUnavailable) as error:
            complain(str(error))
            context.exit(EXIT_STORE)
        except (click.ClickException, click.exceptions.Exit, click.Abort, BrokenPipeError):
            raise  # Click has the words and the codes for these.
        except Exception:  # The last place to say in the log, redacted, that it is our bug.
            log.critical("failed", exc_info=True)
            context.exit(EXIT_INTERNAL)


def complain(*sentences: str) -> None:
    for sentence in sentences:
        click.echo(f"chatserver: {telemetry.redact(sentence)}", err=True)


@click.group(
    cls=Commands,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
def main() -> None:
    """A real-time WebSocket chat server."""
    telemetry.configure("critical")  # The short commands speak for themselves.


# -- serve and its workers --------------------------------------------------------------------


@main.command(
    epilog="""\b
Example:
  chatserver serve --port 8001 --workers 2

Ctrl-C once sends the clients away and ends; twice ends at once. SIGHUP replaces the
workers one by one."""
)
@click.option("--host", help="Address to listen on.  [default: CHATSERVER_HOST or 127.0.0.1]")
@click.option(
    "--port",
    type=click.IntRange(0, 65535),
    help="Port to listen on; 0 takes any free one.  [default: CHATSERVER_PORT or 8000]",
)
@click.option(
    "--workers",
    type=click.IntRange(1, 1024),
    help="Worker processes; one per core is best.  [default: CHATSERVER_WORKERS or 1]",
)
@click.option(
    "--redis-url",
    metavar="URL",
    help="The Redis or Valkey to use, as redis://host:6379/0. Other users of this machine can see "
    "it: a URL with a password belongs in CHATSERVER_REDIS_URL.  [default: CHATSERVER_REDIS_URL, "
    "or in development a private store]",
)
@click.pass_context
def serve(
    context: click.Context,
    host: str | None,
    port: int | None,
    workers: int | None,
    redis_url: str | None,
) -> None:
    """Run the server until it is told to stop."""
    settings = load(host=host, port=port, workers=workers, redis_url=redis_url)
    telemetry.configure(settings.log_level)
    for name in unknown_variables():
        complain(f"{name} is not a setting and is ignored; is it misspelt?")
    context.exit(supervisor.run(settings, lambda address: _announce(settings, address)))


def _announce(settings: Settings, address: Address) -> None:
    log.info("ready", host=address.host, port=address.port, workers=settings.workers)
    if not settings.production:
        # Whoever started it may not be reading along any more.
        with suppress(OSError):
            click.echo(banner(settings, address))


def banner(settings: Settings, address: Address) -> str:
    """What a newcomer has to know, with commands that work as they stand in any directory."""
    url = url_of(settings, address.port)
    me = " ".join([*_variables(settings), shlex.quote(command())])
    usual = Settings.model_fields
    moved = (address.port, settings.host) != (usual["port"].default, usual["host"].default)
    link = f" --url {url}" if moved or settings.tls_certfile else ""
    page = page_of(settings, address.port)
    browse = f"open {page} in two windows of a browser,\nor " if page else ""
    lines = [
        "",
        f"The chat server listens on {url}",
        "",
        f"To chat, {browse}type in a second terminal, and with another name in a third:",
        f"    {me} chat --room general --user bob{link}",
        "For a client of your own, get a token (it is good for 15 minutes):",
        f"    {me} token issue --user alice --role member",
    ]
    if settings.control_key is not None and settings.control_port:
        lines.append(f"The control API: {control_url_of(settings)}/docs")
    if settings.secret is not None:
        lines.append("Both need the same CHATSERVER_SECRET as this server.")
    return "\n".join([*lines, "Ctrl-C stops the server.", ""])


def _variables(settings: Settings) -> list[str]:
    """What the other terminal's commands must be told, as a shell takes it."""
    fields = Settings.model_fields
    on_their_own = settings.secret is not None and settings.redis_url is not None
    return [
        f"{variable(name)}={shlex.quote(str(getattr(settings, name)))}"
        for name in (*(() if on_their_own else ("data_dir",)), "issuer", "audience")
        if getattr(settings, name) != fields[name].get_default(call_default_factory=True)
    ]


def url_of(settings: Settings, port: int) -> str:
    """Where a client on this machine connects."""
    host = settings.host if settings.host not in ("0.0.0.0", "::") else "127.0.0.1"
    scheme = "wss" if settings.tls_certfile else "ws"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/v1/ws"


def page_of(settings: Settings, port: int) -> str | None:
    """The page's address, if browsers on this machine are shown one there."""
    page = url_of(settings, port).replace("ws", "http", 1).removesuffix("v1/ws")
    local = urlsplit(page).hostname in LOOPBACK_NAMES
    return page if local and not settings.allowed_origins and not settings.production else None


def control_url_of(settings: Settings) -> str:
    scheme = "https" if settings.control_tls else "http"
    host = settings.control_host if settings.control_host not in ("0.0.0.0", "::") else "127.0.0.1"
    return f"{scheme}://{f'[{host}]' if ':' in host else host}:{settings.control_port}"


@main.command(hidden=True)
@click.option("--fd", type=int, required=True, help="The listening socket.")
@click.option("--ready-fd", type=int, required=True, help="Where to beat when serving.")
@click.option("--report", type=click.Path(path_type=Path), help="Where to tell what is counted.")
@click.pass_context
def worker(context: click.Context, fd: int, ready_fd: int, report: Path | None) -> None:
    """Serve on a socket that the supervisor has bound. Only the supervisor calls this."""
    settings = load(env_file=None)  # The supervisor has read it, and passes on what it found.
    telemetry.configure(settings.log_level)
    from chatserver import app

    listener = socket.socket(fileno=fd)
    listener.setblocking(False)
    context.exit(app.run(settings, listener, supervisor.heartbeat(ready_fd), report))


@main.command(hidden=True)
@click.option("--fd", type=int, required=True, help="The listening socket.")
@click.option("--ready-fd", type=int, required=True, help="Where to beat when serving.")
@click.option("--reports", type=click.Path(path_type=Path), help="Where the workers tell theirs.")
@click.pass_context
def control(context: click.Context, fd: int, ready_fd: int, reports: Path | None) -> None:
    """Serve the control API on a socket that the supervisor has bound, which alone calls this."""
    settings = load(env_file=None)
    telemetry.configure(settings.log_level)
    from chatserver import control as api

    heartbeat = supervisor.heartbeat(ready_fd)
    context.exit(api.run(settings, socket.socket(fileno=fd), heartbeat, reports))


# -- tokens -----------------------------------------------------------------------------------


@main.command(
    epilog="""\b
Examples:
  chatserver secret
  export CHATSERVER_SECRET=$(chatserver secret)"""
)
def secret() -> None:
    """Print a new secret, fit for CHATSERVER_SECRET and for API keys."""
    click.echo(secrets.token_urlsafe(48))


@main.group(
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
    session = session or _new_session()
    issued = asyncio.run(_issue(settings, user, roles, rooms, session, ttl or 900))
    click.echo(json.dumps(issued._asdict(), indent=2) if as_json else issued.access_token)


def _print_pair(pair: TokenPair) -> None:
    click.echo(json.dumps(pair._asdict(), indent=2))


async def _begin(
    settings: Settings, user: str, roles: tuple[str, ...], rooms: dict[str, str] | None
) -> TokenPair:
    try:
        return await _ask(
            settings, lambda store: sessions_of(settings, store.call).begin(user, roles, rooms)
        )
    except ValueError as error:
        raise click.UsageError(str(error)) from None


def _new_session() -> str:
    return "s-" + secrets.token_hex(8)


async def _issue(
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


def keyring_of(settings: Settings) -> Keyring:
    """The keys that the server has. Raises ConfigurationError when it would refuse them."""
    return Keyring.of(_with_secret(settings))


def refresh_tokens_of(settings: Settings) -> RefreshTokens:
    """What makes and reads the server's refresh tokens. Raises as ``keyring_of``."""
    from chatserver.store.refresh import RefreshTokens

    return RefreshTokens.of(_with_secret(settings))


def sessions_of(settings: Settings, call: Call) -> Sessions:
    """Sessions as the server has them. Raises as ``keyring_of``."""
    from chatserver.store.sessions import Sessions

    return Sessions.of(_with_secret(settings), call)


def _with_secret(settings: Settings) -> Settings:
    """The settings as the server completes them in development."""
    wrong = [
        reason
        for reason in supervisor.refusals(settings)
        if reason.startswith(("CHATSERVER_SECRET ", "CHATSERVER_SECRET_PREVIOUS "))
    ]
    if wrong:
        raise ConfigurationError(wrong)
    if settings.secret is not None:
        return settings
    secret = SecretStr(development_secret(settings.data_dir).decode())
    return settings.model_copy(update={"secret": secret})


def store_url(settings: Settings) -> str:
    if settings.redis_url is None:
        return socket_url(settings.data_dir)
    return settings.redis_url.get_secret_value()


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

    return await _ask(settings, rotate)


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
        keys = [key for key in secrets_of(_with_secret(settings)) if key is not None]
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
        salt = await _ask(settings, lambda store: store.call(["GET", keys.INCARNATION]))
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


@main.command(
    epilog="""\b
Examples:
  chatserver revoke --session s-4f1c
  chatserver revoke --user alice --reason 'lost her phone'"""
)
@click.option("--session", help="End this session: every token and connection of one login.")
@click.option("--user", help="End every session that this user has by now; later logins are not.")
@click.option("--token", "token_id", metavar="JTI", help="End one token, by its id.")
@click.option("--reason", default="", help="For the record.")
def revoke(session: str | None, user: str | None, token_id: str | None, reason: str) -> None:
    """Revoke a session, a user or a token, everywhere and at once."""
    choices = {Kind.SESSION: session, Kind.USER: user, Kind.TOKEN: token_id}
    given = {kind: value for kind, value in choices.items() if value is not None}
    if len(given) != 1:
        raise click.UsageError("Give exactly one of --session, --user and --token.")
    ((kind, value),) = given.items()
    _check_id(value)
    outcome = asyncio.run(_revoke(load(), kind, value, reason))
    closed = f"{outcome.closed} connection{'' if outcome.closed == 1 else 's'}"
    click.echo(f"Revoked {kind} {value}: {closed} closed.")
    if not outcome.complete:
        complain(
            "A worker did not confirm it. Until it does, it accepts nobody and delivers nothing."
        )


def _check_id(value: str) -> None:
    if not re.fullmatch(r"[^\x00-\x1f\x7f-\x9f\ud800-\udfff]{1,128}", value):
        raise click.UsageError("This is not an id: 1 to 128 characters, no control characters.")


async def _revoke(settings: Settings, kind: Kind, value: str, reason: str) -> Outcome:
    from chatserver.store import revocations

    return await _ask(
        settings, lambda store: revocations.revoke(store.call, kind, value, reason=reason)
    )


@main.command(
    epilog="""\b
Examples:
  chatserver sessions --user alice
  chatserver sessions --user alice --json"""
)
@click.option("--user", required=True, help="Whose connections.")
@click.option("--json", "as_json", is_flag=True, help="Print a JSON list.")
def sessions(user: str, as_json: bool) -> None:
    """Show where a user is connected, on all workers."""
    _check_id(user)
    entries = asyncio.run(_connections(load(), user))
    if as_json:
        click.echo(json.dumps([_connection(entry) for entry in entries], indent=2))
    elif entries:
        click.echo(_table(entries))
    else:
        click.echo(f"{user} is not connected.")


async def _connections(settings: Settings, user: str) -> list[Entry]:
    from chatserver.store import registry

    return await _ask(settings, lambda store: registry.connections(store.call, user))


def _connection(entry: Entry) -> dict[str, object]:
    """As the control API tells of it; the time is in milliseconds."""
    return {
        "session": entry.session,
        "connection": entry.connection,
        "worker": entry.worker,
        "connected_since": entry.since,
        "address": entry.address,
    }


def _table(entries: list[Entry]) -> str:
    rows = [("SESSION", "CONNECTION", "WORKER", "CONNECTED SINCE", "ADDRESS")]
    for entry in entries:
        since = datetime.fromtimestamp(entry.since // 1000, UTC).isoformat()
        rows.append((entry.session, entry.connection, entry.worker, since, entry.address))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )


async def _ask(settings: Settings, question: Callable[[Store], Awaitable[T]]) -> T:
    """Ask the store something that may be asked twice. Raises StoreUnavailable, for a person.

    The server's short deadlines are not a person's: it is tried again before it is called away.
    """
    from chatserver.store.cluster import store_at

    why = StoreUnavailable()
    for _ in range(STORE_TRIES):
        try:
            async with store_at(store_url(settings)) as store:
                return await question(store)
        except StoreUnavailable as error:
            why = error
    raise StoreUnavailable(_explained(settings, why))


def _explained(settings: Settings, error: StoreUnavailable) -> str:
    if isinstance(error, StoreRefused):
        return f"The store refuses: {str(error).rstrip('.')}."
    if settings.redis_url is None:
        return f"The private store in {settings.data_dir} is not running: start the server first."
    url = settings.redis_url.get_secret_value()
    why = str(error).rstrip(".")
    return f"The store at {url} cannot be reached: {why}. Is CHATSERVER_REDIS_URL right?"


# -- chat and check ---------------------------------------------------------------------------


@main.command(
    epilog="""\b
Examples:
  chatserver chat --room general --user bob
  chatserver chat --room general --token "$TOKEN" --url wss://chat.example/v1/ws"""
)
@click.option("--room", required=True, help="The room to join.")
@click.option("--user", help="Chat as this user, with tokens made here from the server's secret.")
@click.option("--token", "given", help="Chat with this access token.")
@click.option("--url", help="The server.  [default: ws://127.0.0.1:8000/v1/ws, with our port]")
@click.pass_context
def chat(
    context: click.Context, room: str, user: str | None, given: str | None, url: str | None
) -> None:
    """Chat in a room: lines typed are sent, what others say is shown."""
    if (user is None) == (given is None):
        raise click.UsageError("Give exactly one of --user and --token.")
    settings = load()
    if url is None and settings.port == 0:
        raise click.UsageError("Give --url: CHATSERVER_PORT is 0, which is any port.")
    from chatserver.client import terminal

    tokens = _tokens(settings, user, given or "")
    context.exit(asyncio.run(terminal.chat(url or url_of(settings, settings.port), room, tokens)))


def _tokens(settings: Settings, user: str | None, given: str) -> Callable[[], Awaitable[str]]:
    """A fresh token of one session at each call, or the given one."""
    session = _new_session()

    async def fresh() -> str:
        if user is None:
            return given
        return (await _issue(settings, user, ("member",), None, session, 900)).access_token

    return fresh


@main.command(
    epilog="""\b
Example:
  chatserver check && chatserver serve"""
)
@click.pass_context
def check(context: click.Context) -> None:
    """Say what is wrong with the configuration and the store, and what to do about it."""
    settings = load()
    for name in unknown_variables():
        complain(f"{name} is not a setting and is ignored; is it misspelt?")
    reasons = supervisor.refusals(settings)
    if settings.secret is None and (settings.data_dir / "secret").exists():
        development_secret(settings.data_dir)
    if reasons:
        raise ConfigurationError(reasons)
    click.echo(f"The configuration is good for {settings.environment}.")
    context.exit(asyncio.run(_check_store(settings)))


async def _check_store(settings: Settings) -> int:
    try:
        found = await _ask(settings, lambda store: store.describe())
    except StoreUnavailable:
        if settings.redis_url is not None:
            raise
        click.echo(f"The private store is not running; serve will start {executable()}.")
        return EXIT_OK
    wrong = _store_problems(found["version"], found["policy"])
    if found["mode"] != found["wanted"]:
        wrong.append(
            "The store is one node of a cluster: name it in CHATSERVER_REDIS_URL as "
            "redis+cluster://host1:6379,host2:6379."
        )
    if wrong:
        raise ConfigurationError(wrong)
    about = f"version {found['version']}, {found['policy']}, {found['place']}"
    click.echo(f"The store answers: {about}.")
    return EXIT_OK


def _store_problems(version: str, policy: str) -> list[str]:
    problems = []
    numbers = tuple(int(part) for part in re.findall(r"\d+", version)[:2])
    if numbers and numbers < OLDEST:
        problems.append(f"The store is of version {version}: it must be 7.0 or later.")
    if policy != "noeviction":
        problems.append(
            f"THE STORE MAY FORGET REVOCATIONS AND MESSAGES: its maxmemory-policy is {policy}. Set "
            "it to noeviction (CONFIG SET maxmemory-policy noeviction, and in its configuration)."
        )
    return problems

"""``revoke`` and ``sessions``: who is connected, and how that is ended."""

from __future__ import annotations

import asyncio
import json
import re
from datetime import UTC, datetime
from typing import TYPE_CHECKING

import click

from chatserver.cli.complaints import complain
from chatserver.cli.server import ask
from chatserver.core.session import Kind
from chatserver.settings import Settings, load

if TYPE_CHECKING:  # It takes a while to load, and --help needs none of it.
    from chatserver.store.registry import Entry
    from chatserver.store.revocations import Outcome


@click.command(
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

    return await ask(
        settings, lambda store: revocations.revoke(store.call, kind, value, reason=reason)
    )


@click.command(
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

    return await ask(settings, lambda store: registry.connections(store.call, user))


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

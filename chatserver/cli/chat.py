"""``chat``: its tokens; the rest is the Python client's."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable

import click

from chatserver.cli.server import url_of
from chatserver.cli.tokens import issue_token, new_session
from chatserver.settings import Settings, load


@click.command(
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
    session = new_session()

    async def fresh() -> str:
        if user is None:
            return given
        return (await issue_token(settings, user, ("member",), None, session, 900)).access_token

    return fresh

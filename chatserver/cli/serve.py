"""``serve``, what it says to whoever started it, and the processes that only it starts."""

from __future__ import annotations

import shlex
import socket
from contextlib import suppress
from pathlib import Path
from urllib.parse import urlsplit

import click

from chatserver import supervisor, telemetry
from chatserver.cli.complaints import complain
from chatserver.cli.server import authority, url_of
from chatserver.core.handshake import LOOPBACK_NAMES
from chatserver.settings import Settings, command, load, unknown_variables, variable
from chatserver.supervisor import Address

log = telemetry.logger("cli")


@click.command(
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


def page_of(settings: Settings, port: int) -> str | None:
    """The page's address, if browsers on this machine are shown one there."""
    page = url_of(settings, port).replace("ws", "http", 1).removesuffix("v1/ws")
    local = urlsplit(page).hostname in LOOPBACK_NAMES
    return page if local and not settings.allowed_origins and not settings.production else None


def control_url_of(settings: Settings) -> str:
    scheme = "https" if settings.control_tls else "http"
    return f"{scheme}://{authority(settings.control_host, settings.control_port)}"


@click.command(hidden=True)
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


@click.command(hidden=True)
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

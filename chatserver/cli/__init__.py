"""The command line. Commands, what they print, and exit codes; what they do is elsewhere.

Standard output has what was asked for and nothing else; advice and errors go to standard error.
"""

from __future__ import annotations

from typing import Any

import click

from chatserver import __version__, telemetry
from chatserver.cli import chat, check, serve, sessions, tokens
from chatserver.cli.complaints import complain
from chatserver.core.errors import StoreUnavailable
from chatserver.settings import ConfigurationError
from chatserver.store.embedded import StoreFailed
from chatserver.supervisor import EXIT_CONFIGURATION, EXIT_INTERNAL, EXIT_STORE

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


@click.group(
    cls=Commands,
    epilog=EPILOG,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="%(prog)s %(version)s")
def main() -> None:
    """A real-time WebSocket chat server."""
    telemetry.configure("critical")  # The short commands speak for themselves.


for each in (
    serve.serve,
    serve.worker,
    serve.control,
    tokens.secret,
    tokens.token,
    sessions.revoke,
    sessions.sessions,
    chat.chat,
    check.check,
):
    main.add_command(each)

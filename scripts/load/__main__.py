"""``scripts/loadtest``: from the command line to the exit code."""

from __future__ import annotations

import asyncio
import os
import resource
import signal
import sys
from collections.abc import Sequence
from contextlib import suppress

from chatserver.settings import ConfigurationError

from . import credentials, http, page, report
from .coordinator import Coordinator, RunFailed
from .credentials import Credentials, TokenError
from .crowd import resolve
from .options import Options, parse
from .results import Results

EXIT_NOT_MET = 1
EXIT_USAGE = 2
EXIT_NOBODY = 69
EXIT_INTERNAL = 70
EXIT_INTERRUPTED = 130
LOOK_SECONDS = 1.0


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns the exit code."""
    options = parse(arguments)
    _raise_descriptors()
    try:
        return asyncio.run(_main(options))
    except (TokenError, ConfigurationError) as error:
        return _complain(EXIT_USAGE, str(error))
    except RunFailed as error:
        return _complain(EXIT_INTERNAL, str(error))
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


async def _main(options: Options) -> int:
    try:
        address = await resolve(options.url)
        if options.behaviour.control:
            await _try_control(options)
    except OSError as error:
        return _complain(EXIT_NOBODY, str(error))
    results = await _run(Coordinator(options, _credentials(options), address))
    print(report.text(results))
    if options.json:
        report.write_json(results, options.json)
    if options.html:
        options.html.write_text(page.html(results))
    if not results.counts["connects"] and not results.ended_early:
        return _complain(EXIT_NOBODY, f"Nobody got in at {options.url}.")
    return 0 if all(verdict.met for verdict in results.verdicts()) else EXIT_NOT_MET


def _credentials(options: Options) -> Credentials:
    if options.tokens is None:
        return credentials.from_secret(options.run)
    return credentials.from_file(
        options.tokens, options.base, options.sockets, options.behaviour.fresh
    )


async def _try_control(options: Options) -> None:
    """Raises OSError if the control API would not revoke."""
    key = os.environ["CHATSERVER_CONTROL_KEY"]
    try:
        answer = await http.post(
            options.control, "/v1/revocations", key, {"session": f"s-{options.run}-nobody"}
        )
    except OSError as error:
        raise OSError(f"The control API at {options.control} does not answer: {error}") from None
    if answer.status != 200:
        raise OSError(
            f"The control API at {options.control} answered {answer.status}: is this the server's "
            "CHATSERVER_CONTROL_KEY?"
        )


async def _run(coordinator: Coordinator) -> Results:
    """With a line of progress. Ctrl-C ends the load early; the second time it ends everything."""
    loop = asyncio.get_running_loop()
    progress = report.Progress()

    def interrupt() -> None:
        loop.remove_signal_handler(signal.SIGINT)
        coordinator.end_early()

    loop.add_signal_handler(signal.SIGINT, interrupt)

    async def show() -> None:
        while True:
            progress.show(coordinator.phase, coordinator.results)
            await asyncio.sleep(LOOK_SECONDS)

    showing = asyncio.ensure_future(show())
    try:
        return await coordinator.run()
    finally:
        showing.cancel()
        progress.clear()


def _raise_descriptors() -> None:
    """As many as are allowed; processes inherit it."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))


def _complain(code: int, sentence: str) -> int:
    sys.stderr.write(f"loadtest: {sentence}\n")
    return code


if __name__ == "__main__":
    sys.exit(main())

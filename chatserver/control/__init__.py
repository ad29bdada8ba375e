"""The control API: what operators and other services of the same system may ask and do.

HTTP on a port of its own, in a process of its own, for whoever holds the key. Everything that it
tells comes from the store, and everything it does goes there, so it needs nothing from a worker;
but for the metrics, which the workers of its host leave in files.
protocol.md, section 6, and the OpenAPI page at ``/docs``.
"""

from __future__ import annotations

import asyncio
import pathlib
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import uvicorn
import uvloop
from starlette.types import ASGIApp

from chatserver.control.api import Control, build
from chatserver.settings import Settings
from chatserver.store.cluster import store_at
from chatserver.store.log import RoomLog
from chatserver.store.sessions import Sessions

STOP_SECONDS = 5
"""How long requests under way may take when the process is told to stop."""
HEAR_SECONDS = 0.25
"""How long a request may take to follow its connection then."""


def run(
    settings: Settings,
    sock: socket.socket,
    ready: Callable[[], None],
    reports: pathlib.Path | None = None,
) -> int:
    """Serve on a bound socket until SIGTERM or SIGHUP. Returns the exit code.

    ``ready`` is called once, when requests are answered. ``reports`` is the directory in which the
    workers tell what they count.
    """
    return uvloop.run(_serve(settings, sock, ready, reports))


async def _serve(
    settings: Settings,
    sock: socket.socket,
    ready: Callable[[], None],
    reports: pathlib.Path | None,
) -> int:
    assert settings.redis_url is not None
    store = store_at(settings.redis_url.get_secret_value())
    commands, room_log = store.lane(), RoomLog.of(settings, store)
    sessions = Sessions.of(settings, commands.call)
    app = build(settings, Control(commands.call, sessions, room_log), reports)
    # A lane that fails ends the process, which is started anew: its callers would wait for ever.
    async with asyncio.TaskGroup() as tasks:
        parts = store, commands, *room_log.lanes
        running = [tasks.create_task(part.run()) for part in parts]
        await _Server(settings, app, ready).serve(sockets=[sock])
        for task in running:
            task.cancel()
    return 0


class _Server(uvicorn.Server):
    """uvicorn, told to stop by us, and telling us when it serves."""

    def __init__(self, settings: Settings, app: ASGIApp, ready: Callable[[], None]) -> None:
        tls = settings.control_tls
        super().__init__(
            uvicorn.Config(
                app,
                log_config=None,
                log_level="error",  # It has a warning for every peer that talks nonsense.
                access_log=False,
                server_header=False,
                date_header=False,
                ws="none",
                lifespan="off",
                timeout_graceful_shutdown=STOP_SECONDS,
                ssl_certfile=settings.tls_certfile if tls else None,
                ssl_keyfile=settings.tls_keyfile if tls else None,
            )
        )
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        self._ready()

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """uvicorn would hang up on those whom it has accepted and not yet heard."""
        for server in self.servers:
            server.close()
        await asyncio.sleep(HEAR_SECONDS)
        await super().shutdown(sockets)

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """uvicorn's own would end the process by the signal, which is no exit code of ours."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            loop.add_signal_handler(number, self._stop)
        yield

    def _stop(self) -> None:
        self.should_exit = True

"""One worker: builds every object once, then starts, serves, drains, stops.

socket ─▶ Listener ─▶ Connection ─▶ Hub ─▶ ChatProtocol (core)
                                     │         │ effects
                                     ▼         ▼
                        Fanout ◀── RoomLog, Mirror ◀── Lane, Subscription ◀─▶ Redis
"""

from __future__ import annotations

import asyncio
import gc
import resource
import secrets
import signal
import socket
import ssl
import time
from collections.abc import Callable, Coroutine, Iterable
from pathlib import Path

import uvloop

from chatserver import telemetry
from chatserver.core.errors import StoreUnavailable
from chatserver.core.flow import Limits
from chatserver.core.handshake import Policy
from chatserver.metrics import measured
from chatserver.net.compression import SharedDeflate
from chatserver.net.hub import Hub
from chatserver.net.listener import Listener
from chatserver.net.tokens import TokenCounter
from chatserver.reports import Report
from chatserver.settings import Settings
from chatserver.store.cluster import store_at
from chatserver.store.keyring import Keyring
from chatserver.store.keys import CHANNEL
from chatserver.store.log import RoomLog
from chatserver.store.registry import Registry
from chatserver.store.revocations import Mirror
from chatserver.store.sessions import Sessions

EXIT_OK = 0
EXIT_STORE = 69
START_SECONDS = 10.0
"""How long the store may take to answer at the start."""
DESCRIPTORS_KEPT = 200
"""Of the descriptor limit, for everything that is no client."""
GOODBYE_SECONDS = 3.5
"""After the last bye: an answer under way takes a second, a peer's close frame two at most."""
UNLIMITED_CONNECTIONS = 100_000
"""Where there is no descriptor limit at all; some 600 MB of them."""
FREEZE_CONNECTIONS = 500
TICK_SECONDS = 0.25
REPORT_SECONDS = 1.0
SUMMARY_SECONDS = 10.0
"""Between two lines of the log about refused handshakes."""

log = telemetry.logger(__name__)


def run(
    settings: Settings,
    sock: socket.socket,
    ready: Callable[[], None],
    report: Path | None = None,
) -> int:
    """Serve on a bound socket until SIGTERM, or until SIGHUP hands it over. Returns the exit code.

    ``ready`` is called once, when clients are accepted. ``report`` is a file for what is counted.
    """
    return uvloop.run(Worker(settings, report).serve(sock, ready))


class Worker:
    """Everything one process holds."""

    def __init__(self, settings: Settings, report: Path | None) -> None:
        self._settings = settings
        self._report = None if report is None else Report(report)
        assert settings.redis_url is not None
        keyring = Keyring.of(settings)
        store = store_at(settings.redis_url.get_secret_value())
        # Of its own, so that no storm of handshakes delays a revocation.
        polls, sessions_lane = store.lane(name="poll"), store.lane(name="sessions")
        worker = "w-" + secrets.token_hex(6)
        registry = Registry(sessions_lane, worker, settings.user_connections)
        room_log = RoomLog.of(settings, store)
        self._hub = Hub(
            keyring=keyring,
            room_log=room_log,
            limits=limits_of(settings),
            ping_timeout=settings.ping_timeout,
            slow_seconds=settings.slow_seconds,
            registry=registry,
            worker=worker,
        )
        fanout = self._hub.fanout
        rooms = store.subscription(fanout.receive_live, fanout.confirm)
        fanout.attach(rooms)
        self._mirror = Mirror(polls, worker, self._hub)
        self._hub.attach(self._mirror)
        # Of its own, so that no burst of messages delays a revocation.
        revocations = store.subscription(self._hear, lambda channel: self._mirror.wake())
        revocations.subscribe(CHANNEL)
        sessions = Sessions.of(settings, sessions_lane.call)
        clients = _room_for_clients()
        self._listener = Listener(
            self._hub,
            TokenCounter(sessions_lane.call, keyring, sessions, self._mirror),
            policy_of(settings),
            frame_bytes=settings.frame_bytes,
            extensions=[SharedDeflate()] if settings.compression == "shared" else [],
            handshake_rate=settings.handshake_rate,
            admission_rate=settings.admission_rate,
            handshake_seconds=settings.handshake_seconds,
            connections=settings.connections or clients,
            sockets=clients + min(DESCRIPTORS_KEPT // 2, clients // 4),
        )
        self._running = [
            store.run,
            *(lane.run for lane in room_log.lanes),
            polls.run,
            sessions_lane.run,
            registry.run,
            rooms.run,
            revocations.run,
            self._mirror.run,
            self._hub.wheel.run,
            self._tick,
        ]
        self._stopping = asyncio.Event()
        self._replaced = False
        """Another worker serves on the same socket."""
        self._frozen = -FREEZE_CONNECTIONS
        self._ending = False

    async def serve(self, sock: socket.socket, ready: Callable[[], None]) -> int:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._stopping.set)
        loop.add_signal_handler(signal.SIGHUP, self._be_replaced)
        async with asyncio.TaskGroup() as tasks:
            running = [tasks.create_task(self._keep(run)) for run in self._running]
            try:
                return await self._serve(sock, ready)
            finally:
                self._ending = True
                await _end(running)

    async def _keep(self, run: Callable[[], Coroutine[None, None, None]]) -> None:
        """A part that ends as if cancelled, by nobody here, ends the worker: to a TaskGroup that is
        no failure, and without that part it would look well."""
        try:
            await run()
        except asyncio.CancelledError:
            if self._ending:
                raise
            raise RuntimeError(f"{run!r} was lost") from None

    async def _serve(self, sock: socket.socket, ready: Callable[[], None]) -> int:
        if not await self._current():
            log.error("the store cannot be reached")
            return EXIT_STORE
        await self._look_at_the_store()
        self._spare_collections()
        await self._listener.start(sock, tls_of(self._settings))
        self._write_report()
        ready()
        await self._stopping.wait()
        log.info("draining", connections=len(self._hub))
        if self._replaced:
            self._listener.hand_over()
        else:
            self._listener.stop()
        await self._hub.drain(self._settings.drain_seconds)
        await self._listener.wait_emptied(GOODBYE_SECONDS)
        self._listener.close()
        await self._mirror.resign()
        self._write_report()
        log.info("stopped")
        return EXIT_OK

    def _be_replaced(self) -> None:
        if not self._stopping.is_set():
            self._replaced = True
            self._stopping.set()

    def _hear(self, channel: str, payload: bytes) -> None:
        self._hub.superseding.hear(payload)
        self._mirror.wake()

    async def _current(self) -> bool:
        """Wait until revocations are known; without them nobody could be let in."""
        deadline = time.monotonic() + START_SECONDS
        while not self._mirror.loaded:
            if time.monotonic() > deadline or self._stopping.is_set():
                return False
            await asyncio.sleep(0.01)
        return True

    async def _look_at_the_store(self) -> None:
        """Say before it happens that what is relied on may be forgotten. ``check`` says more."""
        assert self._settings.redis_url is not None
        try:
            async with store_at(self._settings.redis_url.get_secret_value()) as store:
                found = await store.describe()
        except StoreUnavailable:
            return  # It answered a moment ago: every other worker that starts looks, too.
        if found["policy"] != "noeviction":
            log.error(
                "the store may forget revocations and messages",
                maxmemory_policy=found["policy"],
                needed="noeviction",
            )

    def _spare_collections(self) -> None:
        """Keep idle sockets out of the garbage collector's way.

        A full collection looks at every object: with 15,000 sockets it stopped the loop for a
        quarter of a second. Frozen objects are not looked at. What is freed without a cycle goes
        as ever; what is not waits until half of the connections have gone.
        """
        connections = len(self._hub)
        if self._frozen // 2 <= connections < self._frozen + FREEZE_CONNECTIONS:
            return
        if connections < self._frozen:
            gc.unfreeze()
            gc.collect()
        gc.freeze()
        self._frozen = connections

    async def _tick(self) -> None:
        reported_at = summed_up_at = time.monotonic()
        while True:
            began = time.monotonic()
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            measured.event_loop_lag_seconds.observe(now - began - TICK_SECONDS)
            self._hub.fanout.tick()
            self._listener.sweep()
            self._spare_collections()
            if now - reported_at > REPORT_SECONDS - TICK_SECONDS / 2:
                reported_at = now
                self._write_report()
            if now - summed_up_at > SUMMARY_SECONDS:
                summed_up_at = now
                self._listener.report()

    def _write_report(self) -> None:
        if self._report is None:
            return
        accepting = self._listener.accepting and self._hub.fresh()
        measured.connections = len(self._hub)
        measured.rooms = self._hub.fanout.occupied
        measured.lagging_connections = self._hub.lagging()
        measured.pending_handshakes = self._listener.pending
        measured.ready = float(accepting)
        used = resource.getrusage(resource.RUSAGE_SELF)
        measured.process_cpu_seconds = used.ru_utime + used.ru_stime
        self._report.write(measured)


async def _end(tasks: Iterable[asyncio.Task[None]]) -> None:
    """Cancel until it is done: a TaskGroup loses a cancellation that meets a child's failure."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.1)


def limits_of(settings: Settings) -> Limits:
    return Limits(
        frame_bytes=settings.frame_bytes,
        rooms=settings.rooms,
        send_rate=settings.send_rate,
        send_burst=settings.send_burst,
        command_rate=settings.command_rate,
        command_burst=settings.command_burst or settings.rooms + 64,
        key_window=settings.key_window,
        history=settings.history,
        replay=settings.replay,
        ping_interval=settings.ping_interval,
    )


def policy_of(settings: Settings) -> Policy:
    # In development, pages from this machine may connect unless the origins are named.
    anyone_local = not settings.production and not settings.allowed_origins
    return Policy(
        origins=None if anyone_local else frozenset(settings.allowed_origins),
        https_required=settings.production,
        trusted_proxies=settings.trusted_proxies,
        page=not settings.production,
    )


def tls_of(settings: Settings) -> ssl.SSLContext | None:
    if settings.tls_certfile is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(settings.tls_certfile, settings.tls_keyfile)
    return context


def _room_for_clients() -> int:
    """The process's descriptor limit, raised as far as it may be, less what else needs them."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if hard == resource.RLIM_INFINITY:
        return soft - DESCRIPTORS_KEPT if soft > DESCRIPTORS_KEPT else UNLIMITED_CONNECTIONS
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return max(hard - DESCRIPTORS_KEPT, hard // 2)

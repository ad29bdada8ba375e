"""One host: the listening sockets, the workers, the private store.

The supervisor binds one ``SO_REUSEPORT`` socket per worker slot and hands its descriptor down, so
that a slot's queue of connections outlives any worker in it. It serves nobody itself. Everything
runs on one asyncio loop in the main thread, which must be the one that starts children (see
``tethered``).

What a worker owes: one byte on ``--ready-fd`` as soon as it serves, a drain on SIGTERM, and the
exit codes below.
"""

from __future__ import annotations

import asyncio
import errno
import os
import signal
import socket
import ssl
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from typing import Final, NamedTuple

from pydantic import SecretStr

from chatserver import telemetry
from chatserver.settings import (
    ConfigurationError,
    Settings,
    development_secret,
    environ,
    variable,
)
from chatserver.store.embedded import EmbeddedStore, StoreFailed, tethered
from chatserver.store.keyring import weaknesses

EXIT_OK = 0
EXIT_STORE = 69
EXIT_INTERNAL = 70
EXIT_CONFIGURATION = 78

BACKLOG = 4096
READY_SECONDS = 20.0
KILL_SECONDS = 10.0
"""How long after the end of its drain a worker may still be there."""
EXIT_SECONDS = 2.0
"""How long a worker that failed to start may take to say so with its exit code."""
BIND_SECONDS = 1.0

WORKER: Final = (sys.executable, "-m", "chatserver", "worker")
CONTROL: Final = (sys.executable, "-m", "chatserver", "control")

log = telemetry.logger("supervisor")


class Address(NamedTuple):
    host: str
    port: int


class Slot(NamedTuple):
    """A place for a process that is kept alive: its socket outlives any process in it."""

    name: str
    listener: socket.socket
    command: Sequence[str]
    vital: bool = True
    """Without it there is no server: the others end when it keeps dying. What is not vital is
    tried again for as long as they run."""


OnReady = Callable[[Address], None]


def run(
    settings: Settings,
    on_ready: OnReady = lambda address: None,
    command: Sequence[str] = WORKER,
) -> int:
    """Serve until told to stop. Returns the exit code.

    ``on_ready`` is called once, when every worker serves. Raises ConfigurationError or StoreFailed
    when it cannot even start; then nothing runs and nothing listens.
    """
    if reasons := refusals(settings):
        raise ConfigurationError(reasons)
    with ExitStack() as sockets:
        listeners = bind(settings.host, settings.port, settings.workers)
        for listener in listeners:
            sockets.enter_context(listener)
        address = Address(*listeners[0].getsockname()[:2])
        slots = [Slot("worker", listener, command) for listener in listeners]
        if settings.control_key is not None:
            control = sockets.enter_context(bind_control(settings))
            slots.append(Slot("control", control, CONTROL, vital=False))
            settings = settings.model_copy(update={"control_port": control.getsockname()[1]})
            log.info("control_bound", host=settings.control_host, port=settings.control_port)
        store = None if settings.redis_url else EmbeddedStore(settings.data_dir)
        settled = _settled(settings, address, store)
        supervisor = Supervisor(settled, slots, store)
        return asyncio.run(supervisor.run(lambda: on_ready(address)))


def refusals(settings: Settings) -> list[str]:
    """Every reason not to start with these settings, as sentences."""
    reasons = settings.problems()
    for name in ("secret", "secret_previous"):
        secret: SecretStr | None = getattr(settings, name)
        if secret is not None:
            found = weaknesses(secret.get_secret_value().encode())
            reasons += [f"{variable(name)} is not fit to sign tokens. {why}" for why in found]
    reasons += _control_problems(settings)
    if settings.tls_certfile and settings.tls_keyfile:
        reasons += _tls_problems(str(settings.tls_certfile), str(settings.tls_keyfile))
    return reasons


def _control_problems(settings: Settings) -> list[str]:
    if settings.control_key is None:
        return []
    key = settings.control_key.get_secret_value()
    reasons = [
        f"CHATSERVER_CONTROL_KEY is not fit to guard the control API. {why}"
        for why in weaknesses(key.encode())
    ]
    if settings.secret is not None and key == settings.secret.get_secret_value():
        reasons.append("CHATSERVER_CONTROL_KEY is CHATSERVER_SECRET: it needs one of its own.")
    if settings.port and settings.port == settings.control_port and _overlap(settings):
        reasons.append("CHATSERVER_PORT and CHATSERVER_CONTROL_PORT are the same: change one.")
    return reasons


def _overlap(settings: Settings) -> bool:
    """Whether one port cannot be had for both. What only a resolver knows is left to ``bind``."""
    hosts = {settings.host, settings.control_host}
    return len(hosts) == 1 or bool(hosts & {"0.0.0.0", "::", ""})


def _tls_problems(certfile: str, keyfile: str) -> list[str]:
    asked = False

    def password() -> str:
        nonlocal asked
        asked = True
        return ""

    try:
        ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER).load_cert_chain(certfile, keyfile, password)
    except OSError as error:  # ssl.SSLError is one.
        if asked:
            return ["CHATSERVER_TLS_KEYFILE is encrypted, and there is nobody to ask for its key."]
        why = "they are not" if isinstance(error, ssl.SSLError) else error.strerror
        return [
            "CHATSERVER_TLS_CERTFILE and CHATSERVER_TLS_KEYFILE must be readable PEM files of one "
            f"certificate and its key: {why}."
        ]
    return []


def _settled(settings: Settings, address: Address, store: EmbeddedStore | None) -> Settings:
    """The settings as the workers get them: nothing left to find out."""
    found: dict[str, object] = {"port": address.port}
    if store is not None:
        found["redis_url"] = SecretStr(store.url)
    if settings.secret is None:
        found["secret"] = SecretStr(development_secret(settings.data_dir).decode())
    return settings.model_copy(update=found)


def bind(host: str, port: int, slots: int) -> list[socket.socket]:
    """One listening socket per slot, all on one port. Raises ConfigurationError."""
    listeners: list[socket.socket] = []
    try:
        family, *_, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if port:
            _insist_on_a_free_port(family, place)
        for _ in range(slots):
            listeners.append(_listener(family, place))
            place = listeners[0].getsockname()
    except (OSError, UnicodeError) as error:
        for listener in listeners:
            listener.close()
        raise ConfigurationError([_why_not(host, port, error)]) from None
    return listeners


def bind_control(settings: Settings) -> socket.socket:
    """The control API's listening socket. Raises ConfigurationError."""
    host, port = settings.control_host, settings.control_port
    try:
        family, *_, place = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        if port:
            _insist_on_a_free_port(family, place)
        return _listener(family, place, shared=False)
    except (OSError, UnicodeError) as error:
        why = _why_not(host, port, error)
        why = why.replace("CHATSERVER_HOST", "CHATSERVER_CONTROL_HOST")
        why = why.replace("--port", "CHATSERVER_CONTROL_PORT")
        raise ConfigurationError([f"The control API cannot be served. {why}"]) from None


def _listener(family: int, place: tuple[object, ...], *, shared: bool = True) -> socket.socket:
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if shared:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        listener.bind(place)
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _insist_on_a_free_port(family: int, place: tuple[object, ...]) -> None:
    """SO_REUSEPORT would share the port with another server of this user, and its clients too."""
    deadline = time.monotonic() + BIND_SECONDS
    while True:
        with socket.socket(family, socket.SOCK_STREAM) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                return probe.bind(place)
            except OSError as error:
                # The workers of one that was killed a moment ago may not be gone yet.
                if error.errno != errno.EADDRINUSE or time.monotonic() > deadline:
                    raise
        time.sleep(0.02)


def _why_not(host: str, port: int, error: OSError | UnicodeError) -> str:
    code = None if isinstance(error, UnicodeError | socket.gaierror) else error.errno
    match code:
        case errno.EADDRINUSE:
            return f"Port {port} on {host} is in use: choose another with --port."
        case errno.EACCES:
            return f"This user may not listen on port {port}: choose one above 1023 with --port."
        case _:
            return f"CHATSERVER_HOST: {host!r} is not an address of this machine."


class Restarts:
    """When something that died may start again. Times are seconds on a monotonic clock."""

    FIRST_DELAY = 0.1
    LONGEST_DELAY = 5.0
    HEALTHY_SECONDS = 30.0
    UNREADY_DEATHS = 5
    WINDOW_SECONDS = 60.0
    WINDOW_DEATHS = 10

    def __init__(self) -> None:
        self._delay = self.FIRST_DELAY
        self._unready = 0
        self._deaths: deque[float] = deque(maxlen=self.WINDOW_DEATHS)

    def died(self, now: float, *, lived: float, was_ready: bool) -> float | None:
        """Seconds to wait before the next start, or None: give up."""
        self._deaths.append(now)
        self._unready = 0 if was_ready else self._unready + 1
        full = len(self._deaths) == self.WINDOW_DEATHS
        if self._unready == self.UNREADY_DEATHS:
            return None
        if full and now - self._deaths[0] <= self.WINDOW_SECONDS:
            return None
        delay = self.FIRST_DELAY if lived >= self.HEALTHY_SECONDS else self._delay
        self._delay = min(2 * delay, self.LONGEST_DELAY)
        return delay


class Supervisor:
    """The children of one host, from the first start to the last exit."""

    def __init__(
        self,
        settings: Settings,
        slots: Sequence[Slot],
        store: EmbeddedStore | None,
    ) -> None:
        self._settings = settings
        self._environ = environ(settings)
        self._slots = slots
        self._store = store
        self._workers: dict[int, asyncio.subprocess.Process] = {}
        self._ready: set[int] = set()
        self._started = False
        self._stopping = asyncio.Event()
        self._child_died = asyncio.Event()
        self._exit_code = EXIT_OK

    async def run(self, on_ready: Callable[[], None]) -> int:
        self._listen_to_signals()
        try:
            if self._store is not None:
                await self._start_store(self._store)
            await self._serve(on_ready)
        finally:
            self._kill_workers()
            if self._store is not None:
                self._store.stop()
        log.info("stopped", exit_code=self._exit_code)
        return self._exit_code

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._signalled, number)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # As under nohup.
            loop.add_signal_handler(signal.SIGHUP, self._signalled, signal.SIGHUP)
        loop.add_signal_handler(signal.SIGCHLD, self._child_died.set)

    def _signalled(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            log.warning("stopping_at_once", signal=number.name)
            self._kill_workers()
        else:
            log.info("draining", signal=number.name)
            self._stop(EXIT_OK)

    async def _serve(self, on_ready: Callable[[], None]) -> None:
        async with asyncio.TaskGroup() as tasks:
            for slot in range(len(self._slots)):
                tasks.create_task(self._keep(slot, on_ready))
            if self._store is not None:
                tasks.create_task(self._keep_store(self._store))

    def _stop(self, code: int) -> None:
        """Let the workers drain, then end with ``code``. Only the first reason counts."""
        if self._stopping.is_set():
            return
        self._exit_code = code
        self._stopping.set()
        self._child_died.set()
        for worker in self._workers.values():
            _send(worker, signal.SIGTERM)
        patience = self._settings.drain_seconds + KILL_SECONDS
        asyncio.get_running_loop().call_later(patience, self._kill_workers)

    def _kill_workers(self) -> None:
        for slot, worker in self._workers.items():
            if _send(worker, signal.SIGKILL):
                log.warning(f"{self._slots[slot].name}_killed", slot=slot, pid=worker.pid)

    async def _keep(self, slot: int, on_ready: Callable[[], None]) -> None:
        """Have a process in this slot until the supervisor stops."""
        restarts = Restarts()
        while not self._stopping.is_set():
            born = time.monotonic()
            status = await self._live(slot, on_ready)
            was_ready = slot in self._ready
            self._ready.discard(slot)
            if self._stopping.is_set():
                return
            now = time.monotonic()
            delay = restarts.died(now, lived=now - born, was_ready=was_ready)
            if delay is None and self._started and not self._slots[slot].vital:
                delay = Restarts.LONGEST_DELAY
            log.error(
                f"{self._slots[slot].name}_died",
                slot=slot,
                status=status,
                ready=was_ready,
                restart_in=delay,
            )
            final = status in (EXIT_STORE, EXIT_CONFIGURATION)
            if delay is None or (final and not self._started):
                self._stop(status if final else EXIT_INTERNAL)
            else:
                await self._pause(delay)

    async def _live(self, slot: int, on_ready: Callable[[], None]) -> int:
        """One worker's life. Returns its exit status, negative for a signal."""
        reading, writing = os.pipe()
        try:
            worker = await self._start_worker(slot, writing)
        except OSError as error:  # No memory, no processes left: as good as dead.
            os.close(reading)
            log.error(f"{self._slots[slot].name}_not_started", slot=slot, reason=error.strerror)
            return EXIT_INTERNAL
        finally:
            os.close(writing)
        self._workers[slot] = worker
        if self._stopping.is_set():
            _send(worker, signal.SIGTERM)
        if await _first_byte(reading, READY_SECONDS):
            self._became_ready(slot, worker.pid, on_ready)
        elif not await _gone(worker, EXIT_SECONDS) and not self._stopping.is_set():
            _send(worker, signal.SIGKILL)
        status = await worker.wait()
        del self._workers[slot]
        return status

    async def _start_worker(self, slot: int, writing: int) -> asyncio.subprocess.Process:
        listener = self._slots[slot].listener.fileno()
        command = [*self._slots[slot].command, "--fd", str(listener), "--ready-fd", str(writing)]
        return await asyncio.create_subprocess_exec(
            # SIGKILL: an orphan that hangs must not keep the port.
            *tethered(command, signal.SIGKILL),
            env=self._environ,
            pass_fds=(listener, writing),
            stdin=asyncio.subprocess.DEVNULL,
            # Ctrl-C in the terminal is for the supervisor alone, which then tells the workers.
            process_group=0,
        )

    def _became_ready(self, slot: int, pid: int, on_ready: Callable[[], None]) -> None:
        self._ready.add(slot)
        log.info(f"{self._slots[slot].name}_ready", slot=slot, pid=pid)
        if len(self._ready) == len(self._slots) and not self._started:
            self._started = True
            on_ready()

    async def _start_store(self, store: EmbeddedStore) -> None:
        store.launch()
        # It only waits: what starts the process must stay in this thread.
        await asyncio.to_thread(store.wait_ready)
        log.info("store_ready", pid=store.pid)

    async def _keep_store(self, store: EmbeddedStore) -> None:
        """Start the store again when it dies: its log has everything."""
        restarts = Restarts()
        born = time.monotonic()
        while not self._stopping.is_set():
            await self._child_died.wait()
            self._child_died.clear()
            if store.alive or self._stopping.is_set():
                continue
            now = time.monotonic()
            delay = restarts.died(now, lived=now - born, was_ready=True)
            log.error("store_died", restart_in=delay)
            if delay is None:
                self._stop(EXIT_STORE)
                continue
            await self._pause(delay)
            born = time.monotonic()
            try:
                await self._start_store(store)
            except StoreFailed as error:
                log.error("store_not_started", reason=str(error))
                self._stop(EXIT_STORE)

    async def _pause(self, seconds: float) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await self._stopping.wait()


def _send(worker: asyncio.subprocess.Process, number: signal.Signals) -> bool:
    """Whether the worker was still there to get the signal."""
    if worker.returncode is not None:
        return False
    with suppress(ProcessLookupError):
        worker.send_signal(number)
        return True
    return False


async def _gone(worker: asyncio.subprocess.Process, seconds: float) -> bool:
    try:
        async with asyncio.timeout(seconds):
            await worker.wait()
    except TimeoutError:
        return False
    return True


async def _first_byte(reading: int, seconds: float) -> bool:
    """Whether a byte arrives in time; False at once when the other end is closed without one."""
    loop = asyncio.get_running_loop()
    arrived: asyncio.Future[bool] = loop.create_future()

    def readable() -> None:
        loop.remove_reader(reading)
        arrived.set_result(os.read(reading, 1) != b"")

    loop.add_reader(reading, readable)
    try:
        async with asyncio.timeout(seconds):
            return await arrived
    except TimeoutError:
        return False
    finally:
        loop.remove_reader(reading)
        os.close(reading)

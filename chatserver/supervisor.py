"""One host: the listening sockets, the workers, the private store.

The supervisor binds one ``SO_REUSEPORT`` socket per worker slot and hands its descriptor down, so
that a slot's queue of connections outlives any worker in it. It serves nobody itself. Everything
runs on one asyncio loop in the main thread, which must be the one that starts children (see
``tethered``).

What a worker owes: one byte on ``--ready-fd`` as soon as it serves and one a second from then on
(``heartbeat``), a drain on SIGTERM and on SIGHUP, and the exit codes below. SIGTERM means that the
host goes: newcomers are turned away. SIGHUP means that another worker has come to the same socket:
the newcomers are that one's.
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
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Final, NamedTuple

from pydantic import SecretStr

from chatserver import reports, telemetry
from chatserver.reports import Reports
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
SYNC_SECONDS = 1.0
"""How much of the private store's writing a machine that dies may lose, but for the sync's time."""
BEAT_SECONDS = 1.0
HUNG_BEATS = 5
"""So many of the supervisor's own seconds without a beat, and a process hangs. No clock is read:
where both were stopped together, a suspended host, none of them has passed."""

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
    reports: Reports | None = None
    """Where its processes tell what they count, if somebody may ask."""


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
    with ExitStack() as kept:
        listeners = bind(settings.host, settings.port, settings.workers)
        for listener in listeners:
            kept.enter_context(listener)
        address = Address(*listeners[0].getsockname()[:2])
        slots = [Slot("worker", listener, command) for listener in listeners]
        if settings.control_key is not None:
            control = kept.enter_context(bind_control(settings))
            told = kept.enter_context(reports.kept())
            slots = [slot._replace(reports=told) for slot in slots]
            where = ["--reports", str(told.directory)] if told else []
            slots.append(Slot("control", control, [*CONTROL, *where], vital=False))
            settings = settings.model_copy(update={"control_port": control.getsockname()[1]})
            log.info("control_bound", host=settings.control_host, port=settings.control_port)
        store = None if settings.redis_url else EmbeddedStore(settings.data_dir)
        settled = _settled(settings, address, store)
        supervisor = Supervisor(settled, slots, store, lambda: on_ready(address))
        return asyncio.run(supervisor.run())


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
    for name in ("secret", "secret_previous"):
        secret: SecretStr | None = getattr(settings, name)
        if secret is not None and key == secret.get_secret_value():
            reasons.append(f"CHATSERVER_CONTROL_KEY is {variable(name)}: it needs one of its own.")
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
    LONGEST_DELAY = 2.0
    """Newcomers may wait so long in the queue of a slot that is empty."""
    HEALTHY_SECONDS = 30.0
    UNREADY_DEATHS = 5
    WINDOW_SECONDS = 180.0
    WINDOW_DEATHS = 25
    """One that dies whenever it serves gets there in a minute or so, one that is killed by hand
    every ten seconds never."""

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


class Child:
    """One process in a slot, and the pipe on which it shows that it lives."""

    def __init__(self, process: asyncio.subprocess.Process, pulse: int) -> None:
        self.pid = process.pid
        self._process = process
        self._pulse = pulse
        # One for all who wait: asyncio keeps what is left of every wait that was given up.
        self._exit = asyncio.create_task(process.wait())

    @classmethod
    async def start(
        cls, slot: Slot, environment: Mapping[str, str], report: Path | None = None
    ) -> Child:
        """Raises OSError: no memory, no processes left."""
        pulse, writing = os.pipe()
        listener = slot.listener.fileno()
        where = [] if report is None else ["--report", str(report)]
        command = [*slot.command, *where, "--fd", str(listener), "--ready-fd", str(writing)]
        try:
            process = await asyncio.create_subprocess_exec(
                # SIGKILL: an orphan that hangs must not keep the port.
                *tethered(command, signal.SIGKILL),
                env=environment,
                pass_fds=(listener, writing),
                stdin=asyncio.subprocess.DEVNULL,
                # Ctrl-C in the terminal is for the supervisor alone, which then tells the workers.
                process_group=0,
            )
        except OSError:
            os.close(pulse)
            raise
        finally:
            os.close(writing)
        os.set_blocking(pulse, False)
        return cls(process, pulse)

    async def wait_ready(self, seconds: float) -> bool:
        """Whether it beats for the first time; False at once when it ends without."""
        loop = asyncio.get_running_loop()
        readable = asyncio.Event()
        loop.add_reader(self._pulse, readable.set)
        try:
            async with asyncio.timeout(seconds):
                await readable.wait()
        except TimeoutError:
            return False
        finally:
            loop.remove_reader(self._pulse)
        return self.has_beaten()

    def has_beaten(self) -> bool:
        """Since the last time that this was asked."""
        try:
            return os.read(self._pulse, 65_536) != b""
        except BlockingIOError:
            return False

    async def gone(self, seconds: float) -> bool:
        done, _ = await asyncio.wait([self._exit], timeout=seconds)
        return bool(done)

    async def end(self) -> int:
        """Wait for its end. Returns its exit status, negative for a signal."""
        status = await self._exit
        os.close(self._pulse)
        return status

    def send(self, number: signal.Signals) -> bool:
        """Whether it was still there to get the signal."""
        if self._process.returncode is not None:
            return False
        with suppress(ProcessLookupError):
            self._process.send_signal(number)
            return True
        return False


def heartbeat(descriptor: int) -> Callable[[], None]:
    """What a worker calls, on its event loop, when it serves: from then on the loop beats."""
    os.set_blocking(descriptor, False)

    def beat() -> None:
        # Full: the supervisor has not read for hours. Broken: it is gone, see ``tethered``.
        with suppress(BlockingIOError, BrokenPipeError):
            os.write(descriptor, b"1")
        asyncio.get_running_loop().call_later(BEAT_SECONDS, beat)

    return beat


class Keeper:
    """Has a process in a slot, and starts another when that one dies, until it is relieved.

    A rolling restart gives a slot a second keeper, and relieves the first as soon as the second
    one's process serves. Until then either goes its own way: whichever process dies, and whenever,
    there is never a slot that two believe to be theirs, or nobody.
    """

    def __init__(
        self,
        place: int,
        slot: Slot,
        environment: Mapping[str, str],
        started: asyncio.Event,
        on_ready: Callable[[], None],
    ) -> None:
        self.ready = False
        self.over = asyncio.Event()
        self._place = place
        self._slot = slot
        self._environment = environment
        self._started = started
        self._on_ready = on_ready
        self._relieved = asyncio.Event()
        self._child: Child | None = None
        self._report: Path | None = None
        self._born = 0.0

    def report(self, report: Callable[..., None], event: str, **details: object) -> None:
        """A line of the log about this slot."""
        report(f"{self._slot.name}_{event}", slot=self._place, **details)

    async def start(self) -> bool:
        """Start a process; whether it serves. One that does not in time is killed."""
        self._child, self._born = None, time.monotonic()
        if self._slot.reports is not None:
            self._report = self._slot.reports.begin(self._place)
        try:
            child = self._child = await Child.start(self._slot, self._environment, self._report)
        except OSError as error:  # As good as dead.
            self.report(log.error, "not_started", reason=error.strerror)
            return False
        if self._relieved.is_set():
            child.send(signal.SIGTERM)
        if await child.wait_ready(READY_SECONDS):
            self.ready = True
            self.report(log.info, "ready", pid=child.pid)
            self._on_ready()
        elif not await child.gone(EXIT_SECONDS) and not self._relieved.is_set():
            child.send(signal.SIGKILL)
        return self.ready

    async def watch(self) -> int:
        """Wait for the end of the process; its exit status. One that hangs is killed."""
        if self._child is None:
            return EXIT_INTERNAL
        silent = 0
        while self.ready and not await self._child.gone(BEAT_SECONDS):
            silent = 0 if self._child.has_beaten() else silent + 1
            if silent == HUNG_BEATS:
                why = f"It has not moved for {HUNG_BEATS} s, and is killed."
                self.report(log.error, "hung", pid=self._child.pid, reason=why)
                self._child.send(signal.SIGKILL)
        status = await self._child.end()
        if self._slot.reports is not None and self._report is not None:
            self._slot.reports.retire(self._report)
        return status

    async def keep(self) -> int:
        """Once started, until relieved. Returns the code to end the host with, else EXIT_OK."""
        restarts = Restarts()
        while True:
            status = await self.watch()
            was_ready, self.ready = self.ready, False
            if self._relieved.is_set():
                return EXIT_OK
            now = time.monotonic()
            delay = restarts.died(now, lived=now - self._born, was_ready=was_ready)
            # Without a store nobody could start; those who did before keep their sockets open.
            bearable = not self._slot.vital or status == EXIT_STORE
            if delay is None and self._started.is_set() and bearable:
                delay = Restarts.LONGEST_DELAY
            self.report(log.error, "died", status=status, ready=was_ready, restart_in=delay)
            final = status in (EXIT_STORE, EXIT_CONFIGURATION)
            if delay is None or (final and not self._started.is_set()):
                return status if final else EXIT_INTERNAL
            if await _set_within(self._relieved, delay):
                return EXIT_OK
            await self.start()

    def relieve(self, number: signal.Signals) -> None:
        """Start no process any more; the last one is told with this signal to drain."""
        self._relieved.set()
        if self._child is not None:
            self._child.send(number)

    def kill(self) -> None:
        if self._child is not None and self._child.send(signal.SIGKILL):
            self.report(log.warning, "killed", pid=self._child.pid)


class Supervisor:
    """The children of one host, from the first start to the last exit."""

    def __init__(
        self,
        settings: Settings,
        slots: Sequence[Slot],
        store: EmbeddedStore | None,
        on_ready: Callable[[], None],
    ) -> None:
        self._settings = settings
        self._environ = environ(settings)
        self._patience = settings.drain_seconds + KILL_SECONDS
        self._slots = slots
        self._store = store
        self._on_ready = on_ready
        self._keepers: list[Keeper] = []
        """By slot."""
        self._everyone: set[Keeper] = set()
        """Those, who was relieved and is still there, and who is to take over."""
        self._started = asyncio.Event()
        self._stopping = asyncio.Event()
        self._to_roll = asyncio.Event()
        self._child_died = asyncio.Event()
        self._exit_code = EXIT_OK

    async def run(self) -> int:
        self._listen_to_signals()
        try:
            if self._store is not None:
                await self._start_store(self._store)
            await self._serve()
        finally:
            self._kill_all()
            if self._store is not None:
                self._store.stop()
        log.info("stopped", exit_code=self._exit_code)
        return self._exit_code

    def _listen_to_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, self._told_to_stop, number)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # As under nohup.
            loop.add_signal_handler(signal.SIGHUP, self._hung_up, _has_terminal())
        loop.add_signal_handler(signal.SIGCHLD, self._child_died.set)

    def _told_to_stop(self, number: signal.Signals) -> None:
        if self._stopping.is_set():
            log.warning("stopping_at_once", signal=number.name)
            self._kill_all()
        else:
            log.info("draining", signal=number.name)
            self._stop(EXIT_OK)

    def _hung_up(self, had_terminal: bool) -> None:
        """By an operator, who wants new processes; or by a terminal that has closed."""
        if had_terminal and not _has_terminal():
            self._told_to_stop(signal.SIGHUP)
        elif not self._stopping.is_set():
            self._to_roll.set()

    async def _serve(self) -> None:
        self._keepers = [self._keeper(place) for place in range(len(self._slots))]
        async with asyncio.TaskGroup() as tasks:
            for keeper in self._keepers:
                tasks.create_task(self._begin(keeper))
            tasks.create_task(self._roll_when_told(tasks))
            if self._store is not None:
                tasks.create_task(self._keep_store(self._store))
                tasks.create_task(self._sync_store(self._store))

    def _keeper(self, place: int) -> Keeper:
        slot = self._slots[place]
        keeper = Keeper(place, slot, self._environ, self._started, self._became_ready)
        self._everyone.add(keeper)
        return keeper

    def _became_ready(self) -> None:
        if not self._started.is_set() and all(keeper.ready for keeper in self._keepers):
            self._started.set()
            self._on_ready()

    async def _begin(self, keeper: Keeper) -> None:
        await keeper.start()
        await self._keep(keeper)

    async def _keep(self, keeper: Keeper) -> None:
        code = await keeper.keep()
        self._everyone.discard(keeper)
        keeper.over.set()
        if code != EXIT_OK:
            self._stop(code)

    def _stop(self, code: int) -> None:
        """Let the workers drain, then end with ``code``. Only the first reason counts."""
        if self._stopping.is_set():
            return
        self._exit_code = code
        self._stopping.set()
        self._child_died.set()
        self._to_roll.set()
        for keeper in self._everyone:
            keeper.relieve(signal.SIGTERM)
        asyncio.get_running_loop().call_later(self._patience, self._kill_all)

    def _kill_all(self) -> None:
        for keeper in self._everyone:
            keeper.kill()

    async def _roll_when_told(self, tasks: asyncio.TaskGroup) -> None:
        """Who is told while a round is under way makes one more."""
        while True:
            await self._to_roll.wait()
            self._to_roll.clear()
            if self._stopping.is_set():
                return
            await self._roll(tasks)

    async def _roll(self, tasks: asyncio.TaskGroup) -> None:
        """Replace every process, one at a time: there is room for one more, not for all twice."""
        if reasons := refusals(self._settings):  # The certificate is another by now.
            log.error("not_rolling", reasons=reasons)
            return
        log.info("rolling")
        for place in range(len(self._slots)):
            successor = self._keeper(place)
            if not await successor.start():
                await self._give_up(successor)
                return
            predecessor, self._keepers[place] = self._keepers[place], successor
            self._became_ready()
            tasks.create_task(self._keep(successor))
            await self._see_off(predecessor)
            if self._stopping.is_set():
                return
        log.info("rolled")

    async def _give_up(self, successor: Keeper) -> None:
        status = await successor.watch()
        self._everyone.discard(successor)
        if not self._stopping.is_set():
            successor.report(
                log.error,
                "not_replaced",
                status=status,
                reason="The new process did not get ready. The old one serves on, and so do all "
                "that had not been replaced. Its own lines say why; then send SIGHUP again.",
            )

    async def _see_off(self, predecessor: Keeper) -> None:
        predecessor.relieve(signal.SIGHUP)
        if not await _set_within(predecessor.over, self._patience):
            predecessor.kill()
            await predecessor.over.wait()

    async def _start_store(self, store: EmbeddedStore) -> None:
        store.launch()
        # It only waits: what starts the process must stay in this thread.
        await asyncio.to_thread(store.wait_ready)
        log.info("store_ready", pid=store.pid)

    async def _sync_store(self, store: EmbeddedStore) -> None:
        while not await _set_within(self._stopping, SYNC_SECONDS):
            await asyncio.to_thread(store.sync)

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
            await _set_within(self._stopping, delay)
            born = time.monotonic()
            try:
                await self._start_store(store)
            except StoreFailed as error:
                log.error("store_not_started", reason=str(error))
                self._stop(EXIT_STORE)


async def _set_within(event: asyncio.Event, seconds: float) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def _has_terminal() -> bool:
    try:
        os.close(os.open("/dev/tty", os.O_RDWR | os.O_NOCTTY))
    except OSError:
        return False
    return True

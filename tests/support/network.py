"""Hosts on this machine: network namespaces behind a router, on which any link can be cut, in one
direction or both. Root only."""

from __future__ import annotations

import os
import random
import secrets
import shutil
import subprocess
from collections.abc import Callable, Sequence
from typing import NamedTuple


class Site(NamedTuple):
    """A host's address, and what to put before a command so that it runs there."""

    address: str = "127.0.0.1"
    within: Sequence[str] = ()


HERE = "here"
"""The host on which the tests run."""


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    assert done.returncode == 0, f"{' '.join(words)}: {done.stderr.strip()}"


def why_not() -> str:
    """Why there can be no such hosts here; empty when there can."""
    if os.geteuid() != 0:
        return "only root may make network namespaces"
    if missing := [name for name in ("ip", "tc", "iptables") if shutil.which(name) is None]:
        return f"there is no {missing[0]} to make network namespaces with"
    probe = f"chat-{secrets.token_hex(3)}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True)
    if made.returncode == 0:
        _run("ip", "netns", "del", probe)
    return made.stderr.strip()


class Network:
    """Each host has a link to the router, and through it reaches every other."""

    def __init__(self, *hosts: str) -> None:
        # 198.18.0.0/15 is for tests of networks (RFC 2544); others may run at the same time.
        self._net = f"198.{random.randint(18, 19)}.{random.randrange(256)}"
        self._mark = secrets.token_hex(3)
        self._hosts = [HERE, *hosts]
        self._router = f"chat-{self._mark}"
        self._undo: list[Callable[[], None]] = []

    def start(self) -> None:
        _run("ip", "netns", "add", self._router)
        self._on_router("sysctl", "-qw", "net.ipv4.ip_forward=1")
        for number, host in enumerate(self._hosts):
            self._connect(number, host)

    def _connect(self, number: int, host: str) -> None:
        near, far = f"ch{self._mark}{number}", self._port(host)
        of_host = [] if host == HERE else ["-n", self._namespace(host)]
        if of_host:
            _run("ip", "netns", "add", self._namespace(host))
            _run("ip", *of_host, "link", "set", "lo", "up")
        _run("ip", "-n", self._router, "link", "add", far, "type", "veth", "peer", "name", near)
        to = self._namespace(host) if of_host else str(os.getpid())
        _run("ip", "-n", self._router, "link", "set", near, "netns", to)
        _run("ip", "-n", self._router, "addr", "add", f"{self._gateway(host)}/30", "dev", far)
        _run("ip", "-n", self._router, "link", "set", far, "up")
        _run("ip", *of_host, "addr", "add", f"{self.address(host)}/30", "dev", near)
        _run("ip", *of_host, "link", "set", near, "up")
        _run("ip", *of_host, "route", "add", f"{self._net}.0/24", "via", self._gateway(host))

    def stop(self) -> None:
        """The links go with the router's end of them."""
        for name in (self._router, *map(self._namespace, self._hosts[1:])):
            subprocess.run(["ip", "netns", "del", name], capture_output=True)

    def _namespace(self, host: str) -> str:
        return f"{self._router}-{host}"

    def _port(self, host: str) -> str:
        return f"r{self._hosts.index(host)}"

    def _gateway(self, host: str) -> str:
        return f"{self._net}.{4 * self._hosts.index(host) + 1}"

    def address(self, host: str) -> str:
        return f"{self._net}.{4 * self._hosts.index(host) + 2}"

    def site(self, host: str) -> Site:
        return Site(self.address(host), ["ip", "netns", "exec", self._namespace(host)])

    # Harm, until ``heal``.

    def drop(self, source: str, target: str) -> None:
        """What one sends to the other is lost, in this direction alone."""
        self._rule(source, target, "-j", "DROP")

    def reject(self, source: str, target: str) -> None:
        """What one sends to the other is answered with a reset."""
        self._rule(source, target, "-p", "tcp", "-j", "REJECT", "--reject-with", "tcp-reset")

    def lose(self, source: str, target: str, share: float) -> None:
        """Such a share of the packets is lost."""
        dice = ["-m", "statistic", "--mode", "random", "--probability", str(share)]
        self._rule(source, target, *dice, "-j", "DROP")

    def blackhole(self, source: str, target: str) -> None:
        """The one has no way to the other any more: it is told so at once, or gets no answer."""
        route = ["blackhole", self.address(target)]
        of_host = ["ip", "-n", self._namespace(source), "route"]
        _run(*of_host, "add", *route)
        self._undo.append(lambda: _run(*of_host, "del", *route))

    def narrow(self, target: str, rate: str) -> None:
        """What comes to the host comes at this rate, such as ``500kbit``, and queues before."""
        port = ["tc", "-n", self._router, "qdisc"]
        device = ["dev", self._port(target), "root"]
        _run(*port, "add", *device, "tbf", "rate", rate, "burst", "5kb", "latency", "300ms")
        self._undo.append(lambda: _run(*port, "del", *device))

    def cut(self, one: str, other: str) -> None:
        """Both directions."""
        self.drop(one, other)
        self.drop(other, one)

    def heal(self) -> None:
        for undo in self._undo:
            undo()
        self._undo.clear()

    def _rule(self, source: str, target: str, *what: str) -> None:
        rule = ["-s", self.address(source), "-d", self.address(target), *what]
        self._on_router("iptables", "-w", "-A", "FORWARD", *rule)
        self._undo.append(lambda: self._on_router("iptables", "-w", "-D", "FORWARD", *rule))

    def _on_router(self, *command: str) -> None:
        _run("ip", "netns", "exec", self._router, *command)

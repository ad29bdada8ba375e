"""A cluster of three primaries on loopback ports, put together by hand; with replicas if asked."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from chatserver.store.cluster import slot_of
from tests.support.failover import address, command, free_ports, wait
from tests.support.valkey import Valkey

NODES = 3
SLOTS = 16_384
SHARES = [(n * SLOTS // NODES, (n + 1) * SLOTS // NODES - 1) for n in range(NODES)]
NODE_MILLISECONDS = 1000
"""Until a node that does not answer is taken for lost."""


class KeyCluster:
    """Synchronous, as ``Valkey``: its tests own the event loop."""

    def __init__(self, directory: Path, *, replicas: int = 0) -> None:
        count = NODES * (1 + replicas)
        self.ports = free_ports(count)
        """The primaries first."""
        self.stores: list[Valkey] = []
        for port in self.ports:
            (directory / str(port)).mkdir()
            self.stores.append(
                Valkey(
                    directory / str(port),
                    **{
                        "port": str(port),
                        "bind": "127.0.0.1",
                        "cluster-enabled": "yes",
                        "cluster-config-file": str(directory / str(port) / "nodes"),
                        "cluster-node-timeout": str(NODE_MILLISECONDS),
                        # One node lost, the others go on: only its rooms are unavailable.
                        "cluster-require-full-coverage": "no",
                        "repl-diskless-sync-delay": "0",
                    },
                )
            )

    @property
    def url(self) -> str:
        return f"redis+cluster://{','.join(map(address, self.ports[:NODES]))}"

    def start(self) -> None:
        for store in self.stores:
            store.start()
        for n, (first, last) in enumerate(SHARES):
            self.tell(n, "CLUSTER", "SET-CONFIG-EPOCH", n + 1)
            self.tell(n, "CLUSTER", "ADDSLOTSRANGE", first, last)
        for port in self.ports[1:]:
            self.tell(0, "CLUSTER", "MEET", "127.0.0.1", port)
        everyone = range(len(self.ports))
        wait(lambda: all(self._knows(n) == len(self.ports) for n in everyone), "the cluster")
        for n in everyone[NODES:]:
            self._follow(n, self.name(n % NODES))
        wait(lambda: all(self._is_ok(n) for n in everyone), "the cluster's slots")

    def _follow(self, n: int, primary: str) -> None:
        wait(lambda: self.ask(n, "CLUSTER", "REPLICATE", primary) == b"OK", "a replica")
        wait(lambda: b"master_link_status:up" in self.ask(n, "INFO", "replication"), "its link")

    def _knows(self, n: int) -> int:
        lines = self.ask(n, "CLUSTER", "NODES").decode().splitlines()
        return sum(" connected" in line and "handshake" not in line for line in lines)

    def _is_ok(self, n: int) -> bool:
        info = self.ask(n, "CLUSTER", "INFO").decode()
        return "cluster_state:ok" in info and f"cluster_slots_ok:{SLOTS}" in info

    def ask(self, n: int, *words: str | int) -> Any:
        return command(self.ports[n], *words)

    def tell(self, n: int, *words: str | int) -> None:
        reply = self.ask(n, *words)
        assert reply == b"OK", reply

    def name(self, n: int) -> str:
        return str(self.ask(n, "CLUSTER", "MYID").decode())

    def node_of(self, key: str) -> int:
        """Which of the first three has it, as the slots were dealt."""
        slot = slot_of(key)
        return next(n for n, (first, last) in enumerate(SHARES) if first <= slot <= last)

    def keys_beside(self, key: str) -> int:
        """How many its slot has."""
        return int(self.ask(self.node_of(key), "CLUSTER", "COUNTKEYSINSLOT", slot_of(key)))

    def begin_to_move(self, slot: int, source: int, target: int) -> None:
        self.tell(target, "CLUSTER", "SETSLOT", slot, "IMPORTING", self.name(source))
        self.tell(source, "CLUSTER", "SETSLOT", slot, "MIGRATING", self.name(target))

    def move_keys(self, slot: int, source: int, target: int) -> int:
        """Those that are there now; how many there were."""
        found = self.ask(source, "CLUSTER", "GETKEYSINSLOT", slot, 1000)
        if found:
            place = "127.0.0.1", self.ports[target], "", 0, 5000
            names = [name.decode() for name in found]
            self.tell(source, "MIGRATE", *place, "KEYS", *names)
        return len(found)

    def finish_to_move(self, slot: int, source: int, target: int) -> None:
        # The target first: else the two would send clients to and fro.
        for n in (target, source, 3 - source - target):
            self.tell(n, "CLUSTER", "SETSLOT", slot, "NODE", self.name(target))

    def move(self, slot: int, source: int, target: int) -> None:
        self.begin_to_move(slot, source, target)
        while self.move_keys(slot, source, target):
            pass
        self.finish_to_move(slot, source, target)

    def stop(self) -> None:
        for store in self.stores:
            store.stop()

"""The whole command, against a whole server and against one that is at fault."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from load.advice import SENTENCES
from tests.conftest import StartWorker
from tests.faults.server import HERE, Server
from tests.loadtest.faulty import Fault, Swap, double_the_third, faulty, keep, skip_the_third
from tests.support import served
from tests.support.tokens import Issuer
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, eventually

SCRIPTS = Path(__file__).parents[2] / "scripts"
FEW = ("--clients", "24", "--rooms", "3", "--processes", "2", "--ramp", "100", "--duration", "1")


class Outcome(NamedTuple):
    code: int
    out: str
    err: str
    found: dict[str, Any]
    """The JSON."""


class Command:
    """``scripts/loadtest``, less the shell around it."""

    def __init__(self, tmp_path: Path, *words: str, **environment: str) -> None:
        self._json = tmp_path / f"{words[0]}.json"
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "load", *words, "--json", str(self._json)],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SCRIPTS)} | environment,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.pid = self._process.pid

    def outcome(self) -> Outcome:
        out, err = self._process.communicate(timeout=4 * PATIENCE)
        found = json.loads(self._json.read_text()) if self._json.exists() else {}
        return Outcome(self._process.returncode, out, err, found)

    def processes(self) -> list[int]:
        """The ids of the processes with the clients."""
        children = Path(f"/proc/{self.pid}/task/{self.pid}/children").read_text().split()
        return [int(pid) for pid in children if b"spawn_main" in _command_line(pid)]

    def kill(self) -> None:
        self._process.kill()
        self._process.communicate()


def _command_line(pid: str) -> bytes:
    return Path(f"/proc/{pid}/cmdline").read_bytes()


@pytest.fixture(scope="module")
def server(module_valkey: Valkey, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Two workers and the control API, with limits that a few clients do not reach."""
    started = Server(
        tmp_path_factory.mktemp("server") / "log",
        module_valkey.url,
        Issuer(),
        HERE,
        served.COMMAND,
        send_rate=100,
    )
    asyncio.run(started.start())
    yield started
    assert started.untidy(started.stop()) == []


def environment(server: Server) -> dict[str, str]:
    return {
        "CHATSERVER_SECRET": server.issuer.secret,
        "CHATSERVER_CONTROL_KEY": server.control_key,
    }


def place(server: Server) -> list[str]:
    return ["--url", server.url, "--control", f"http://127.0.0.1:{server.control_port}"]


SCENARIOS = {
    "connect": ("connects==24",),
    "fanout": ("acks>0", "deliveries_per_second>20", "delivery_p50<5000"),
    "chat": ("joins>24", "leaves>0", "histories>0", "deliveries>0"),
    "refresh": ("refreshes==27", "refresh_count==27"),
    "reconnect": ("dropped==24", "recovered==24", "unrecovered==0", "recovery_count==24"),
    "revoke": ("revoked==12", "closed_4503==12", "accepted_after_revocation==0"),
    "slow": ("late_delivery_count>0", "closed==0"),
}
ALWAYS = ("lost==0", "doubled==0", "reordered==0", "overdue==0", "unanswered==0", "absent==0")
MORE = {
    "chat": ("--rate", "200"),
    "revoke": ("--share", "0.5"),
    "slow": ("--share", "0.5", "--rate", "60"),
}


@pytest.fixture(scope="module")
def outcomes(server: Server, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """All scenarios, side by side: most of the time they wait."""
    directory = tmp_path_factory.mktemp("runs")
    commands = {}
    for name, requirements in SCENARIOS.items():
        words = [name, *FEW, *place(server), *MORE.get(name, ())]
        for requirement in (*requirements, *ALWAYS):
            words += ["--require", requirement]
        commands[name] = Command(directory, *words, "--html", f"{name}.html", **environment(server))
    return {name: command.outcome() for name, command in commands.items()}


@pytest.mark.parametrize("name", SCENARIOS)
def test_each_scenario_runs_and_finds_nothing_wrong(
    outcomes: dict[str, Outcome], name: str
) -> None:
    outcome = outcomes[name]

    assert outcome.code == 0, (outcome.out, outcome.err)
    assert outcome.err == ""
    assert "NOT MET" not in outcome.out
    counts = outcome.found["counts"]
    assert counts["connects"] >= 24
    assert counts["error"] == 0


def test_a_message_is_delivered_to_every_member_of_its_room(outcomes: dict[str, Outcome]) -> None:
    counts = outcomes["fanout"].found["counts"]

    assert counts["sends"] == counts["acks"] > 0
    assert counts["deliveries"] == counts["sends"] * 24 / 3


async def test_ctrl_c_ends_the_load_and_still_reports(server: Server, tmp_path: Path) -> None:
    words = ["fanout", *FEW, "--duration", "600", *place(server)]
    command = Command(tmp_path, *words, **environment(server))
    try:
        await eventually(lambda: len(command.processes()) == 2)
        # A process of ours that has clients has connections; it sends from then on.
        await eventually(lambda: all(_sockets(pid) > 12 for pid in command.processes()))
        os.kill(command.pid, signal.SIGINT)
        outcome = command.outcome()
    finally:
        command.kill()

    assert outcome.code == 0, outcome.err
    assert "It was ended early." in outcome.out
    assert outcome.found["ended_early"]
    assert outcome.found["counts"]["lost"] == 0


async def test_a_process_that_was_held_up_says_that_it_was_the_bottleneck(
    server: Server, tmp_path: Path
) -> None:
    words = ["connect", *FEW, "--duration", "600", *place(server)]
    command = Command(tmp_path, *words, **environment(server))
    try:
        await eventually(lambda: len(command.processes()) == 2)
        pid = command.processes()[0]
        await eventually(lambda: _sockets(pid) > 12)
        # More than once: of a hundred looks at the loop, one that is late is beyond the p99.
        for _ in range(4):
            os.kill(pid, signal.SIGSTOP)
            await asyncio.sleep(0.25)  # The condition is the time itself.
            os.kill(pid, signal.SIGCONT)
            await asyncio.sleep(0.02)
        os.kill(command.pid, signal.SIGINT)
        outcome = command.outcome()
    finally:
        command.kill()

    held = max(outcome.found["processes"], key=lambda effort: effort["lag_p99"])
    told = f"The load test itself was the bottleneck: process {held['process'] + 1}"
    assert held["bottleneck"]
    assert told in " ".join(outcome.out.split())


def _sockets(pid: int) -> int:
    count = 0
    for path in Path(f"/proc/{pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            count += os.readlink(path).startswith("socket:")
    return count


def test_who_is_not_let_in_ends_with_69_and_says_what_to_do(server: Server, tmp_path: Path) -> None:
    words = ["fanout", *FEW, *place(server)]
    secret = {"CHATSERVER_SECRET": Issuer().secret}
    outcome = Command(tmp_path, *words, **secret).outcome()

    assert outcome.code == 69
    assert outcome.found["counts"]["refused_401_token_invalid"] == 27
    assert SENTENCES["refused_401"] in " ".join(outcome.out.split())
    assert outcome.err == f"loadtest: Nobody got in at {server.url}.\n"


def test_where_tls_is_not_spoken_nobody_gets_in(server: Server, tmp_path: Path) -> None:
    words = ["connect", *FEW, "--url", server.url.replace("ws:", "wss:"), "--duration", "3"]
    words += ["--grace", "0.1"]
    outcome = Command(tmp_path, *words, **environment(server)).outcome()

    assert outcome.code == 69
    counts = outcome.found["counts"]
    assert counts["refused_SSLError"] == counts["refused"] > 0
    assert outcome.err == f"loadtest: Nobody got in at wss:{server.url[3:]}.\n"


def test_a_rate_above_the_servers_is_named_and_costs_no_message(
    server: Server, tmp_path: Path
) -> None:
    words = ["fanout", *FEW, *place(server), "--publishers", "1", "--rate", "150"]
    outcome = Command(tmp_path, *words, **environment(server)).outcome()
    counts = outcome.found["counts"]

    assert counts["error_rate_limited"] > 0
    assert counts["acks"] == counts["sends"]
    assert "lets a connection send 100 messages a second" in " ".join(outcome.out.split())


def test_a_handshake_limit_is_waited_out_and_named(
    start_worker: StartWorker, tmp_path: Path
) -> None:
    worker = start_worker(handshake_rate=3)
    words = ["connect", "--url", worker.url, "--clients", "200", "--ramp", "400"]
    words += ["--duration", "0.1"]
    outcome = Command(tmp_path, *words, CHATSERVER_SECRET=worker.issuer.secret).outcome()
    counts = outcome.found["counts"]

    assert (outcome.code, counts["connects"]) == (0, 200), outcome.out
    # Whoever waits as long as it was told is refused once, or a few times with the others.
    assert 0 < counts["refused_429_rate_limited"] < 200
    assert "raise CHATSERVER_HANDSHAKE_RATE" in " ".join(outcome.out.split())


def test_pairs_are_traded_for_the_next(server: Server, tmp_path: Path) -> None:
    async def log_in() -> list[dict[str, Any]]:
        users = [server.control("/v1/tokens", {"user": f"pair-{n}"}) for n in range(27)]
        return await asyncio.gather(*users)

    pairs = tmp_path / "pairs.json"
    pairs.write_text("".join(json.dumps(pair, indent=2) for pair in asyncio.run(log_in())))
    words = ["reconnect", *FEW, *place(server), "--tokens", str(pairs)]
    words += ["--require", "recovered==24", "--require", "lost==0"]
    outcome = Command(tmp_path, *words).outcome()

    assert outcome.code == 0, (outcome.out, outcome.err)


# -- a server at fault ------------------------------------------------------------------------


FAULTS: dict[str, Fault] = {
    "none": keep,
    "lost": skip_the_third,
    "doubled": double_the_third,
    "reordered": Swap(),
}


async def _at_fault(fault: Fault, directory: Path) -> Outcome:
    async with faulty(fault) as url:
        words = ["fanout", *FEW, "--url", url, "--rooms", "1", "--rate", "20"]
        for name in ("lost", "doubled", "reordered"):
            words += ["--require", f"{name}==0"]
        command = Command(directory, *words, CHATSERVER_SECRET=Issuer().secret)
        return await asyncio.to_thread(command.outcome)


@pytest.fixture(scope="module")
def planted(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Outcome]:
    """A run against each fault, side by side."""
    directory = tmp_path_factory.mktemp("faults")

    async def run() -> list[Outcome]:
        runs = []
        for name, fault in FAULTS.items():
            (directory / name).mkdir()
            runs.append(_at_fault(fault, directory / name))
        return await asyncio.gather(*runs)

    return dict(zip(FAULTS, asyncio.run(run()), strict=True))


@pytest.mark.parametrize("fault", FAULTS)
def test_a_planted_fault_is_counted_at_every_member_and_ends_with_1(
    planted: dict[str, Outcome], fault: str
) -> None:
    outcome = planted[fault]

    assert outcome.code == (fault != "none"), (outcome.out, outcome.err)
    for name in ("lost", "doubled", "reordered"):
        assert outcome.found["counts"][name] == (24 if name == fault else 0)
        assert (f"NOT MET: {name}==0 (24)" in outcome.out) == (name == fault)

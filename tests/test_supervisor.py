"""The supervisor, in a process of its own, with workers that do as a test tells them."""

from __future__ import annotations

import json
import os
import pty
import re
import secrets
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, Protocol

import pytest

from chatserver.settings import ConfigurationError, load
from chatserver.supervisor import BEAT_SECONDS, Restarts, bind, refusals

PATIENCE = float(os.environ.get("TEST_PATIENCE", "15"))
ROOT = Path(__file__).parents[1]

# Runs the supervisor as the command line does, with shorter waits. Each of its own seconds in which
# a process of its has not ended is a line of `beats`.
SUPERVISOR = """
import os, pathlib, sys
from chatserver import supervisor, telemetry
from chatserver.settings import ConfigurationError, load
from chatserver.store.embedded import StoreFailed

telemetry.configure("info")
supervisor.Restarts.FIRST_DELAY = 0.01
supervisor.Restarts.LONGEST_DELAY = 0.02
supervisor.BEAT_SECONDS = float(os.environ.get("BEAT", "1"))
if "TERMINAL" in os.environ:
    os.setsid()
    os.open(os.environ["TERMINAL"], os.O_RDWR)
if "IMPATIENT" in os.environ:
    supervisor.EXIT_SECONDS = supervisor.KILL_SECONDS = 0.1

orders = pathlib.Path(sys.argv[2])

class Child(supervisor.Child):
    async def wait_ready(self, seconds):
        # One that is told to hang will not get ready, and any other may take its time.
        hangs = "IMPATIENT" in os.environ and orders.read_text() == "hang"
        return await super().wait_ready(1.0 if hangs else seconds)

    async def gone(self, seconds):
        over = await super().gone(seconds)
        if not over:
            with orders.with_name("beats").open("a") as beats:
                print(self.pid, file=beats)
        return over

supervisor.Child = Child
if "CONTROL_ORDERS" in os.environ:
    supervisor.CONTROL = [sys.executable, sys.argv[1], os.environ["CONTROL_ORDERS"]]
ready = lambda address: print("ready", address.port, flush=True)
try:
    sys.exit(supervisor.run(load(env_file=None), ready, [sys.executable, *sys.argv[1:]]))
except (ConfigurationError, StoreFailed) as error:
    sys.exit(str(error))
"""

# Answers each connection with its process id. What it does otherwise is in the file `orders`. In
# `lives` it says when it comes, and with a minus when it goes.
WORKER = """
import os, pathlib, signal, socket, sys, threading, time

_, orders, *_, fd, _, ready = sys.argv
orders = pathlib.Path(orders)
word, _, argument = orders.read_text().partition(" ")

def live(sign):
    with orders.with_name("lives").open("a") as lives:
        print(f"{sign}{os.getpid()}", file=lives)

def serve():
    listener = socket.socket(fileno=int(fd))
    while True:
        with listener.accept()[0] as client:
            if word == "crash":
                os._exit(1)
            about = [os.getpid(), os.getpgid(0), os.environ.get("CHATSERVER_REDIS_URL", "")]
            client.sendall(" ".join(map(str, about)).encode())
        if word == "single":
            return

def beat():
    while word != "mute" and os.write(int(ready), b"1"):
        time.sleep(0.02)

live("")
if word == "once":
    orders.write_text("serve")
if word in ("exit", "once"):
    sys.exit(int(argument))
if word == "hang":
    time.sleep(60)
told = {signal.SIGTERM, signal.SIGHUP}
heeded = {"deaf": set(), "lingers": {signal.SIGTERM}}.get(word, told)
# Waited for, not caught: what waits in accept() hears of no signal that another thread has got.
signal.pthread_sigmask(signal.SIG_BLOCK, told)
os.write(int(ready), b"1")
for work in (serve, beat):
    threading.Thread(target=work, daemon=True).start()
while signal.sigwait(told) not in heeded:
    pass
live("-")
"""


def eventually(condition: Callable[[], object], within: float = PATIENCE) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.005)


def gone(pid: int) -> bool:
    """Whether it runs no more, even if nobody has asked for its exit code yet."""
    try:
        os.kill(pid, 0)
        return ") Z " in Path(f"/proc/{pid}/stat").read_text()
    except ProcessLookupError:
        return True
    except FileNotFoundError:  # Gone in between, or a system without /proc.
        return Path("/proc/self").exists()


class Host:
    """A running supervisor and what its workers are told."""

    def __init__(
        self, directory: Path, order: str, environment: dict[str, str], *before: str
    ) -> None:
        self._orders = directory / "orders"
        self._log = directory / "log"
        (directory / "worker.py").write_text(WORKER)
        self.order(order)
        command = [*before, sys.executable, "-c", SUPERVISOR, str(directory / "worker.py")]
        with self._log.open("wb") as log:
            self.process = subprocess.Popen(
                [*command, str(self._orders)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
                env={"PATH": os.environ["PATH"], **environment},
            )

    def order(self, order: str) -> None:
        """What workers do that start from now on."""
        self._orders.write_text(order)

    def wait_ready(self) -> int:
        """The port."""
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        assert line.startswith("ready"), self._log.read_text()
        return int(line.split()[1])

    def ask(self, port: int) -> tuple[int, int, str]:
        """Process id, process group and store of whichever worker answers."""
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as client:
            answer = client.makefile("rb").read().decode()
        pid, group, *store = answer.split(" ")
        return int(pid), int(group), " ".join(store)

    def lives(self) -> list[int]:
        """Every worker that ever started."""
        return [pid for pid in self._comings_and_goings() if pid > 0]

    def most_at_once(self) -> int:
        """Of those that came, and went when they were told to."""
        return max(accumulate((1 if pid > 0 else -1) for pid in self._comings_and_goings()))

    def _comings_and_goings(self) -> list[int]:
        path = self._orders.with_name("lives")
        return [int(line) for line in path.read_text().split()] if path.exists() else []

    def beats(self, pid: int) -> int:
        """So many of the supervisor's own seconds has the process been there."""
        path = self._orders.with_name("beats")
        return path.read_text().split().count(str(pid)) if path.exists() else 0

    def has_yet_to_hear(self, number: signal.Signals) -> bool:
        """A signal has been sent, and the supervisor was not on a processor since."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        (pending,) = re.findall(r"^ShdPnd:\s+(\w+)", status, re.MULTILINE)
        return bool(int(pending, 16) >> (number - 1) & 1)

    def events(self, name: str) -> list[dict[str, Any]]:
        lines = [json.loads(line) for line in self._log.read_text().splitlines()]
        return [line for line in lines if line["event"] == name]

    def exit_code(self) -> int:
        return self.process.wait(PATIENCE)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        assert self.process.stdout is not None
        self.process.stdout.close()
        eventually(lambda: all(map(gone, self.lives())))


class StartHost(Protocol):
    def __call__(
        self,
        order: str = "serve",
        *,
        control: str = "",
        impatient: bool = False,
        beat: float = 1.0,
        terminal: str = "",
        before: Sequence[str] = (),
        **settings: object,
    ) -> Host: ...


@pytest.fixture
def start_host(tmp_path: Path) -> Iterator[StartHost]:
    with ExitStack() as running:

        def start(
            order: str = "serve",
            *,
            control: str = "",
            impatient: bool = False,
            beat: float = 1.0,
            terminal: str = "",
            before: Sequence[str] = (),
            **settings: object,
        ) -> Host:
            given: dict[str, object] = {
                "secret": secrets.token_hex(32),
                "redis_url": "redis://127.0.0.1:1",
                "port": 0,
                "drain_seconds": 0.2,
                **settings,
            }
            environment = {f"CHATSERVER_{k.upper()}": str(v) for k, v in given.items()}
            environment["BEAT"] = str(beat)
            if impatient:
                environment["IMPATIENT"] = "1"
            if terminal:
                environment["TERMINAL"] = terminal
            if control:
                path = tmp_path / "control-orders"
                path.write_text(control)
                environment |= {
                    "CONTROL_ORDERS": str(path),
                    "CHATSERVER_CONTROL_KEY": secrets.token_urlsafe(48),
                    "CHATSERVER_CONTROL_PORT": "0",
                }
            host = Host(tmp_path, order, environment, *before)
            running.enter_context(closing(host))
            return host

        yield start


def test_every_worker_serves_one_port_and_a_signal_ends_them_all_with_0(
    start_host: StartHost,
) -> None:
    host = start_host(workers=3)
    port = host.wait_ready()
    answered: set[int] = set()

    def all_answered() -> bool:
        answered.add(host.ask(port)[0])
        return len(answered) == 3

    eventually(all_answered)

    host.signal(signal.SIGTERM)

    assert host.exit_code() == 0
    assert answered == set(host.lives())
    assert host.events("worker_killed") == []


def test_nothing_is_ready_before_every_worker_is(start_host: StartHost) -> None:
    host = start_host("hang", impatient=True, workers=2)
    eventually(lambda: len(host.lives()) >= 2)
    host.order("serve")

    host.wait_ready()

    assert len(host.events("worker_died")) >= 2


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_the_first_signal_drains(start_host: StartHost, number: signal.Signals) -> None:
    host = start_host()
    host.wait_ready()

    host.signal(number)

    assert host.exit_code() == 0
    assert [event["signal"] for event in host.events("draining")] == [number.name]


def test_the_second_signal_ends_at_once(start_host: StartHost) -> None:
    host = start_host("deaf", drain_seconds=3600)
    host.wait_ready()

    host.signal(signal.SIGINT)
    eventually(lambda: host.events("draining"))
    host.signal(signal.SIGINT)

    assert host.exit_code() == 0
    assert len(host.events("worker_killed")) == 1


def test_a_worker_that_never_ends_its_drain_is_killed(start_host: StartHost) -> None:
    host = start_host("deaf", impatient=True, drain_seconds=0.01)
    host.wait_ready()

    host.signal(signal.SIGTERM)

    assert host.exit_code() == 0
    assert len(host.events("worker_killed")) == 1


def test_a_terminal_that_closes_drains(start_host: StartHost) -> None:
    """The server would go on with nobody to stop it."""
    master, terminal = pty.openpty()
    host = start_host(terminal=os.ttyname(terminal))
    os.close(terminal)
    host.wait_ready()

    os.close(master)

    assert host.exit_code() == 0
    assert [event["signal"] for event in host.events("draining")] == ["SIGHUP"]


class TestRollingRestart:
    """SIGHUP: new processes for old ones, one by one."""

    def test_every_process_is_replaced_and_there_is_never_more_than_one_extra(
        self, start_host: StartHost
    ) -> None:
        host = start_host(control="serve", workers=3)
        host.wait_ready()
        before = host.lives()

        host.signal(signal.SIGHUP)
        eventually(lambda: host.events("rolled"))

        after = host.lives()
        assert len(before) == 4
        assert len(set(after)) == 8
        assert host.most_at_once() == 5
        eventually(lambda: all(map(gone, before)))
        assert not any(map(gone, set(after) - set(before)))
        assert host.events("worker_died") == []
        assert host.events("worker_killed") == []

    def test_the_old_one_goes_only_when_the_new_one_serves_and_leaves_it_the_queue(
        self, start_host: StartHost
    ) -> None:
        host = start_host("single", drain_seconds=1)
        port = host.wait_ready()
        first, _, _ = host.ask(port)
        host.order("hang")
        with socket.create_connection(("127.0.0.1", port), PATIENCE) as waiting:
            host.signal(signal.SIGHUP)
            eventually(lambda: len(host.lives()) == 2)
            assert not gone(first)
            host.order("serve")
            os.kill(host.lives()[1], signal.SIGKILL)
            eventually(lambda: host.events("worker_not_replaced"))
            host.signal(signal.SIGHUP)

            answer = waiting.makefile("rb").read()

        assert int(answer.split()[0]) == host.lives()[2]
        eventually(lambda: gone(first))

    @pytest.mark.parametrize("order", ["exit 1", "exit 69", "exit 78", "hang"])
    def test_one_that_does_not_start_leaves_its_predecessor_and_all_others_alone(
        self, start_host: StartHost, order: str
    ) -> None:
        host = start_host(impatient=True, workers=2)
        port = host.wait_ready()
        before = host.lives()
        host.order(order)

        host.signal(signal.SIGHUP)
        eventually(lambda: host.events("worker_not_replaced"))

        assert host.ask(port)[0] in before
        assert not any(map(gone, before))
        assert len(host.lives()) == 3
        assert host.events("worker_not_replaced")[0]["level"] == "error"

        host.order("serve")
        host.signal(signal.SIGHUP)
        eventually(lambda: host.events("rolled"))
        host.signal(signal.SIGTERM)

        assert host.exit_code() == 0
        assert len(host.lives()) == 5

    def test_told_again_in_the_middle_it_makes_one_more_round(self, start_host: StartHost) -> None:
        host = start_host("lingers", drain_seconds=3600)
        host.wait_ready()
        host.order("serve")

        host.signal(signal.SIGHUP)
        eventually(lambda: len(host.events("worker_ready")) == 2)
        for _ in range(3):
            host.signal(signal.SIGHUP)
            eventually(lambda: not host.has_yet_to_hear(signal.SIGHUP))
        os.kill(host.lives()[0], signal.SIGKILL)
        eventually(lambda: len(host.events("rolled")) == 2)
        host.signal(signal.SIGTERM)

        assert host.exit_code() == 0
        assert len(host.lives()) == 3
        assert len(host.events("rolling")) == 2

    def test_a_predecessor_that_does_not_go_is_killed(self, start_host: StartHost) -> None:
        host = start_host("deaf", impatient=True)
        port = host.wait_ready()
        host.order("serve")

        host.signal(signal.SIGHUP)
        eventually(lambda: host.events("rolled"))

        first, second = host.lives()
        assert [event["pid"] for event in host.events("worker_killed")] == [first]
        assert host.ask(port)[0] == second

    def test_a_stop_in_the_middle_drains_the_old_and_the_new(self, start_host: StartHost) -> None:
        host = start_host("lingers", drain_seconds=3600, workers=2)
        host.wait_ready()

        host.signal(signal.SIGHUP)
        eventually(lambda: len(host.events("worker_ready")) == 3)
        host.signal(signal.SIGTERM)

        assert host.exit_code() == 0
        assert len(host.lives()) == 3
        assert host.events("worker_killed") == []
        assert host.events("rolled") == []

    def test_a_stop_while_the_new_one_starts_is_no_failure(self, start_host: StartHost) -> None:
        host = start_host(drain_seconds=3600)
        host.wait_ready()
        host.order("hang")

        host.signal(signal.SIGHUP)
        eventually(lambda: len(host.lives()) == 2)
        host.signal(signal.SIGTERM)

        assert host.exit_code() == 0
        assert host.events("worker_not_replaced") == []

    def test_a_new_one_that_dies_while_the_old_one_drains_is_started_again(
        self, start_host: StartHost
    ) -> None:
        host = start_host("lingers", drain_seconds=3600)
        port = host.wait_ready()
        host.order("serve")
        host.signal(signal.SIGHUP)
        eventually(lambda: len(host.events("worker_ready")) == 2)
        first, second = host.lives()

        os.kill(second, signal.SIGKILL)
        eventually(lambda: len(host.events("worker_ready")) == 3)
        os.kill(first, signal.SIGKILL)
        eventually(lambda: host.events("rolled"))

        assert host.ask(port)[0] == host.lives()[2]
        assert [event["status"] for event in host.events("worker_died")] == [-signal.SIGKILL]

    def test_an_old_one_that_dies_while_the_new_one_starts_is_started_again(
        self, start_host: StartHost
    ) -> None:
        host = start_host()
        port = host.wait_ready()
        host.order("hang")
        host.signal(signal.SIGHUP)
        eventually(lambda: len(host.lives()) == 2)
        host.order("serve")
        first, second = host.lives()

        os.kill(first, signal.SIGKILL)
        eventually(lambda: len(host.events("worker_ready")) == 2)
        third, _, _ = host.ask(port)
        os.kill(second, signal.SIGKILL)
        eventually(lambda: host.events("worker_not_replaced"))

        assert third == host.lives()[2]
        assert host.ask(port)[0] == third

    def test_told_before_all_serve_it_still_gets_ready(self, start_host: StartHost) -> None:
        host = start_host("hang")
        eventually(lambda: len(host.lives()) == 1)
        host.order("serve")

        host.signal(signal.SIGHUP)
        port = host.wait_ready()

        eventually(lambda: host.events("rolled"))
        assert host.ask(port)[0] == host.lives()[1]

    def test_the_private_store_is_left_alone(self, start_host: StartHost, tmp_path: Path) -> None:
        host = start_host(redis_url="", data_dir=tmp_path / "data")
        host.wait_ready()

        host.signal(signal.SIGHUP)
        eventually(lambda: host.events("rolled"))

        assert len(host.events("store_ready")) == 1
        assert not gone(host.events("store_ready")[0]["pid"])

    def test_under_nohup_it_is_not_heard(self, start_host: StartHost) -> None:
        host = start_host(before=["nohup"])
        host.wait_ready()

        host.signal(signal.SIGHUP)
        host.signal(signal.SIGTERM)

        assert host.exit_code() == 0
        assert len(host.lives()) == 1
        assert [event["signal"] for event in host.events("draining")] == ["SIGTERM"]


class TestHungWorkers:
    def test_one_that_stands_still_is_killed_within_six_seconds_and_replaced(
        self, start_host: StartHost
    ) -> None:
        """The supervisor's seconds, which are longer when it does not get to them."""
        host = start_host()
        port = host.wait_ready()
        stopped, _, _ = host.ask(port)

        before = host.beats(stopped)
        os.kill(stopped, signal.SIGSTOP)
        after = host.beats(stopped)
        eventually(lambda: gone(stopped))
        beats = host.beats(stopped)

        assert BEAT_SECONDS == 1.0
        assert beats - after <= 6
        assert beats - before >= 5
        assert host.ask(port)[0] == host.lives()[1]
        (hung,) = host.events("worker_hung")
        assert (hung["level"], hung["pid"]) == ("error", stopped)
        assert [event["status"] for event in host.events("worker_died")] == [-signal.SIGKILL]

    def test_one_that_has_stopped_to_beat_is_killed(self, start_host: StartHost) -> None:
        host = start_host("mute", beat=0.1)
        host.wait_ready()
        host.order("serve")

        eventually(lambda: len(host.events("worker_ready")) == 2)

        assert host.events("worker_hung")[0]["pid"] == host.lives()[0]

    def test_a_host_that_was_suspended_kills_nobody(self, start_host: StartHost) -> None:
        host = start_host(beat=0.4)
        port = host.wait_ready()
        worker, _, _ = host.ask(port)

        for pid in (host.process.pid, worker):
            os.kill(pid, signal.SIGSTOP)
        since = time.monotonic()
        eventually(lambda: time.monotonic() - since > 2.5)
        for pid in (host.process.pid, worker):
            os.kill(pid, signal.SIGCONT)
        since = time.monotonic()
        eventually(lambda: time.monotonic() - since > 1.0)

        assert host.ask(port)[0] == worker
        assert host.events("worker_hung") == []

    def test_a_control_process_is_no_exception(self, start_host: StartHost) -> None:
        host = start_host(control="mute", beat=0.4)
        host.wait_ready()

        eventually(lambda: host.events("control_hung"))

        assert host.events("worker_hung") == []

    def test_one_that_drains_is_watched_no_less(self, start_host: StartHost) -> None:
        host = start_host("deaf", beat=0.1, drain_seconds=3600)
        host.wait_ready()
        host.signal(signal.SIGTERM)
        eventually(lambda: host.events("draining"))

        os.kill(host.lives()[0], signal.SIGSTOP)

        assert host.exit_code() == 0
        assert len(host.events("worker_hung")) == 1

    def test_one_that_serves_nobody_for_long_stays(self, start_host: StartHost) -> None:
        host = start_host(beat=0.4)
        port = host.wait_ready()
        since = time.monotonic()

        eventually(lambda: time.monotonic() - since > 3.0)

        assert host.ask(port)[0] == host.lives()[0]


def test_ctrl_c_in_the_terminal_reaches_no_worker(start_host: StartHost) -> None:
    """The terminal signals a process group: the workers are in others."""
    host = start_host(workers=2)
    port = host.wait_ready()

    pid, group, _ = host.ask(port)

    assert group == pid
    assert os.getpgid(host.process.pid) != group


def test_a_worker_that_dies_is_replaced_and_its_queue_lives_on(start_host: StartHost) -> None:
    host = start_host("single")
    port = host.wait_ready()
    first, _, _ = host.ask(port)
    host.order("serve")
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as waiting:
        os.kill(first, signal.SIGKILL)

        answer = waiting.makefile("rb").read()

    second = int(answer.split()[0])
    assert host.lives() == [first, second]
    assert host.events("worker_died")[0]["status"] == -signal.SIGKILL


def test_workers_that_never_get_ready_end_it_all(start_host: StartHost) -> None:
    host = start_host("exit 1")

    assert host.exit_code() == 70
    assert len(host.lives()) == 5


def test_a_worker_that_hangs_at_its_start_counts_as_one_that_died(start_host: StartHost) -> None:
    host = start_host("hang", impatient=True)
    eventually(lambda: len(host.lives()) >= 2)
    host.order("exit 1")

    assert host.exit_code() == 70
    assert len(host.lives()) == 5
    assert host.events("worker_died")[0]["status"] == -signal.SIGKILL


def test_workers_that_keep_dying_end_it_all(start_host: StartHost) -> None:
    host = start_host("crash")
    port = host.wait_ready()

    def poke() -> bool:
        with suppress(OSError, ValueError):
            host.ask(port)
        return host.process.poll() is not None

    eventually(poke, 4 * PATIENCE)

    assert host.exit_code() == 70
    assert len(host.lives()) == 25


def test_a_control_process_that_keeps_dying_leaves_the_workers_alone(
    start_host: StartHost,
) -> None:
    """Ten deaths within a minute end the server when they are a worker's."""
    host = start_host(control="crash")
    port = host.wait_ready()
    door = host.events("control_bound")[0]["port"]

    def poke() -> bool:
        with suppress(OSError, ValueError):
            host.ask(door)
        return len(host.events("control_died")) > 12

    eventually(poke, 4 * PATIENCE)
    pid, _, _ = host.ask(port)
    host.signal(signal.SIGTERM)

    assert host.exit_code() == 0
    assert host.events("worker_died") == []
    assert host.events("worker_ready")[0]["pid"] == pid
    assert all(event["restart_in"] > 0 for event in host.events("control_died"))


def test_nothing_is_ready_without_the_control_process(start_host: StartHost) -> None:
    host = start_host(control="exit 1")

    assert host.exit_code() == 70
    assert host.process.stdout is not None
    assert host.process.stdout.read() == ""


@pytest.mark.parametrize("code", [69, 78])
def test_a_worker_that_says_why_it_cannot_start_is_not_tried_again(
    start_host: StartHost, code: int
) -> None:
    host = start_host(f"exit {code}")

    assert host.exit_code() == code
    assert len(host.lives()) == 1


def test_once_it_serves_a_store_that_is_away_is_waited_for(start_host: StartHost) -> None:
    host = start_host()
    port = host.wait_ready()
    host.order("once 69")
    os.kill(host.ask(port)[0], signal.SIGKILL)

    eventually(lambda: host.events("worker_ready")[1:])

    assert [event["status"] for event in host.events("worker_died")] == [-signal.SIGKILL, 69]
    assert host.process.poll() is None


def test_however_long_the_store_is_away_those_who_serve_are_kept(start_host: StartHost) -> None:
    host = start_host(workers=2)
    port = host.wait_ready()
    victim = host.ask(port)[0]
    host.order("exit 69")
    os.kill(victim, signal.SIGKILL)

    eventually(lambda: len(host.events("worker_died")) > 10, 4 * PATIENCE)
    host.order("serve")
    eventually(lambda: len(host.events("worker_ready")) == 3)

    assert host.process.poll() is None


def test_no_worker_outlives_a_supervisor_that_was_killed(start_host: StartHost) -> None:
    host = start_host("deaf", workers=2)
    host.wait_ready()

    host.signal(signal.SIGKILL)

    eventually(lambda: len(host.lives()) == 2 and all(map(gone, host.lives())))


def test_without_a_redis_url_workers_get_a_private_store_which_goes_last(
    start_host: StartHost, tmp_path: Path
) -> None:
    host = start_host(redis_url="", data_dir=tmp_path / "data")
    port = host.wait_ready()

    _, _, store = host.ask(port)
    with socket.socket(socket.AF_UNIX) as link:
        link.connect(store.removeprefix("unix://"))
        link.sendall(b"PING\r\n")
        assert link.recv(7) == b"+PONG\r\n"
    host.signal(signal.SIGTERM)

    assert host.exit_code() == 0
    assert not Path(store.removeprefix("unix://")).exists()


def test_a_private_store_that_dies_is_started_again(start_host: StartHost, tmp_path: Path) -> None:
    host = start_host(redis_url="", data_dir=tmp_path / "data")
    host.wait_ready()

    os.kill(host.events("store_ready")[0]["pid"], signal.SIGKILL)

    eventually(lambda: len(host.events("store_ready")) == 2)
    assert host.process.poll() is None
    assert len(host.lives()) == 1


def test_a_private_store_that_keeps_dying_ends_it_all(
    start_host: StartHost, tmp_path: Path
) -> None:
    host = start_host(redis_url="", data_dir=tmp_path / "data")
    host.wait_ready()
    (manifest,) = (tmp_path / "data" / "store" / "appendonlydir").glob("*.manifest")
    manifest.write_text("nonsense")

    os.kill(host.events("store_ready")[0]["pid"], signal.SIGKILL)

    assert host.exit_code() == 69


def test_a_port_in_use_is_refused_although_it_could_be_shared() -> None:
    (taken,) = bind("127.0.0.1", 0, 1)
    with taken:
        port = taken.getsockname()[1]

        with pytest.raises(ConfigurationError, match=f"Port {port} on 127.0.0.1 is in use"):
            bind("127.0.0.1", port, 1)


@pytest.mark.parametrize("host", ["192.0.2.1", "no such host", "a" * 300, "x\udc80"])
def test_an_address_that_is_not_ours_is_refused(host: str) -> None:
    with pytest.raises(ConfigurationError, match="CHATSERVER_HOST"):
        bind(host, 0, 1)


@pytest.mark.parametrize("name", ["secret", "secret_previous"])
@pytest.mark.parametrize("secret", ["short", "a" * 64, "changeme" * 4])
def test_a_weak_secret_is_refused_and_not_repeated(name: str, secret: str) -> None:
    reasons = refusals(load(env_file=None, **{name: secret}))

    assert reasons
    assert all(reason.startswith(f"CHATSERVER_{name.upper()} is not fit") for reason in reasons)
    assert secret not in "\n".join(reasons)


KEY = secrets.token_urlsafe(48)


@pytest.mark.parametrize(
    ("host", "control_host", "refused"),
    [
        ("127.0.0.1", "127.0.0.1", True),
        ("0.0.0.0", "127.0.0.1", True),
        ("127.0.0.1", "::", True),
        ("192.0.2.1", "127.0.0.1", False),
    ],
)
def test_one_port_is_refused_where_it_cannot_be_had_twice(
    host: str, control_host: str, refused: bool
) -> None:
    settings = load(
        env_file=None,
        host=host,
        port=9000,
        control_host=control_host,
        control_port=9000,
        control_key=KEY,
    )

    assert any("are the same" in reason for reason in refusals(settings)) is refused
    assert refusals(settings.model_copy(update={"control_key": None})) == []


@pytest.mark.parametrize(
    ("control_host", "tls", "refused"),
    [
        ("127.0.0.1", False, False),
        ("::1", False, False),
        ("localhost", False, False),
        ("0.0.0.0", False, True),
        ("chat.example", False, True),
        ("0.0.0.0", True, False),
    ],
)
def test_in_production_the_control_api_is_on_this_machine_or_under_tls(
    control_host: str, tls: bool, refused: bool
) -> None:
    settings = load(
        env_file=None,
        environment="production",
        control_host=control_host,
        control_key=KEY,
        tls_certfile="cert.pem" if tls else None,
        tls_keyfile="key.pem" if tls else None,
    )

    reasons = settings.problems()

    assert any("CHATSERVER_CONTROL_HOST" in reason for reason in reasons) is refused


def test_tls_files_that_are_missing_or_nonsense_are_refused(tmp_path: Path) -> None:
    nonsense = tmp_path / "nonsense.pem"
    nonsense.write_text("nonsense")
    missing = tmp_path / "missing.pem"

    for path, why in ((nonsense, "they are not"), (missing, "No such file")):
        (reason,) = refusals(load(env_file=None, tls_certfile=path, tls_keyfile=path))

        assert why in reason


class TestRestarts:
    def test_the_wait_doubles_up_to_two_seconds(self) -> None:
        restarts = Restarts()

        waits = [restarts.died(60.0 * n, lived=1.0, was_ready=True) for n in range(7)]

        assert waits == [0.1, 0.2, 0.4, 0.8, 1.6, 2.0, 2.0]

    def test_thirty_seconds_of_life_bring_it_back_to_the_first_wait(self) -> None:
        restarts = Restarts()
        restarts.died(0.0, lived=1.0, was_ready=True)
        restarts.died(60.0, lived=1.0, was_ready=True)

        assert restarts.died(120.0, lived=30.0, was_ready=True) == 0.1
        assert restarts.died(180.0, lived=29.9, was_ready=True) == 0.2

    def test_five_deaths_without_being_ready_are_enough(self) -> None:
        restarts = Restarts()

        waits = [restarts.died(100.0 * n, lived=1.0, was_ready=False) for n in range(5)]

        assert waits[-1] is None
        assert None not in waits[:-1]

    def test_being_ready_once_starts_that_count_anew(self) -> None:
        restarts = Restarts()

        waits = [restarts.died(100.0 * n, lived=1.0, was_ready=n == 3) for n in range(8)]

        assert None not in waits

    def test_twenty_five_deaths_within_three_minutes_are_enough(self) -> None:
        restarts = Restarts()

        waits = [restarts.died(7.4 * n, lived=1.0, was_ready=True) for n in range(25)]

        assert waits[-1] is None
        assert None not in waits[:-1]

    def test_a_death_every_ten_seconds_is_borne(self) -> None:
        restarts = Restarts()

        waits = [restarts.died(10.0 * n, lived=8.0, was_ready=True) for n in range(100)]

        assert None not in waits

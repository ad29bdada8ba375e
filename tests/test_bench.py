"""The benchmark runs, draws its picture, fills its page, and leaves nothing behind.

What it measures here means nothing: the stretches are too short.
"""

from __future__ import annotations

import json
import os
import secrets
import signal
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from benchmark import memory, servers

ROOT = Path(__file__).parents[1]
PATIENCE = 4 * float(os.environ.get("TEST_PATIENCE", "15"))
MARK = f"bench-{secrets.token_hex(8)}"


def start(*words: str) -> subprocess.Popen[str]:
    # Nothing is fetched for a test: Node's servers take part where they are installed already.
    environment = os.environ | {"BENCH_TEST": MARK, "npm_config_offline": "true"}
    return subprocess.Popen(
        [sys.executable, str(ROOT / "scripts" / "bench.py"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


def marked() -> list[int]:
    """Processes that descend from a benchmark of this test. Not its store, which writes its title
    over its environment.
    """
    found = []
    for path in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            if f"BENCH_TEST={MARK}\0".encode() in path.read_bytes():
                found.append(int(path.parent.name))
    return found


def until_marked(enough: range) -> None:
    deadline = time.monotonic() + PATIENCE
    while len(marked()) not in enough:
        if time.monotonic() > deadline:
            left = marked()
            for pid in left:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            pytest.fail(f"{len(left)} processes, not {enough}")
        time.sleep(0.02)


class Run:
    """A short fanout, with all that it writes."""

    def __init__(self, directory: Path) -> None:
        self.picture = directory / "fanout.svg"
        self.page = directory / "page.md"
        figures = directory / "figures.json"
        self.page.write_text("Before.\n\n<!-- fanout -->\nold\n<!-- /fanout -->\n\nAfter.\n")
        bench = start(
            *("fanout", "--seconds", "0.1", "--sockets", "50", "--json", str(figures)),
            *("--svg", str(self.picture), "--markdown", str(self.page)),
        )
        self.printed, _ = bench.communicate(timeout=PATIENCE)
        assert bench.returncode == 0, self.printed
        self.figures: dict[str, Any] = json.loads(figures.read_text())


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Run:
    return Run(tmp_path_factory.mktemp("bench"))


def test_every_server_is_measured_or_a_note_says_why_not(run: Run) -> None:
    fanout = run.figures["fanout"]
    measured = {(row["server"], row["window"]) for row in fanout["rows"]}
    excuses = " ".join(fanout["notes"])

    assert fanout["sockets"] == 50
    for server in ("chatserver", "websockets", "C epoll", "Node ws", "Socket.IO"):
        assert {(server, 1), (server, 64)} <= measured or f"{server} " in excuses
    assert {("chatserver", 1), ("websockets", 64)} <= measured


def test_ratios_are_told_for_each_pair(run: Run) -> None:
    rows = run.figures["fanout"]["rows"]
    (ours, theirs) = (
        next(row for row in rows if row["server"] == name) for name in ("chatserver", "websockets")
    )

    assert ours["deliveries"] > 0
    assert len(ours["rounds"]) == 3
    assert ours["x websockets"] > 0
    assert theirs["x chatserver"] > 0
    assert {"server", "client", "store"} <= ours["cpu"].keys()


def test_the_machine_stands_with_the_figures(run: Run) -> None:
    assert {"cpu", "cores", "kernel", "python", "load_before"} <= run.figures["machine"].keys()
    assert run.printed.startswith(f"{run.figures['machine']['cores']} cores, ")


def test_the_picture_is_well_formed_and_has_a_bar_for_each_row(run: Run) -> None:
    space = "{http://www.w3.org/2000/svg}"
    svg = ET.parse(run.picture).getroot()

    assert svg.tag == f"{space}svg"
    assert len(svg.findall(f"{space}rect")) == len(run.figures["fanout"]["rows"])


def test_the_page_keeps_all_but_the_table(run: Run) -> None:
    page = run.page.read_text()

    assert page.startswith("Before.\n\n<!-- fanout -->\n\nOne room, 50 receivers")
    assert "\n| chatserver | 1 | " in page
    assert page.endswith("<!-- /fanout -->\n\nAfter.\n")
    assert "old" not in page


def test_the_committed_picture_is_well_formed() -> None:
    ET.parse(ROOT / "docs" / "performance.svg")


def test_a_server_whose_core_others_had_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "WARM_SOCKETS", 10)
    shares = {"server": 0.5, "client": 0.2, "store": 0.1, "disturbed": 0.42}
    monkeypatch.setattr(servers.Usage, "shares", lambda usage: shares)

    result = memory.run(0.1, 50)

    assert result["notes"] == ["handshake and join: other processes had the server's core for 42%"]


def test_an_interrupt_leaves_no_process_behind() -> None:
    with start("crowd", "--sockets", "3000") as bench:
        # Itself, a supervisor, three workers, three that hold the members.
        until_marked(range(8, 20))
        bench.send_signal(signal.SIGINT)
        assert bench.wait(PATIENCE) == 130

    until_marked(range(1))

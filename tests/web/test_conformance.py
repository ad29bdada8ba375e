"""The conformance suite: this project's clients pass, and a naive one is found out."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SUITE = ROOT / "scripts" / "conformance"
GLUE = ROOT / "scripts" / "conform" / "glue"
NODE = shutil.which("node")
SECONDS = 400

FOUND = {
    "full_jitter": "it hammers",
    "drain": "it came back after",
    "duplicate": "a send came with body",
    "hole": "no join came",
    "lost_ack": "under another key",
    "epoch": "it joined since None",
    "final_4503": "it came back, and should not have",
    "own_fault_1002": "which is its own fault",
    "refused_401_revoked": "it came back, and should not have",
    "refused_429": "was told 3",
    "expired_4401": "no connection came",
    "refresh_in_time": "a refresh came that should not",
    "saved_before_used": "before the new pair was saved",
    "trade_without_an_answer": "1 trades, not 3",
    "join_unavailable": "no join came",
    "key_window": "did not say that it saw failed",
    "not_recovered": "it joined since None",
    "rate_limited": "no send came",
}
"""What the naive client does wrong, and part of what its author is told."""


def suite(*words: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONWARNINGS": "default"}
    return subprocess.run(
        [str(SUITE), *words],
        capture_output=True,
        text=True,
        env=environment,
        timeout=SECONDS,
        check=False,
    )


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_javascript_client_passes() -> None:
    command = [str(NODE), "--experimental-websocket", "--no-warnings", str(GLUE / "javascript.mjs")]
    done = suite("--patience", "3", *command)

    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_the_python_client_passes() -> None:
    done = suite("--patience", "3", sys.executable, str(GLUE / "python.py"))

    assert (done.returncode, done.stderr) == (0, ""), done.stdout


def test_a_naive_client_is_told_what_it_does_wrong() -> None:
    naive = str(Path(__file__).with_name("naive.py"))
    chosen = [word for name in ("first_connection", *FOUND) for word in ("--case", name)]
    done = suite(*chosen, sys.executable, naive)
    told = {
        name: (verdict, why)
        for verdict, name, why in re.findall(
            r"^(pass|FAIL)  (\w+) .*\n((?:      .*\n)*)", done.stdout, re.MULTILINE
        )
    }

    assert done.returncode == 1
    assert told.pop("first_connection")[0] == "pass"
    assert set(told) == set(FOUND)
    assert {name: told[name] for name, why in FOUND.items() if why not in told[name][1]} == {}
    assert {verdict for verdict, _ in told.values()} == {"FAIL"}


def test_a_program_that_does_not_start_is_told_as_such() -> None:
    missing = suite("--case", "left", "/nowhere/client")
    ending = suite("--case", "left", sys.executable, "-c", "print('no such option')")

    assert missing.returncode == ending.returncode == 1
    assert "the program does not start" in missing.stdout
    assert "the program ended by itself, with 0" in ending.stdout
    assert "no such option" in ending.stdout


def test_the_list_has_a_rule_for_each_case() -> None:
    listed = suite("--list")
    lines = listed.stdout.splitlines()

    assert listed.returncode == 0
    assert len(lines) > 50
    assert all(re.fullmatch(r"\w+ +\S.*\.", line) for line in lines)


def test_it_sets_up_what_it_needs_in_a_fresh_checkout(tmp_path: Path) -> None:
    scripts = tmp_path / "scripts"
    shutil.copytree(ROOT / "scripts" / "conform", scripts / "conform")
    shutil.copy2(SUITE, scripts)
    setup = scripts / "setup"
    setup.write_text(
        "#!/bin/sh\n"
        f'cd "{tmp_path}" && mkdir -p .venv/bin\n'
        f'printf \'#!/bin/sh\\nexec "{sys.executable}" "$@"\\n\' > .venv/bin/python\n'
        "chmod +x .venv/bin/python\n"
    )
    setup.chmod(0o755)
    done = subprocess.run(
        [str(scripts / "conformance"), "--list"],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHON": "false"},
        timeout=SECONDS,
        check=False,
    )

    assert (done.returncode, done.stderr) == (0, "")
    assert "lost_ack" in done.stdout

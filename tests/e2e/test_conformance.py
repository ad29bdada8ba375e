"""Autobahn's cases, the WebSocket world's own test, against the product's connection."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

CASES = 301
"""All but those of compression, 12 and 13."""
CAPPED = {"9.3.1", "9.3.2", "9.4.1", "9.4.2"}
"""Messages in more fragments than are taken."""
LIBRARYS = {"7.1.5"}
"""websockets' own: a close frame amid a fragmented message."""
FINE = {"OK", "NON-STRICT", "INFORMATIONAL"}
SECONDS = 240


@pytest.fixture
def echo() -> Iterator[str]:
    """Where the product's connection echoes."""
    with socket.create_server(("127.0.0.1", 0)) as door:
        command = [sys.executable, "-m", "tests.support.echo", str(door.fileno())]
        with subprocess.Popen(command, pass_fds=[door.fileno()]) as process:
            yield f"127.0.0.1:{door.getsockname()[1]}"
            process.terminate()
            assert process.wait(10) == 0


def test_of_autobahns_cases_only_the_named_ones_are_not_fine(echo: str, tmp_path: Path) -> None:
    kosoku = str(Path(sys.executable).with_name("kosoku"))
    command = [kosoku, "-p", "2", "-x", "12.*", "-x", "13.*", "-o", str(tmp_path), echo]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=SECONDS)
    index = json.loads((tmp_path / "index.json").read_text())
    [results] = index.values()

    failed = {
        case: result
        for case, result in results.items()
        if result["behavior"] not in FINE or result["behaviorClose"] not in FINE
    }
    assert len(results) == CASES
    assert failed.keys() == CAPPED | LIBRARYS, ran.stdout[-4000:]

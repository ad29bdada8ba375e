"""The examples of the page on the browser's client run as they stand there."""

from __future__ import annotations

import asyncio
import json
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.faults.run import theatre
from tests.support.worker import PATIENCE

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "client-browser.md").read_text()
NODE = shutil.which("node")
EXAMPLES = re.findall(r"^```js\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
URL = "ws://127.0.0.1:8000/v1/ws"

pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")

BROWSER = """
// What a page has, and somebody's backend.
const kept = new Map();
globalThis.localStorage = {
  getItem: (name) => kept.get(name) ?? null,
  setItem: (name, text) => kept.set(name, text),
  removeItem: (name) => kept.delete(name),
};
const { fetch } = globalThis;
globalThis.fetch = async (url, ...more) =>
  String(url).startsWith("https://app.example/")
    ? Response.json(JSON.parse(process.env.PAIR))
    : fetch(url, ...more);
"""


def run(program: Path, pair: dict[str, str]) -> subprocess.CompletedProcess[str]:
    flags = ["--experimental-websocket", "--no-warnings", "--import", "./browser.mjs"]
    environment = {
        "PATH": os.environ["PATH"],
        "CHAT_TOKEN": pair["access_token"],
        "PAIR": json.dumps(pair),
    }
    return subprocess.run(
        [str(NODE), *flags, program.name],
        cwd=program.parent,
        env=environment,
        capture_output=True,
        text=True,
        timeout=2 * PATIENCE,
        check=False,
    )


async def test_every_example_runs(tmp_path: Path) -> None:
    package = tmp_path / "node_modules" / "chatserver"
    package.parent.mkdir()
    package.symlink_to(ROOT / "chatserver" / "web")
    (tmp_path / "browser.mjs").write_text(BROWSER)
    assert len(EXAMPLES) == 6
    async with theatre({}) as stage:
        for number, example in enumerate(EXAMPLES):
            pair = await stage.server.control("/v1/tokens", {"user": "carol"})
            program = tmp_path / f"example-{number}.mjs"
            assert URL in example
            program.write_text(example.replace(URL, stage.server.url))
            # The server's link to its store is this process's.
            done = await asyncio.to_thread(run, program, pair)

            assert not done.returncode, f"{example}{done.stderr}"

"""The JavaScript client by itself: its rules, its types, its package."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
from importlib.resources import files
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
WEB = ROOT / "chatserver" / "web"
NODE = shutil.which("node")
NPM = shutil.which("npm")
TYPESCRIPT = "typescript@7.0.2"
SECONDS = 60 * float(os.environ.get("TEST_PATIENCE", "15")) / 15

pytestmark = pytest.mark.skipif(NODE is None, reason="needs node")


def run(*words: str, cwd: Path = ROOT) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        words, cwd=cwd, capture_output=True, text=True, timeout=SECONDS, check=False
    )


def can_be_had(package: str, directory: Path) -> bool:
    """Installed from npm. Where the registry does not even refuse, it is not waited for."""
    words = ["install", "--prefer-offline", "--fetch-retries=0", package]
    try:
        return not run(str(NPM), *words, cwd=directory).returncode
    except subprocess.TimeoutExpired:
        return False


def test_it_keeps_its_rules() -> None:
    done = run(str(NODE), "--test", str(HERE / "chat.test.mjs"))

    assert done.returncode == 0, done.stdout


def test_its_types_let_through_what_is_right_and_only_that(tmp_path: Path) -> None:
    if NPM is None or not can_be_had(TYPESCRIPT, tmp_path):
        pytest.skip("needs TypeScript from npm")
    compiler = tmp_path / "node_modules" / ".bin" / "tsc"
    options = "--noEmit --strict --target es2022 --module nodenext --lib es2023,dom,dom.iterable"
    done = run(str(compiler), *options.split(), str(HERE / "usage.mts"))

    assert (done.returncode, done.stdout) == (0, "")


def test_what_is_exported_has_a_type_and_the_other_way_round() -> None:
    code, types = ((WEB / name).read_text() for name in ("chat.js", "chat.d.ts"))
    exported = re.findall(r"^export (?:function|class) (\w+)", code, re.MULTILINE)
    typed = re.findall(r"^export (?:function|class) (\w+)", types, re.MULTILINE)

    assert sorted(exported) == sorted(typed)


def test_the_package_is_the_projects() -> None:
    package = json.loads((WEB / "package.json").read_text())
    [version] = re.findall(r'^version = "(.*)"$', (ROOT / "pyproject.toml").read_text(), re.M)

    assert package["version"] == version
    assert (WEB / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()
    assert (files("chatserver") / "web" / "chat.js").is_file()


@pytest.mark.skipif(NPM is None, reason="needs npm")
def test_what_npm_packs_can_be_imported_by_its_name(tmp_path: Path) -> None:
    packed = run(str(NPM), "pack", "--json", "--pack-destination", str(tmp_path), cwd=WEB)
    assert packed.returncode == 0, packed.stderr
    [package] = json.loads(packed.stdout)
    named = {file["path"] for file in package["files"]}
    home = tmp_path / "node_modules" / "chatserver"
    home.mkdir(parents=True)
    archive = str(tmp_path / package["filename"])
    subprocess.run(["tar", "-xzf", archive, "-C", str(tmp_path)], check=True)
    shutil.copytree(tmp_path / "package", home, dirs_exist_ok=True)
    program = tmp_path / "program.mjs"
    program.write_text('import * as chat from "chatserver"; console.log(Object.keys(chat).sort());')
    done = run(str(NODE), str(program))

    assert named == {"chat.js", "chat.d.ts", "package.json", "README.md", "LICENSE"}
    assert "connect" in done.stdout, done.stderr
    assert "tokenKeeper" in done.stdout

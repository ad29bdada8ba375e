"""The client can be installed by itself: what stands in its pyproject.toml is what it needs."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

from chatserver import __version__

ROOT = Path(__file__).parents[2]
CLIENT = ROOT / "chatserver" / "client"


def read(path: Path) -> Any:
    return tomllib.loads(path.read_text())


def packed() -> list[Path]:
    left_out = read(CLIENT / "pyproject.toml")["tool"]["hatch"]["build"]["targets"]["wheel"]
    return [path for path in CLIENT.glob("*.py") if path.name not in left_out["exclude"]]


def imported(path: Path) -> set[str]:
    """The packages a module imports that are not of the standard library."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names.add(str(node.module))
    return {name.partition(".")[0] for name in names} - sys.stdlib_module_names


def test_it_needs_what_it_imports_in_the_versions_of_the_whole() -> None:
    whole = read(ROOT / "pyproject.toml")["project"]
    project = read(CLIENT / "pyproject.toml")["project"]
    needed = {text.partition(">=")[0]: text for text in project["dependencies"]}

    assert set(needed) == set().union(*map(imported, packed()))
    assert set(needed.values()) <= set(whole["dependencies"])
    assert project["requires-python"] == whole["requires-python"]
    assert project["version"] == whole["version"] == __version__
    assert (CLIENT / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_it_can_be_imported_without_the_rest_of_the_house(tmp_path: Path) -> None:
    house = tmp_path / "chatserver" / "client"
    house.mkdir(parents=True)
    for path in packed():
        (house / path.name).write_text(path.read_text())
    program = "import chatserver.client, sys; print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stderr
    ours = {name for name in done.stdout.split() if name.startswith("chatserver")}
    assert ours == {"chatserver", "chatserver.client"} | {
        f"chatserver.client.{path.stem}" for path in packed() if path.stem != "__init__"
    }

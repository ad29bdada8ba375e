"""What the pages show is true: their examples run, and their names are the code's."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from chatserver.core.claims import MAX_LIFETIME
from chatserver.core.session import REVOCATION_SECONDS, STALE_SECONDS, Kind
from chatserver.store import keys
from chatserver.store.keyring import Keyring
from chatserver.store.revocations import CONFIRM_SECONDS

DOCS = Path(__file__).parents[1] / "docs"
PATIENCE = float(os.environ.get("TEST_PATIENCE", "15"))
SECRET = "tomato-4f1c9a7be2d05836-9c8e3b71f0a26d54"
NODE = shutil.which("node")


def page(name: str) -> str:
    return (DOCS / name).read_text()


def example(language: str, name: str = "tokens.md") -> str:
    (code,) = re.findall(rf"^```{language}\n(.*?)^```$", page(name), re.MULTILINE | re.DOTALL)
    return str(code)


def output(*words: str) -> str:
    environment = {"PATH": os.environ["PATH"], "CHATSERVER_SECRET": SECRET}
    done = subprocess.run(
        words, capture_output=True, text=True, env=environment, timeout=PATIENCE, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


def check(printed: str) -> None:
    """It is one line, a token that the server takes, and as long-lived as one may be."""
    assert re.fullmatch(r"\S+\n", printed)
    identity = Keyring(SECRET.encode()).verify(printed.strip(), now=time.time())
    assert (identity.user, identity.roles, identity.rooms) == ("alice", ("member",), None)
    assert identity.expires_at - identity.issued_at == MAX_LIFETIME
    assert identity.session.startswith("s-")


def test_the_python_example_issues_a_good_token(tmp_path: Path) -> None:
    program = tmp_path / "issue.py"
    program.write_text(example("python"))

    check(output(sys.executable, "-I", str(program)))


@pytest.mark.skipif(NODE is None, reason="needs node")
def test_the_javascript_example_issues_a_good_token(tmp_path: Path) -> None:
    program = tmp_path / "issue.mjs"
    program.write_text(example("js"))

    check(output(str(NODE), str(program)))


@pytest.mark.parametrize(
    ("kind", "value"), [(Kind.SESSION, "<sid>"), (Kind.TOKEN, "<jti>"), (Kind.USER, "<user>")]
)
def test_the_keys_of_the_contract_are_those_that_are_written(kind: Kind, value: str) -> None:
    assert f"| `{keys.record(kind, value)}` |" in page("tokens.md")
    assert f"`{keys.ended('<user>')}`" in page("tokens.md")


def test_the_times_of_the_contract_are_those_that_are_kept() -> None:
    text = page("tokens.md")

    assert f"after {REVOCATION_SECONDS} s it would be accepted" in text
    assert f"by itself {REVOCATION_SECONDS} s after the revocation" in text
    assert f"not seen the list for {STALE_SECONDS:g} s refuses" in text
    assert f"after {CONFIRM_SECONDS:g} s at most" in text


def test_the_house_has_every_module() -> None:
    listed = re.findall(r"[\w]+\.py", page("architecture.md"))
    package = DOCS.parent / "chatserver"
    parts = ["", "core", "net", "store"]
    modules = {path.name for part in parts for path in (package / part).glob("*.py")}

    assert modules - {"__init__.py"} <= set(listed)


@pytest.mark.parametrize("name", ["architecture.md", "protocol.md", "tokens.md"])
def test_links_lead_to_pages_and_headings_that_exist(name: str) -> None:
    for target, heading in re.findall(r"\]\(([\w.-]*)(?:#([\w-]+))?\)", page(name)):
        text = page(target or name)
        titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}

        assert not heading or heading in anchors

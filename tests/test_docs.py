"""What the pages show is true: their examples run, and their names are the code's."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from chatserver.core import errors
from chatserver.core.claims import MAX_LIFETIME
from chatserver.core.session import REVOCATION_SECONDS, STALE_SECONDS, Kind
from chatserver.exposition import describe
from chatserver.metrics import ABOUT
from chatserver.store import keys
from chatserver.store.keyring import Keyring
from chatserver.store.revocations import CONFIRM_SECONDS
from tests.support.client import Client
from tests.support.server import KEY, Server
from tests.support.tokens import Issuer
from tests.support.valkey import Valkey

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
DOCUMENTS = sorted(f"docs/{each.name}" for each in DOCS.glob("*.md"))
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


def test_every_refusal_and_every_error_is_on_the_page_of_the_wire() -> None:
    listed, statuses = set(), ""
    rows = re.findall(r"^\| ([\d, ]*)\| (`\w+`(?:, `\w+`)*) \|", page("protocol.md"), re.MULTILINE)
    for status, codes in rows:
        statuses = status.strip() or statuses
        listed |= {
            (int(each), code) for each in statuses.split(",") for code in re.findall(r"\w+", codes)
        }
    refusals = [*vars(errors).values(), *errors.TOKEN_REFUSALS.values()]

    for refusal in refusals:
        if isinstance(refusal, errors.Refusal):
            assert (refusal.status, refusal.code) in listed
    for code in errors.ReplyCode:
        assert re.search(rf"^\| .*`{code.value}`.* \| .*\|$", page("protocol.md"), re.MULTILINE)


async def test_the_user_of_the_page_may_do_in_the_store_all_that_the_server_does(
    own_valkey: Valkey, issuer: Issuer, tmp_path: Path, room: str
) -> None:
    (words,) = re.findall(
        r"\$ redis-cli (ACL SETUSER chatserver on .*)$", page("reliability.md"), re.M
    )
    assert own_valkey.command(*shlex.split(words)) == b"+OK"
    store = own_valkey.url.replace("//", "//chatserver:password@", 1)
    server = Server(tmp_path / "log", issuer, REDIS_URL=store, CONTROL_KEY=KEY, WORKERS=2)
    try:
        pair = server.ask("POST", "/v1/tokens", {"user": "alice"}).body
        session = f"/v1/sessions/{pair['session']}"
        async with await Client.connect(server.url, pair["access_token"]) as client:
            await client.join(room)
            await client.publish(room, "hello")
            await client.ask("history", room=room)
            replies = [
                server.ask("PATCH", session, {"roles": ["guest"]}),
                server.ask("GET", "/v1/sessions?user=alice"),
                server.ask("GET", "/v1/rooms"),
                server.ask("POST", f"/v1/rooms/{room}/messages", {"user": "bot", "body": 1}),
                server.ask("POST", "/v1/revocations", {"user": "alice"}),
            ]
    finally:
        server.stop()

    assert [reply.status for reply in replies] == [200, 200, 200, 201, 200]
    assert own_valkey.command("ACL", "LOG") == b"*0"


def test_the_house_has_every_module() -> None:
    listed = re.findall(r"[\w]+\.py", page("architecture.md"))
    package = DOCS.parent / "chatserver"
    parts = ["", "core", "net", "store"]
    modules = {path.name for part in parts for path in (package / part).glob("*.py")}

    assert modules - {"__init__.py"} <= set(listed)


def test_every_metric_is_listed_as_it_is_exposed() -> None:
    rows = re.findall(r"^\| `(\w+)` \| (.*) \| (.*) \| (.*) \|$", page("metrics.md"), re.MULTILINE)

    assert rows == list(describe())


def exposed() -> set[str]:
    """Every name that a query may use."""
    found = set()
    for name, kind, _, _ in describe():
        parts = ("_bucket", "_count", "_sum") if kind == "histogram" else ("",)
        found |= {name + part for part in parts}
    return found


def queried(expression: str) -> set[str]:
    return set(re.findall(r"\b(?:chatserver|process)_\w+", expression))


def dashboard() -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(page("grafana.json"))
    return parsed


def panels() -> Iterator[dict[str, Any]]:
    return (panel for panel in dashboard()["panels"] if panel["type"] != "row")


def test_the_dashboard_and_the_alerts_ask_for_metrics_that_exist() -> None:
    asked = [target["expr"] for panel in panels() for target in panel["targets"]]
    asked += re.findall(r"^ +expr: (.*)$", page("metrics.md"), re.MULTILINE)
    values = {value for about in ABOUT.values() for value in about.values}

    assert len(asked) > 50
    for expression in asked:
        assert queried(expression) <= exposed()
        for listed in re.findall(r'\b(?:outcome|code|kind|lane)[!=]~?"([^"]*)"', expression):
            assert set(listed.split("|")) <= values
    # What is counted is shown.
    names = {name for name in exposed() if not name.endswith(("_bucket", "_count", "_sum"))}
    unseen = {"process_virtual_memory_bytes", "process_start_time_seconds"}
    shown = {name for panel in panels() for t in panel["targets"] for name in queried(t["expr"])}
    assert names - shown == unseen


def test_the_dashboard_can_be_imported_anywhere() -> None:
    """Its source of data is a variable, every panel says what it shows, and none hides another."""
    variables = {each["name"]: each["type"] for each in dashboard()["templating"]["list"]}
    ids = [panel["id"] for panel in dashboard()["panels"]]
    places = [
        (x, y)
        for panel in dashboard()["panels"]
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert variables == {"datasource": "datasource", "job": "query", "instance": "query"}
    assert dashboard()["schemaVersion"] >= 39
    assert len(ids) == len(set(ids))
    assert len(places) == len(set(places))
    assert max(x for x, _ in places) < 24
    for panel in panels():
        assert panel["description"].endswith(".")
        for part in (panel, *panel["targets"]):
            assert part["datasource"] == {"type": "prometheus", "uid": "${datasource}"}


@pytest.mark.parametrize("name", ["README.md", "chatserver/web/README.md", *DOCUMENTS])
def test_links_lead_to_pages_and_headings_that_exist(name: str) -> None:
    here = ROOT / name
    for target, heading in re.findall(
        r"\]\((?!https?:)([^)#\s]*)(?:#([\w-]+))?\)", here.read_text()
    ):
        there = here.parent / target if target else here
        assert there.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.*)$", there.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}
            assert heading in anchors

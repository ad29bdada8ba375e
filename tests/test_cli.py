"""The command line: what it prints, where, and with which exit code."""

from __future__ import annotations

import asyncio
import base64
import json
import logging
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import structlog
from click.testing import CliRunner, Result

from chatserver import __version__, cli, supervisor
from chatserver.cli import check, serve
from chatserver.core.session import Kind
from chatserver.settings import COMMAND, development_secret, load, variable
from chatserver.store import revocations
from chatserver.store.keyring import Keyring, weaknesses
from chatserver.store.link import Store
from tests.support.tokens import unique
from tests.support.valkey import Valkey

ROOT = Path(__file__).parents[1]
PATIENCE = float(os.environ.get("TEST_PATIENCE", "15"))
SECRET = "tomato-4f1c9a7be2d05836-9c8e3b71f0a26d54"
NOWHERE = "redis://:tomato@127.0.0.1:1/0"

Run = Callable[..., Result]


@pytest.fixture(autouse=True)
def _logging_restored() -> Iterator[None]:
    root, peers = logging.getLogger(), logging.getLogger("websockets")
    before = root.handlers[:], root.level
    yield
    structlog.reset_defaults()
    root.handlers, root.level = before
    peers.handlers, peers.propagate = [], True


@pytest.fixture(autouse=True)
def data_dir(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A place of its own for each test, and no settings but these."""
    for name in os.environ:
        if name.upper().startswith("CHATSERVER_"):
            monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CHATSERVER_DATA_DIR", str(tmp_path / "data"))
    return tmp_path / "data"


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch) -> Run:
    """Run a command; keywords are settings."""

    def invoke(*words: str, stdin: str | bytes | None = None, **settings: str) -> Result:
        with monkeypatch.context() as patch:
            for name, value in settings.items():
                patch.setenv(variable(name), value)
            return CliRunner().invoke(cli.main, words, input=stdin, prog_name="chatserver")

    return invoke


def json_of(result: Result) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(result.stdout)
    return parsed


def keyring(data_dir: Path) -> Keyring:
    return Keyring(development_secret(data_dir))


def claims_of(token: str) -> dict[str, Any]:
    part = token.split(".")[1]
    claims: dict[str, Any] = json.loads(base64.urlsafe_b64decode(part + "=="))
    return claims


# -- every command ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "words",
    [
        "",
        "serve",
        "secret",
        "token",
        "token issue",
        "token refresh",
        "token inspect",
        "revoke",
        "sessions",
        "chat",
        "check",
    ],
)
def test_help_has_an_example_and_stays_as_it_was_written(run: Run, words: str) -> None:
    result = run(*words.split(), "--help")

    assert result.exit_code == 0
    assert re.search(r"^  Examples?:\n    chatserver ", result.stdout, re.MULTILINE)


def test_the_version_is_told(run: Run) -> None:
    result = run("--version")

    assert (result.exit_code, result.stdout) == (0, f"chatserver {__version__}\n")


def test_the_help_lists_every_exit_code(run: Run) -> None:
    text = run("--help").stdout
    page = (ROOT / "docs" / "configuration.md").read_text()

    for code, meaning in re.findall(r"^    (\d+) +(.*)$", text, re.MULTILINE):
        assert f"| {code} | {meaning} |" in page
    assert len(re.findall(r"^    \d+ ", text, re.MULTILINE)) == 6


@pytest.mark.parametrize(
    "words",
    [
        ["token", "issue"],
        ["token", "issue", "--user", ""],
        ["token", "issue", "--user", "a\nb"],
        ["token", "issue", "--user", "a" * 129],
        ["token", "issue", "--user", "a", "--ttl", "0"],
        ["token", "issue", "--user", "a", "--ttl", "901"],
        ["token", "issue", "--user", "a", "--room", "general"],
        ["token", "issue", "--user", "a", "--room", "general=x"],
        ["token", "issue", "--user", "a", "--room", "no room=r"],
        ["token", "issue", "--user", "a", "--room", "general=r", "--room", "general=rw"],
        ["token", "issue", "--user", "a", "--pair", "--session", "s"],
        ["token", "issue", "--user", "a", "--pair", "--ttl", "900"],
        ["token", "issue", "--user", "a", "--pair", "--json"],
        ["sessions"],
        ["sessions", "--user", ""],
        ["revoke"],
        ["revoke", "--user", "a", "--session", "b"],
        ["revoke", "--user", ""],
        ["revoke", "--user", "a\x1b[2J"],
        ["chat", "--room", "general"],
        ["chat", "--room", "general", "--user", "a", "--token", "b"],
        ["serve", "--port", "65536"],
        ["serve", "--workers", "0"],
        ["nonsense"],
    ],
)
def test_a_wrong_command_line_is_2_and_explained(run: Run, words: list[str]) -> None:
    result = run(*words)

    assert result.exit_code == 2
    assert result.stdout == ""
    assert "Error: " in result.stderr
    assert "\x1b" not in result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["serve"],
        ["check"],
        ["token", "issue", "--user", "a"],
        ["token", "issue", "--user", "a", "--pair"],
        ["token", "refresh", "rt1.a"],
        ["token", "inspect", "a.b.c"],
        ["token", "inspect", "rt1.a"],
        ["sessions", "--user", "a"],
        ["revoke", "--user", "a"],
        ["chat", "--room", "general", "--user", "a"],
    ],
)
def test_a_wrong_setting_is_78_in_every_command_and_explained(run: Run, words: list[str]) -> None:
    result = run(*words, port="x", redis_url="tomato")

    assert result.exit_code == 78
    assert result.stdout == ""
    assert "chatserver: CHATSERVER_PORT: must be a whole number.\n" in result.stderr
    assert "tomato" not in result.stderr


def test_our_own_bug_is_70_with_a_trace_in_the_log_and_no_secret(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("Bearer tomato")

    monkeypatch.setattr(supervisor, "run", fail)

    result = run("serve")

    assert result.exit_code == 70
    assert "RuntimeError: Bearer [redacted]" in result.stderr
    assert "tomato" not in result.stderr


# -- secret -----------------------------------------------------------------------------------


def test_a_secret_is_one_line_another_each_time_and_fit_to_sign(run: Run) -> None:
    first, second = (run("secret").stdout for _ in range(2))

    assert first != second
    assert re.fullmatch(r"[\w-]{64}\n", first)
    assert weaknesses(first.strip().encode()) == []


# -- token issue ------------------------------------------------------------------------------


def test_issue_prints_a_token_and_nothing_else(run: Run, data_dir: Path) -> None:
    result = run("token", "issue", "--user", "alice")

    identity = keyring(data_dir).verify(result.stdout.removesuffix("\n"), now=time.time())
    assert (identity.user, identity.roles, identity.rooms) == ("alice", ("member",), None)
    assert identity.expires_at - identity.issued_at == 900
    assert (result.exit_code, result.stderr) == (0, "")


def test_issue_takes_roles_rooms_a_session_and_a_lifetime(run: Run, data_dir: Path) -> None:
    words = "--user alice --role guest --role bot --room general=rw --room team-*=r --room x="

    result = run("token", "issue", *words.split(), "--session", "s", "--ttl", "60")

    identity = keyring(data_dir).verify(result.stdout.strip(), now=time.time())
    assert (identity.roles, identity.session) == (("guest", "bot"), "s")
    assert identity.rooms == {"general": "rw", "team-*": "r", "x": ""}
    assert identity.expires_at - identity.issued_at == 60


def test_every_token_has_an_id_of_its_own_and_a_session_unless_one_is_given(run: Run) -> None:
    first, second = (json_of(run("token", "issue", "--user", "a", "--json")) for _ in range(2))

    assert first["token_id"] != second["token_id"]
    assert first["session"] != second["session"]


def test_issue_as_json_tells_all_there_is(run: Run, data_dir: Path) -> None:
    issued = json_of(run("token", "issue", "--user", "alice", "--room", "general=r", "--json"))

    claims = claims_of(issued.pop("access_token"))
    assert issued == {
        "user": "alice",
        "session": claims["sid"],
        "token_id": claims["jti"],
        "roles": ["member"],
        "rooms": {"general": "r"},
        "issued_at": claims["iat"],
        "expires_at": claims["exp"],
        "kid": keyring(data_dir).kid,
    }


def test_a_given_secret_signs(run: Run, data_dir: Path) -> None:
    result = run("token", "issue", "--user", "alice", secret=SECRET)

    Keyring(SECRET.encode()).verify(result.stdout.strip(), now=time.time())
    assert not data_dir.exists()


@pytest.mark.parametrize("name", ["secret", "secret_previous"])
def test_a_weak_secret_signs_nothing(run: Run, name: str) -> None:
    result = run("token", "issue", "--user", "alice", **{name: "tomato"})

    assert result.exit_code == 78
    assert f"CHATSERVER_{name.upper()} is not fit to sign tokens. It is 6 bytes" in result.stderr
    assert "tomato" not in result.output


def test_production_makes_no_secret_of_its_own(run: Run, data_dir: Path) -> None:
    result = run("token", "issue", "--user", "alice", environment="production")

    assert result.exit_code == 78
    assert "CHATSERVER_SECRET is not set" in result.stderr
    assert "TLS" not in result.stderr
    assert not data_dir.exists()


def test_a_token_issued_right_after_its_user_was_revoked_is_a_later_one(
    run: Run, valkey: Valkey, user: str
) -> None:
    run("revoke", "--user", user, redis_url=valkey.url)

    issued = json_of(run("token", "issue", "--user", user, "--json", redis_url=valkey.url))

    async def cutoff() -> int:
        async with Store(valkey.url) as store:
            return await revocations.cutoff(store.call, user)

    assert issued["issued_at"] > asyncio.run(cutoff()) > 0


def test_a_store_that_is_away_does_not_keep_one_from_a_token(run: Run) -> None:
    result = run("token", "issue", "--user", "alice", redis_url=NOWHERE)

    assert result.exit_code == 0
    assert result.stderr == ""


def test_a_store_that_hangs_does_not_keep_one_waiting(run: Run, own_valkey: Valkey) -> None:
    own_valkey.freeze()

    result = run("token", "issue", "--user", "alice", redis_url=own_valkey.url)

    own_valkey.thaw()
    assert result.exit_code == 0


# -- token issue --pair, token refresh --------------------------------------------------------


def pair_of(run: Run, store: Valkey, user: str, *words: str) -> dict[str, Any]:
    return json_of(run("token", "issue", "--user", user, "--pair", *words, redis_url=store.url))


def test_a_pair_begins_a_session_in_the_store(
    run: Run, valkey: Valkey, user: str, data_dir: Path
) -> None:
    pair = pair_of(run, valkey, user, "--role", "guest", "--room", "general=rw")

    identity = keyring(data_dir).verify(pair["access_token"], now=time.time())
    assert list(pair) == [
        "access_token",
        "refresh_token",
        "session",
        "expires_at",
        "refresh_expires_at",
    ]
    assert (identity.user, identity.session) == (user, pair["session"])
    assert (identity.roles, identity.rooms) == (("guest",), {"general": "rw"})
    assert identity.expires_at * 1000 == pair["expires_at"]
    assert pair["refresh_token"].startswith("rt1.")
    assert valkey.command("EXISTS", f"chat:{{auth}}:family:{pair['session']}") == b":1"


def test_a_pair_lives_as_long_as_the_settings_say(run: Run, valkey: Valkey, user: str) -> None:
    lives = {"access_seconds": "60", "refresh_seconds": "3600"}

    result = run("token", "issue", "--user", user, "--pair", redis_url=valkey.url, **lives)

    pair = json_of(result)
    assert pair["refresh_expires_at"] - pair["expires_at"] == (3600 - 60) * 1000


def test_what_no_token_can_say_begins_no_session(run: Run, valkey: Valkey) -> None:
    result = run("token", "issue", "--user", "a\nb", "--pair", redis_url=valkey.url)

    assert (result.exit_code, result.stdout) == (2, "")


def test_a_pair_needs_the_store(run: Run) -> None:
    result = run("token", "issue", "--user", "alice", "--pair", redis_url=NOWHERE)

    assert (result.exit_code, result.stdout) == (69, "")
    assert "tomato" not in result.stderr


@pytest.mark.parametrize("place", ["argument", "stdin", "dash"])
def test_refresh_trades_a_token_for_the_next_pair(
    run: Run, valkey: Valkey, user: str, place: str, data_dir: Path
) -> None:
    pair = pair_of(run, valkey, user, "--role", "guest")
    token = pair["refresh_token"]
    words = {"argument": [token], "dash": ["-"], "stdin": []}[place]

    result = run("token", "refresh", *words, stdin=f"{token}\n", redis_url=valkey.url)

    following = json_of(result)
    identity = keyring(data_dir).verify(following["access_token"], now=time.time())
    assert (result.exit_code, result.stderr) == (0, "")
    assert following.keys() == pair.keys()
    assert following["refresh_token"] != token
    assert (identity.session, identity.roles) == (pair["session"], ("guest",))


def refusal_of(run: Run, store: Valkey, token: str) -> str:
    result = run("token", "refresh", stdin=token, redis_url=store.url)
    assert (result.exit_code, result.stdout) == (1, "")
    return result.stderr


@pytest.mark.parametrize("token", ["", "nonsense", "rt1.a.b.1.c", "ü", "eyJ.eyJ.x"])
def test_refresh_refuses_what_is_no_refresh_token(run: Run, valkey: Valkey, token: str) -> None:
    told = refusal_of(run, valkey, token)

    assert told == "chatserver: This is not a refresh token of this server and its store.\n"


def test_refresh_refuses_a_session_that_was_revoked(run: Run, valkey: Valkey, user: str) -> None:
    pair = pair_of(run, valkey, user)
    run("revoke", "--session", pair["session"], redis_url=valkey.url)

    told = refusal_of(run, valkey, pair["refresh_token"])

    assert told == "chatserver: The session was revoked: log in again.\n"


def test_refresh_refuses_a_session_that_is_over(run: Run, valkey: Valkey, user: str) -> None:
    pair = pair_of(run, valkey, user)
    valkey.command("HSET", f"chat:{{auth}}:family:{pair['session']}", "expires_at", "1")

    told = refusal_of(run, valkey, pair["refresh_token"])

    assert told == "chatserver: The session has reached its end: log in again.\n"


def test_a_lost_answer_is_given_again_but_not_for_ever(run: Run, valkey: Valkey, user: str) -> None:
    token = pair_of(run, valkey, user)["refresh_token"]

    answers = {run("token", "refresh", token, redis_url=valkey.url).stdout for _ in range(6)}
    told = refusal_of(run, valkey, token)

    assert len(answers) == 1
    assert "used too often" in told


def test_a_token_used_again_later_ends_its_session(run: Run, valkey: Valkey, user: str) -> None:
    token = pair_of(run, valkey, user)["refresh_token"]
    second = json_of(run("token", "refresh", token, redis_url=valkey.url))
    third = json_of(run("token", "refresh", second["refresh_token"], redis_url=valkey.url))

    refusal_of(run, valkey, token)
    told = refusal_of(run, valkey, third["refresh_token"])

    assert told == "chatserver: The session was revoked: log in again.\n"


# -- token inspect ----------------------------------------------------------------------------


def test_inspect_knows_a_refresh_token_and_prints_no_part_that_is_secret(
    run: Run, valkey: Valkey, user: str, data_dir: Path
) -> None:
    pair = pair_of(run, valkey, user)
    token = pair["refresh_token"]

    result = run("token", "inspect", stdin=token, redis_url=valkey.url)

    assert (result.exit_code, json_of(result)) == (
        0,
        {
            "good": True,
            "reason": None,
            "kind": "refresh token",
            "session": pair["session"],
            "generation": "1",
            "kid": keyring(data_dir).kid,
        },
    )
    assert token.split(".")[-1] not in result.output


def test_inspect_knows_a_refresh_token_that_is_not_of_this_server(
    run: Run, valkey: Valkey, user: str
) -> None:
    token = pair_of(run, valkey, user)["refresh_token"]
    others = run("token", "inspect", token, redis_url=valkey.url, secret=SECRET)
    forged = run("token", "inspect", token.replace(".1.", ".2."), redis_url=valkey.url)
    nonsense = run("token", "inspect", "rt1." + "." * 10_000, redis_url=valkey.url)

    for result in (others, forged, nonsense):
        assert result.exit_code == 1
        assert json_of(result)["good"] is False
    assert "token_invalid" in json_of(forged)["reason"]
    assert json_of(forged)["generation"] == "2"


def test_inspect_says_that_without_the_store_a_seal_cannot_be_checked(run: Run) -> None:
    result = run("token", "inspect", "rt1.k.s.1.x", redis_url=NOWHERE)

    report = json_of(result)
    assert (result.exit_code, report["good"], report["session"]) == (69, None, "s")
    assert report["reason"].startswith("its seal could not be checked: The store at ")
    assert "tomato" not in result.output


@pytest.mark.parametrize("place", ["argument", "stdin", "dash"])
def test_inspect_shows_what_is_in_a_token_but_not_the_token(run: Run, place: str) -> None:
    token = run("token", "issue", "--user", "alice").stdout.strip()
    words = {"argument": [token], "dash": ["-"], "stdin": []}[place]

    result = run("token", "inspect", *words, stdin=f"{token}\n")

    report = json_of(result)
    assert (result.exit_code, report["good"], report["reason"]) == (0, True, None)
    assert report["signature_verifies"] is True
    assert report["claims"] == claims_of(token)
    assert report["header"]["typ"] == "at+jwt"
    assert 890 < report["expires_in"] <= 900
    assert report["expires_at"].endswith("+00:00")
    assert not set(token.split(".")) & set(re.findall(r"[\w-]+", result.output))


def test_inspect_tells_an_expired_token_from_a_forged_one(run: Run, data_dir: Path) -> None:
    def token(keys: Keyring, issued_at: int) -> str:
        return keys.issue(user="a", session="s", roles=[], token_id="t", issued_at=issued_at)

    expired = token(keyring(data_dir), 1_700_000_000)
    forged = token(Keyring(SECRET.encode()), int(time.time()))

    first, second = (run("token", "inspect", token) for token in (expired, forged))

    assert first.exit_code == second.exit_code == 1
    assert json_of(first)["reason"] == "token_expired"
    assert json_of(first)["signature_verifies"] is True
    assert json_of(first)["expires_in"] < 0
    assert json_of(second)["reason"] == "token_invalid"
    assert json_of(second)["signature_verifies"] is False


def test_inspect_says_what_is_wrong_with_a_token_of_ours(run: Run) -> None:
    token = run("token", "issue", "--user", "alice", audience="others").stdout.strip()

    report = json_of(run("token", "inspect", token))

    assert report["signature_verifies"] is True
    assert report["reason"] == "token_invalid: aud is another than ours"


def test_inspect_accepts_what_the_previous_secret_signed(run: Run) -> None:
    token = run("token", "issue", "--user", "alice", secret=SECRET).stdout.strip()

    result = run("token", "inspect", token, secret_previous=SECRET)

    assert json_of(result)["good"] is True


def with_claims(text: str) -> str:
    return ".".join(
        base64.urlsafe_b64encode(part.encode()).decode().rstrip("=") for part in ("{}", text, "x")
    )


@pytest.mark.parametrize(
    "text",
    [
        "",
        "nonsense",
        "a.b",
        "a.b.c",
        "a.b.c.d.e",
        "..",
        "ü.ü.ü",
        b"\xff.\xff.\xff",
        with_claims("[]"),
        with_claims("[" * 9000),
        with_claims("[" * 5000 + "]" * 5000),
        with_claims("1" * 5000),
        with_claims('{"exp":1e400}'),
        with_claims('{"exp":' + "9" * 400 + "}"),
        with_claims('{"exp":true}'),
        "x" * 2_000_000,
    ],
    ids=lambda text: f"{len(text)} {str(text)[:12]}",
)
def test_whatever_is_inspected_gets_an_answer(run: Run, text: str | bytes) -> None:
    result = run("token", "inspect", stdin=text)

    assert result.exit_code == 1
    assert json_of(result)["good"] is False


# -- revoke -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("option", "kind"),
    [("--session", Kind.SESSION), ("--user", Kind.USER), ("--token", Kind.TOKEN)],
)
def test_revoke_says_what_it_revoked(
    run: Run, valkey: Valkey, user: str, option: str, kind: Kind
) -> None:
    result = run("revoke", option, user, "--reason", "lost", redis_url=valkey.url)

    assert (result.exit_code, result.stderr) == (0, "")
    assert result.stdout == f"Revoked {kind} {user}: 0 connections closed.\n"
    assert valkey.command("EXISTS", f"chat:{{auth}}:revoked:{kind}:{user}") == b":1"


@pytest.mark.parametrize(
    ("url", "told"),
    [
        (NOWHERE, "redis://127.0.0.1:1/0"),
        ("redis://alice:to@tomato@127.0.0.1:1/0", "redis://127.0.0.1:1/0"),
        ("redis://alice:'tomato@127.0.0.1:1/0", "redis://127.0.0.1:1/0"),
        ('redis://alice:"tomato@127.0.0.1:1/0', "redis://127.0.0.1:1/0"),
        ("redis://alice:a tomato@127.0.0.1:1/0", "redis://127.0.0.1:1/0"),
        ("redis://alice:<tomato>@127.0.0.1:1/0", "redis://127.0.0.1:1/0"),
        ("redis://127.0.0.1:1/0?password=a,tomato", "redis://127.0.0.1:1/0"),
        ("redis://127.0.0.1:1?password='tomato", "redis://127.0.0.1:1"),
        ("redis://127.0.0.1:1/0?p%61ssword=tomato", "redis://127.0.0.1:1/0"),
        ("unix:///nowhere?password=a,tomato", "unix:///nowhere"),
        ("redis+sentinel://a:'tomato@127.0.0.1:1/main", "redis+sentinel://127.0.0.1:1/main"),
    ],
)
def test_revoke_without_a_store_is_69_and_hides_its_password(run: Run, url: str, told: str) -> None:
    result = run("revoke", "--user", "alice", redis_url=url)

    assert (result.exit_code, result.stdout) == (69, "")
    assert f"The store at {told} cannot be reached" in result.stderr
    assert "tomato" not in result.stderr


@pytest.mark.parametrize(("closed", "told"), [(1, "1 connection"), (3, "3 connections")])
def test_revoke_counts_what_it_closed(
    run: Run, valkey: Valkey, monkeypatch: pytest.MonkeyPatch, closed: int, told: str
) -> None:
    async def revoke(*_: object, **__: object) -> revocations.Outcome:
        return revocations.Outcome(closed, complete=True)

    monkeypatch.setattr(revocations, "revoke", revoke)

    result = run("revoke", "--session", "s-1", redis_url=valkey.url)

    assert (result.stdout, result.stderr) == (f"Revoked session s-1: {told} closed.\n", "")


def test_revoke_says_when_a_worker_did_not_confirm(
    run: Run, own_valkey: Valkey, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(revocations, "CONFIRM_SECONDS", 0.1)
    lease = f"{int(time.time() + 60) * 1000} 0-0 {{}}"
    own_valkey.command("HSET", "chat:{auth}:workers", "w-silent", lease)

    result = run("revoke", "--session", "s-1", redis_url=own_valkey.url)

    assert (result.exit_code, result.stdout) == (
        0,
        "Revoked session s-1: 0 connections closed.\n",
    )
    assert "A worker did not confirm it." in result.stderr


def test_a_store_that_refuses_is_not_told_as_one_that_is_away(run: Run, own_valkey: Valkey) -> None:
    own_valkey.command("CONFIG", "SET", "maxmemory", "1")

    result = run("revoke", "--user", "alice", redis_url=own_valkey.url)

    assert (result.exit_code, result.stdout) == (69, "")
    assert result.stderr.startswith("chatserver: The store refuses: OOM command not allowed")
    assert result.stderr.count(".\n") == result.stderr.count("\n") == 1


def test_revoke_without_a_running_server_says_so(run: Run, data_dir: Path) -> None:
    result = run("revoke", "--user", "alice")

    assert result.exit_code == 69
    assert f"The private store in {data_dir} is not running" in result.stderr


# -- sessions ---------------------------------------------------------------------------------


@pytest.fixture
def connected(valkey: Valkey, user: str) -> list[str]:
    """Connections of a user on a worker that lives, and on one that does not."""
    now = int(time.time() * 1000)
    worker, gone = unique("w"), unique("w")
    for name, renewed in ((worker, now + 60_000), (gone, now - 60_000)):
        valkey.command("HSET", "chat:{auth}:workers", name, f"{renewed} 9999999999999-0 {{}}")
    registered = {f"{worker}/c-2": "1760000001000 - s-1", f"{gone}/c-3": "1760000002000 - s-2"}
    registered[f"{worker}/c-1"] = "1760000000123 203.0.113.7 s-1"
    for name, value in registered.items():
        valkey.command("HSET", f"chat:{{auth}}:user:{user}", name, value)
    return [worker]


def test_sessions_are_a_table(run: Run, valkey: Valkey, user: str, connected: list[str]) -> None:
    result = run("sessions", "--user", user, redis_url=valkey.url)

    (worker,) = connected
    assert [re.split("  +", line) for line in result.stdout.splitlines()] == [
        ["SESSION", "CONNECTION", "WORKER", "CONNECTED SINCE", "ADDRESS"],
        ["s-1", "c-1", worker, "2025-10-09T08:53:20+00:00", "203.0.113.7"],
        ["s-1", "c-2", worker, "2025-10-09T08:53:21+00:00", "-"],
    ]
    assert (result.exit_code, result.stderr) == (0, "")


def test_sessions_as_json(run: Run, valkey: Valkey, user: str, connected: list[str]) -> None:
    listed = json.loads(run("sessions", "--user", user, "--json", redis_url=valkey.url).stdout)

    assert [each["connection"] for each in listed] == ["c-1", "c-2"]
    assert listed[0] == {
        "session": "s-1",
        "connection": "c-1",
        "worker": connected[0],
        "connected_since": 1760000000123,
        "address": "203.0.113.7",
    }


def test_a_user_who_is_not_connected(run: Run, valkey: Valkey, user: str) -> None:
    told = run("sessions", "--user", user, redis_url=valkey.url).stdout
    listed = run("sessions", "--user", user, "--json", redis_url=valkey.url).stdout

    assert told == f"{user} is not connected.\n"
    assert json.loads(listed) == []


# -- check ------------------------------------------------------------------------------------


def test_check_is_content_with_a_good_configuration_and_store(run: Run, valkey: Valkey) -> None:
    result = run("check", redis_url=valkey.url)

    assert result.exit_code == 0
    assert "The configuration is good for development." in result.stdout
    assert re.search(r"The store answers: version \d+\.\d+.*, noeviction", result.stdout)
    assert result.stderr == ""


def test_check_is_loud_about_a_store_that_evicts(run: Run, own_valkey: Valkey) -> None:
    own_valkey.command("CONFIG", "SET", "maxmemory-policy", "allkeys-lru")

    result = run("check", redis_url=own_valkey.url)

    assert result.exit_code == 78
    assert "THE STORE MAY FORGET" in result.stderr
    assert "allkeys-lru" in result.stderr


def test_check_advises_a_store_that_keeps_what_it_has(run: Run, own_valkey: Valkey) -> None:
    own_valkey.command("CONFIG", "SET", "appendonly", "no")

    result = run("check", redis_url=own_valkey.url)

    assert result.exit_code == 0
    assert "Set appendonly to yes" in result.stderr


def test_check_says_that_a_store_is_too_old() -> None:
    assert check._store_problems("6.2.14", "noeviction") == [
        "The store is of version 6.2.14: it must be 7.0 or later."
    ]
    assert check._store_problems("unknown", "noeviction") == []


def test_check_without_a_store_is_69(run: Run) -> None:
    result = run("check", redis_url=NOWHERE)

    assert result.exit_code == 69
    assert "tomato" not in result.output


@pytest.mark.parametrize(
    "url",
    [
        "redis://127.0.0.1:1/0?password=tomato&colour=red",
        "redis://127.0.0.1:1/0?ssl_password=tomato",
        "redis://127.0.0.1:1/0?protocol=tomato",
        "rediss://127.0.0.1:1/0?ssl_cert_reqs=tomato",
        "unix:///nowhere?db=tomato",
        "redis+sentinel://127.0.0.1:1/main?colour=tomato",
        "redis+cluster://127.0.0.1:1/?colour=tomato",
    ],
)
@pytest.mark.parametrize("words", [["check"], ["revoke", "--user", "alice"]])
def test_a_store_url_with_options_that_are_none_is_78_and_not_repeated(
    run: Run, words: list[str], url: str
) -> None:
    result = run(*words, redis_url=url)

    assert result.exit_code == 78
    assert result.stderr.startswith("chatserver: CHATSERVER_REDIS_URL: among its options, ")
    assert result.stderr.count("\n") == 1
    assert "tomato" not in result.output


def test_check_knows_that_serve_starts_the_private_store(run: Run) -> None:
    result = run("check")

    assert result.exit_code == 0
    assert "The private store is not running; serve will start /" in result.stdout


def test_check_names_every_reason_that_would_keep_production_from_starting(run: Run) -> None:
    result = run("check", environment="production", secret="tomato")

    assert result.exit_code == 78
    for name in ("SECRET", "TLS_CERTFILE", "ALLOWED_ORIGINS", "REDIS_URL"):
        assert f"CHATSERVER_{name}" in result.stderr
    assert "tomato" not in result.stderr


def test_check_finds_a_secret_file_that_others_can_read(run: Run, data_dir: Path) -> None:
    development_secret(data_dir)
    (data_dir / "secret").chmod(0o644)

    assert run("check").exit_code == 78


def test_a_misspelt_variable_is_pointed_out(run: Run, valkey: Valkey) -> None:
    result = run("check", redis_url=valkey.url, secrte="x")

    assert result.exit_code == 0
    assert "CHATSERVER_SECRTE is not a setting" in result.stderr


# -- chat -------------------------------------------------------------------------------------


@pytest.fixture
def chats(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str, list[str]]]:
    """Calls of the terminal client: URL, room, and two tokens it asked for."""
    calls = []

    async def chat(url: str, room: str, token: Callable[[], Any]) -> int:
        calls.append((url, room, [await token(), await token()]))
        return 1

    monkeypatch.setattr("chatserver.client.terminal.chat", chat)
    return calls


def test_chat_as_a_user_makes_tokens_of_one_session(
    run: Run, chats: list[tuple[str, str, list[str]]], data_dir: Path
) -> None:
    result = run("chat", "--room", "general", "--user", "bob", port="8123")

    ((url, room, tokens),) = chats
    first, second = (keyring(data_dir).verify(token, now=time.time()) for token in tokens)
    assert (result.exit_code, url, room) == (1, "ws://127.0.0.1:8123/v1/ws", "general")
    assert (first.user, first.session) == (second.user, second.session)
    assert first.token_id != second.token_id


def test_chat_with_a_token_needs_no_secret(
    run: Run, chats: list[tuple[str, str, list[str]]], data_dir: Path
) -> None:
    run("chat", "--room", "general", "--token", "T", "--url", "wss://chat.example/v1/ws")

    assert chats == [("wss://chat.example/v1/ws", "general", ["T", "T"])]
    assert not data_dir.exists()


# -- serve ------------------------------------------------------------------------------------


def test_production_refuses_to_start_and_names_each_reason(run: Run) -> None:
    result = run("serve", environment="production")

    assert (result.exit_code, result.stdout) == (78, "")
    assert result.stderr.count("chatserver: ") == 4


def test_without_a_server_program_serve_names_three_ways_out(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr("chatserver.store.embedded._bundled", lambda: None)

    result = run("serve", "--port", "0")

    assert result.exit_code == 69
    assert "CHATSERVER_REDIS_URL" in result.stderr


@pytest.mark.parametrize(
    ("settings", "port", "url", "link"),
    [
        ({}, 8000, "ws://127.0.0.1:8000/v1/ws", ""),
        ({}, 8001, "ws://127.0.0.1:8001/v1/ws", " --url ws://127.0.0.1:8001/v1/ws"),
        ({"host": "::1"}, 8000, "ws://[::1]:8000/v1/ws", " --url ws://[::1]:8000/v1/ws"),
        (
            {"host": "0.0.0.0", "tls_certfile": "c", "tls_keyfile": "k"},
            443,
            "wss://127.0.0.1:443/v1/ws",
            " --url wss://127.0.0.1:443/v1/ws",
        ),
    ],
)
def test_the_banner_names_the_url_wherever_it_is_not_the_usual_one(
    monkeypatch: pytest.MonkeyPatch, settings: dict[str, str], port: int, url: str, link: str
) -> None:
    monkeypatch.delenv("CHATSERVER_DATA_DIR")

    text = serve.banner(load(**settings), supervisor.Address("", port))

    assert f"listens on {url}\n" in text
    assert f"\n    chatserver chat --room general --user bob{link}\n" in text
    assert "\n    chatserver token issue --user alice --role member\n" in text


@pytest.mark.parametrize(
    ("settings", "page"),
    [
        ({}, "http://127.0.0.1:8000/"),
        ({"host": "::1"}, "http://[::1]:8000/"),
        ({"host": "0.0.0.0"}, "http://127.0.0.1:8000/"),
        ({"tls_certfile": "c", "tls_keyfile": "k"}, "https://127.0.0.1:8000/"),
        ({"host": "192.0.2.1"}, None),
        ({"allowed_origins": "https://app.example"}, None),
    ],
)
def test_the_banner_names_the_page_where_there_is_one(
    settings: dict[str, str], page: str | None
) -> None:
    text = serve.banner(load(**settings), supervisor.Address("", 8000))

    assert (f"\nTo chat, open {page} in two windows" in text) == (page is not None)
    assert ("\nTo chat, type in a second terminal" in text) == (page is None)


def test_the_banner_names_the_control_api_where_there_is_one() -> None:
    address = supervisor.Address("", 8000)

    assert "The control API: http://127.0.0.1:8001/docs\n" in serve.banner(
        load(control_key="k" * 40), address
    )
    assert "control" not in serve.banner(load(), address)


def test_the_banner_repeats_what_the_other_terminal_must_know(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(COMMAND, "/a b/scripts/chatserver")

    text = serve.banner(load(data_dir="/c d", audience="x"), supervisor.Address("", 8000))

    me = "CHATSERVER_DATA_DIR='/c d' CHATSERVER_AUDIENCE=x '/a b/scripts/chatserver'"
    assert f"\n    {me} chat --room general --user bob\n" in text


def test_a_newcomer_serves_and_chats_with_the_commands_that_the_banner_prints(
    tmp_path: Path,
) -> None:
    """The whole path: server, private store, worker, both commands copied into a shell."""
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(tmp_path),
        "PYTHONPATH": str(ROOT),
        "CHATSERVER_DATA_DIR": str(tmp_path / "a data dir"),
        COMMAND: "chatserver",
    }
    shell = f'chatserver() {{ "{sys.executable}" -m chatserver "$@"; }}\n'
    server = subprocess.Popen(
        [sys.executable, "-m", "chatserver", "serve", "--port", "0"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        cwd=tmp_path,
    )
    with server:
        assert server.stdout is not None
        lines = list(iter(server.stdout.readline, "Ctrl-C stops the server.\n"))
        chat, issue = (line.strip() for line in lines if line.startswith("    "))

        def type_in(line: str) -> subprocess.CompletedProcess[str]:
            words = ["sh", "-c", shell + line]
            return subprocess.run(
                words, input="hello\n", env=environment, capture_output=True, text=True
            )

        issued, chatted = type_in(issue), type_in(chat)
        [address] = re.findall(r"open (\S+) in two windows", "".join(lines))
        with urlopen(address) as opened:
            page = opened.read()
        server.send_signal(signal.SIGINT)
        _, log = server.communicate(timeout=PATIENCE)

    assert claims_of(issued.stdout)["sub"] == "alice"
    assert (chatted.returncode, "bob: hello\n" in chatted.stdout) == (0, True)
    assert b"<title>chatserver</title>" in page
    assert server.returncode == 0
    assert "eyJ" not in log
    assert '"level": "error"' not in log

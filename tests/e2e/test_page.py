"""What development serves beside the protocol: the page's files, and a login by name."""

from __future__ import annotations

from pathlib import Path

import pytest

import chatserver
from chatserver import app
from chatserver.settings import load
from tests.conftest import StartWorker
from tests.support.client import Answer, Client, http, request
from tests.support.client import exchange as send
from tests.support.tokens import unique
from tests.support.worker import PATIENCE, Worker

WEB = Path(chatserver.__file__).parent / "web"
NEIGHBOUR = "http://localhost:3000"


async def login(worker: Worker, query: str, **headers: str) -> Answer:
    answer = await http(worker.url, f"/dev/sessions?{query}", method="POST", headers=headers)
    if answer.status == 200:
        worker.issuer.keep(answer.json["access_token"])
        worker.issuer.keep(answer.json["refresh_token"])
    return answer


@pytest.mark.parametrize(
    ("path", "name", "kind"),
    [
        ("/", "index.html", "text/html; charset=utf-8"),
        ("/page.css", "page.css", "text/css; charset=utf-8"),
        ("/page.js", "page.js", "text/javascript; charset=utf-8"),
        ("/chat.js", "chat.js", "text/javascript; charset=utf-8"),
        ("/icon.svg", "icon.svg", "image/svg+xml"),
    ],
)
async def test_the_page_is_served_as_it_is_and_lets_nothing_else_in(
    worker: Worker, path: str, name: str, kind: str
) -> None:
    answer = await http(worker.url, path)
    policy = answer.header("content-security-policy")

    assert (answer.status, answer.body) == (200, (WEB / name).read_bytes())
    assert answer.header("content-type") == kind
    assert policy is not None
    assert policy.startswith("default-src 'none'; script-src 'self'; style-src 'self';")
    assert "unsafe" not in policy
    assert "http" not in policy
    assert answer.header("cache-control") == "no-store"
    assert answer.header("x-content-type-options") == "nosniff"
    assert answer.header("referrer-policy") == "no-referrer"
    assert answer.header("access-control-allow-origin") is None
    assert answer.header("server") is None


async def test_a_name_is_enough_for_a_session(worker: Worker) -> None:
    user = unique("é & b")
    quoted = "".join(f"%{byte:02x}" for byte in user.encode())
    answer = await login(worker, f"user={quoted}", Origin=NEIGHBOUR)

    assert set(answer.json) == {
        "access_token",
        "refresh_token",
        "session",
        "expires_at",
        "refresh_expires_at",
    }
    assert answer.header("access-control-allow-origin") == NEIGHBOUR
    assert answer.header("cache-control") == "no-store"
    async with await Client.connect(worker.url, answer.json["access_token"]) as client:
        assert client.welcome["user"] == user
        assert client.welcome["roles"] == ["member"]
        assert client.welcome["session"] == answer.json["session"]


@pytest.mark.parametrize("user", ["x" * 129, "%00", "a%0Ab", "%7F", "%ED%A0%80"])
async def test_what_is_no_name_is_refused_in_words(worker: Worker, user: str) -> None:
    answer = await login(worker, f"user={user}")

    assert (answer.status, answer.code) == (400, "bad_request")
    assert "1 to 128 characters" in answer.json["error"]["message"]


async def test_bytes_that_are_no_text_are_no_name(worker: Worker) -> None:
    asked = request(worker.url, "/dev/sessions?user=a", method="POST")
    answer = await send(worker.url, asked.replace(b"user=a", b"user=\xff"), PATIENCE)

    assert answer.status == 400


async def test_logins_have_the_rate_of_handshakes(start_worker: StartWorker) -> None:
    worker = start_worker(handshake_rate=1)
    statuses = [(await login(worker, "user=alice")).status for _ in range(20)]

    assert statuses[0] == 200
    assert statuses[-1] == 429


def test_production_has_no_page() -> None:
    production = load(environment="production", allowed_origins="http://localhost:8000")

    assert not app.policy_of(production).page
    assert app.policy_of(load()).page

"""What the pages show of the Python client runs as it stands there."""

from __future__ import annotations

import asyncio
import re
import sys
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest

from chatserver.client import (
    Closed,
    Message,
    TokenKeeper,
    TokenPair,
    UnknownOutcomeError,
    connect,
)
from tests.support.sessions import Office, office
from tests.support.tokens import Issuer, unique
from tests.support.valkey import Valkey
from tests.support.worker import PATIENCE, Worker

ROOT = Path(__file__).parents[2]


def examples(page: str) -> list[str]:
    text = (ROOT / page).read_text()
    return re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)


@pytest.fixture
async def login(valkey: Valkey, issuer: Issuer) -> AsyncIterator[Office]:
    async with office(valkey.url, issuer) as opened:
        yield opened


async def pair(login: Office, user: str) -> TokenPair:
    begun = await login.begin(user)
    return TokenPair(**begun._asdict())


@pytest.fixture
def page() -> dict[str, Any]:
    """All that the examples of the client's page define, one after the other."""
    names: dict[str, Any] = {}
    for code in examples("docs/client-python.md"):
        exec(compile(code, "docs/client-python.md", "exec"), names)
    return names


async def test_the_examples_of_the_clients_page_do_what_it_says(
    page: dict[str, Any], worker: Worker, issuer: Issuer, capsys: pytest.CaptureFixture[str]
) -> None:
    user = unique("user")
    token = issuer.token(user)
    async with asyncio.timeout(PATIENCE):
        await page["hello"](worker.url, token)
        assert f"{user} {{'text': 'hello'}}" in capsys.readouterr().out
        assert await page["visit"](worker.url, token)
        assert capsys.readouterr().out.splitlines()[-1] == "closed"
        async with connect(worker.url, token=token) as client:
            room = await client.join("general")
            before = room.position
            assert await page["say"](room, "one") is not None
            assert await page["read"](room, 1) == [{"text": "one"}]
            assert await page["go_on"](client, before, 1) == [{"text": "one"}]
            texts = [message.body for message in await page["everything"](client, "general")]
            assert {"text": "one"} in texts
            page["tell"](Closed(UnknownOutcomeError("k")))
    async with connect(worker.url, token=issuer.token(user, roles=["guest"])) as client:
        room = await client.join("general")
        assert await page["say"](room, "may I?") is None

    assert "not sent: forbidden" in capsys.readouterr().out


async def test_the_keeper_of_the_page_keeps_its_pair_in_a_file_of_its_own(
    page: dict[str, Any], worker: Worker, login: Office, tmp_path: Path
) -> None:
    file = tmp_path / "tokens.json"
    file.write_text((await pair(login, unique("user"))).to_json())
    keeper: TokenKeeper = page["keeper"](worker.url, file)
    async with connect(worker.url, token=keeper) as client:
        before = client.expires_at
        await client.refresh()
        assert client.expires_at >= before

    assert TokenPair.from_json(file.read_text()) == keeper.pair
    assert file.stat().st_mode & 0o777 == 0o600


async def test_the_bot_of_the_readme_answers(
    worker: Worker, issuer: Issuer, login: Office, tmp_path: Path
) -> None:
    (bot,) = examples("README.md")
    assert 'URL = "ws://127.0.0.1:8000/v1/ws"' in bot
    (tmp_path / "bot.py").write_text(bot.replace("ws://127.0.0.1:8000/v1/ws", worker.url))
    (tmp_path / "bot.json").write_text((await pair(login, unique("bot"))).to_json())
    user = unique("user")
    async with connect(worker.url, token=issuer.token(user)) as client:
        room = await client.join("general")
        running = await asyncio.create_subprocess_exec(
            sys.executable, "bot.py", cwd=tmp_path, env={"PYTHONPATH": str(ROOT)}
        )
        try:
            async with asyncio.timeout(PATIENCE):
                assert await _answer(room, user)
        finally:
            running.kill()
            await running.wait()


async def _answer(room: Any, user: str) -> bool:
    """Ask until the bot is there to answer."""

    async def ask() -> None:
        while True:
            await room.send({"text": "!time"})
            await asyncio.sleep(0.2)

    asking = asyncio.create_task(ask())
    try:
        async for event in room:
            match event:
                case Message(body={"text": str(text)}) if text.startswith(f"{user}, it is "):
                    return True
        return False
    finally:
        asking.cancel()
        await asyncio.gather(asking, return_exceptions=True)

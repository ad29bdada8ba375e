from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from chatserver.client import (
    ChatError,
    DisconnectedError,
    RefusedError,
    TokenKeeper,
    TokenPair,
    TokenRefusedError,
    connect,
    keeper,
)
from tests.client.scripted import Peer, scripted

HOUR = 3_600_000


def pair(number: int, *, left: int = HOUR) -> TokenPair:
    now = int(time.time() * 1000)
    return TokenPair(f"access{number}", f"refresh{number}", "s1", now + left, now + 24 * HOUR)


def answer(number: int) -> tuple[int, Any, dict[str, str]]:
    tokens = pair(number)
    return 200, {name: getattr(tokens, name) for name in tokens.__struct_fields__}, {}


def no(status: int, code: str, **headers: str) -> tuple[int, Any, dict[str, str]]:
    body = {"error": {"code": code, "message": "No."}}
    return status, body, {name.replace("_", "-"): value for name, value in headers.items()}


LOST: tuple[int, Any, dict[str, str]] = (0, None, {})
"""The request is heard, and the connection goes."""


class Office:
    """Answers requests as told, in order, and keeps what they were."""

    def __init__(self, *answers: tuple[int, Any, dict[str, str]]) -> None:
        self.answers = list(answers)
        self.asked: list[str] = []
        self.saved: list[TokenPair] = []
        self.url = ""

    async def save(self, tokens: TokenPair) -> None:
        self.saved.append(tokens)

    def keeper(self, tokens: TokenPair) -> TokenKeeper:
        return TokenKeeper(self.url, tokens, save=self.save)

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        assert head.startswith("POST /v1/tokens/refresh HTTP/1.1\r\n")
        fields = dict(line.split(": ", 1) for line in head.split("\r\n")[1:] if line)
        self.asked.append(fields["Authorization"].removeprefix("Bearer "))
        status, body, headers = self.answers.pop(0)
        if status:
            text = json.dumps(body).encode()
            lines = [f"HTTP/1.1 {status} X", f"Content-Length: {len(text)}", "Connection: close"]
            lines += [f"{name}: {value}" for name, value in headers.items()]
            writer.write("".join(f"{line}\r\n" for line in [*lines, ""]).encode() + text)
        writer.close()


@asynccontextmanager
async def office(*answers: tuple[int, Any, dict[str, str]]) -> AsyncIterator[Office]:
    desk = Office(*answers)
    server = await asyncio.start_server(desk.serve, "127.0.0.1", 0)
    desk.url = f"ws://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1/ws"
    async with server:
        yield desk
    assert desk.answers == []


@pytest.fixture(autouse=True)
def _no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keeper, "FIRST_WAIT", 0)


async def test_the_pair_at_hand_is_given_first_and_then_the_next_each_time() -> None:
    async with office(answer(2), answer(3)) as desk:
        keep = desk.keeper(pair(1))
        tokens = [await keep() for _ in range(3)]

    assert tokens == ["access1", "access2", "access3"]
    assert desk.asked == ["refresh1", "refresh2"]
    assert [saved.refresh_token for saved in desk.saved] == ["refresh2", "refresh3"]
    assert keep.pair.refresh_token == "refresh3"


async def test_an_access_token_that_has_expired_is_not_given_at_all() -> None:
    async with office(answer(2)) as desk:
        assert await desk.keeper(pair(1, left=1000))() == "access2"


async def test_a_pair_is_saved_before_it_is_used_and_again_when_that_failed() -> None:
    saved = []

    async def save(tokens: TokenPair) -> None:
        saved.append(tokens.refresh_token)
        if len(saved) == 1:
            raise OSError("disk full")

    async with office(answer(2)) as desk:
        keep = TokenKeeper(desk.url, pair(1, left=0), save=save)
        with pytest.raises(OSError, match="disk full"):
            await keep()
        assert keep.pair.refresh_token == "refresh1"
        assert await keep() == "access2"

    assert saved == ["refresh2", "refresh2"]
    assert desk.asked == ["refresh1"]


async def test_a_plain_function_saves_as_well() -> None:
    saved: list[TokenPair] = []
    async with office(answer(2), answer(3)) as desk:
        keep = TokenKeeper(desk.url, pair(1, left=0), save=saved.append)
        assert [await keep(), await keep()] == ["access2", "access3"]

    assert [tokens.refresh_token for tokens in saved] == ["refresh2", "refresh3"]


@pytest.mark.parametrize(
    "trouble",
    [
        LOST,
        no(500, "internal"),
        no(502, "bad_gateway"),
        no(503, "unavailable", Retry_After="0"),
        no(429, "rate_limited", Retry_After="0"),
        (200, {"access_token": "half an answer"}, {}),
    ],
)
async def test_what_was_not_answered_is_asked_again_with_the_same_token(trouble: Any) -> None:
    async with office(trouble, trouble, answer(2)) as desk:
        assert await desk.keeper(pair(1, left=0))() == "access2"

    assert desk.asked == ["refresh1"] * 3


async def test_it_does_not_ask_for_ever_and_the_next_call_goes_on_with_the_same_token() -> None:
    async with office(*[LOST] * keeper.TRIES, answer(2)) as desk:
        keep = desk.keeper(pair(1, left=0))
        with pytest.raises(DisconnectedError):
            await keep()
        assert await keep() == "access2"

    assert set(desk.asked) == {"refresh1"}


async def test_a_long_wait_that_was_told_is_the_callers() -> None:
    async with office(no(429, "rate_limited", Retry_After="60")) as desk:
        with pytest.raises(RefusedError) as caught:
            await desk.keeper(pair(1, left=0))()

    assert (caught.value.status, caught.value.retry_after) == (429, 60_000)
    assert not caught.value.final


@pytest.mark.parametrize("code", ["token_invalid", "token_expired", "token_revoked"])
async def test_a_token_that_is_refused_is_never_tried_again(code: str) -> None:
    async with office(no(401, code)) as desk:
        keep = desk.keeper(pair(1, left=0))
        for _ in range(3):
            with pytest.raises(TokenRefusedError) as caught:
                await keep()
            assert (caught.value.code, caught.value.final) == (code, True)

    assert desk.asked == ["refresh1"]
    assert desk.saved == []


async def test_a_redirect_is_not_followed_with_the_token() -> None:
    async with office(no(307, "elsewhere", Location="http://127.0.0.1:9/")) as desk:
        with pytest.raises(RefusedError) as caught:
            await desk.keeper(pair(1, left=0))()

    assert caught.value.status == 307


async def test_all_who_call_at_once_share_one_trade_also_when_one_gives_up() -> None:
    saving, go = asyncio.Event(), asyncio.Event()

    async def save(tokens: TokenPair) -> None:
        saving.set()
        await go.wait()

    async with office(answer(2)) as desk:
        keep = TokenKeeper(desk.url, pair(1, left=0), save=save)
        calls = [asyncio.create_task(keep()) for _ in range(50)]
        await saving.wait()
        calls[0].cancel()
        go.set()
        tokens = await asyncio.gather(*calls, return_exceptions=True)

    assert set(tokens[1:]) == {"access2"}


async def test_closing_waits_until_a_trade_is_saved() -> None:
    async with office(answer(2)) as desk:
        keep = desk.keeper(pair(1, left=0))
        call = asyncio.create_task(keep())
        while not desk.asked:
            await asyncio.sleep(0.001)
        call.cancel()
        await keep.close()

    assert [saved.refresh_token for saved in desk.saved] == ["refresh2"]


async def test_a_client_that_is_closed_lets_its_keeper_save_what_it_has_traded_for() -> None:
    saving, go = asyncio.Event(), asyncio.Event()

    async def save(tokens: TokenPair) -> None:
        saving.set()
        await go.wait()

    async def script(peer: Peer) -> None:
        await peer.welcome()
        await peer.socket.wait_closed()
        asyncio.get_running_loop().call_later(0.05, go.set)

    async with office(answer(2)) as desk, scripted(script) as url:
        keep = TokenKeeper(desk.url, pair(1), save=save)
        async with connect(url, token=keep) as client:
            refreshing = asyncio.create_task(client.refresh())
            await saving.wait()
        refreshing.cancel()

    assert keep.pair.refresh_token == "refresh2"


async def test_nobody_there_is_told_as_that() -> None:
    keep = TokenKeeper("ws://127.0.0.1:9/v1/ws", pair(1, left=0), save=Office().save)
    with pytest.raises(ChatError, match="no tokens"):
        await keep()


def test_neither_shows_a_token() -> None:
    keep = TokenKeeper("wss://here/v1/ws", pair(1), save=Office().save)

    assert repr(keep) == "<TokenKeeper of s1>"
    assert repr(keep.pair) == str(keep.pair) == "<TokenPair of s1>"
    with pytest.raises(ValueError, match="URL"):
        TokenKeeper("https://here/", pair(1), save=Office().save)

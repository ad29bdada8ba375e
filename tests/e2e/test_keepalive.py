"""Pings: spread over their interval, and the end of those who do not answer."""

from __future__ import annotations

import asyncio
import time
from contextlib import AsyncExitStack

from websockets.frames import Opcode

from tests.conftest import StartWorker
from tests.support.client import Raw, masked
from tests.support.tokens import Issuer
from tests.support.worker import PATIENCE


async def _next_ping(raw: Raw) -> float:
    while (await raw.frame(pings=True))[0] != Opcode.PING:
        pass
    return time.monotonic()


async def test_those_who_came_together_are_not_pinged_together(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker(ping_interval=4)
    async with AsyncExitStack() as sockets:
        raws = [
            await sockets.enter_async_context(await Raw.upgraded(worker.url, issuer.token(user)))
            for _ in range(40)
        ]
        pings = sorted(await asyncio.gather(*map(_next_ping, raws)))

    assert pings[-1] - pings[0] > 1.0


async def test_who_answers_is_pinged_again_and_again(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker(ping_interval=0.5, ping_timeout=2.5)
    async with await Raw.upgraded(worker.url, issuer.token(user)) as raw:
        first = await _next_ping(raw)
        raw.write(masked(Opcode.PONG))
        # Longer than one that does not answer would have.
        while await _next_ping(raw) < first + 3.0:
            raw.write(masked(Opcode.PONG))
        raw.text({"type": "ping", "id": 1})
        assert (await raw.json())["type"] == "ack"


async def test_who_does_not_answer_is_closed_and_may_come_back(
    start_worker: StartWorker, issuer: Issuer, user: str
) -> None:
    worker = start_worker(ping_interval=0.5, ping_timeout=0.5)
    began = time.monotonic()
    async with await Raw.upgraded(worker.url, issuer.token(user)) as raw:
        await _next_ping(raw)

        frames, code = await raw.until_closed()

        assert 0.5 <= time.monotonic() - began < PATIENCE
        assert (code, frames[-1]["type"], frames[-1]["reconnect"]) == (4408, "bye", True)
